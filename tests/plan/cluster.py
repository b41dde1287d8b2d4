"""A state machine to plan against: every change goes through the real `apply`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from reconciler.fsm import commands as c
from reconciler.fsm.apply import apply
from reconciler.fsm.codec import Entry
from reconciler.fsm.records import ENDED, Change, Origin
from reconciler.fsm.state import State
from reconciler.language.spec import (
    EnvVar,
    Health,
    Route,
    SecretRef,
    ServiceSpec,
    canonical,
    spec_hash,
)
from reconciler.plan.diff import MANUAL, Wish
from reconciler.plan.plan import Plan, make_plan

GIB = 1 << 30


def service(name: str, **fields: object) -> ServiceSpec:
    """A spec with a port, a tenth of a core and 128 MiB."""
    defaults: dict[str, object] = {
        "image": f"registry.example.com/{name}:v1", "port": 8080, "cpu_milli": 100,
        "memory_bytes": GIB // 8, "health": Health(kind="tcp"),
    }
    return ServiceSpec(name=name, **{**defaults, **fields})  # type: ignore[arg-type]  # keywords of a struct


def routed(host: str, path: str = "/") -> tuple[Route, ...]:
    return (Route(host=host, path=path),)


def with_secret(key: str, name: str) -> EnvVar:
    return EnvVar(key, (SecretRef(name),))


def digest(spec: ServiceSpec, build: int = 1) -> str:
    """A digest for the spec's image; another `build` is a tag that moved."""
    return "sha256:" + hashlib.sha256(f"{spec.image} {build}".encode()).hexdigest()


@dataclass
class Cluster:
    """Nodes, secrets and deploys, by commands alone; a refused command fails the test."""

    state: State = field(default_factory=State)
    _ids: int = 0

    def do(self, command: c.AnyCommand) -> State:
        entry = Entry(self.state.time_ms + 1, command)
        self.state, refused = apply(self.state, self.state.index + 1, entry)
        assert refused is None, refused
        return self.state

    def node(
        self, name: str, number: int, cpu_milli: int = 4000, memory_bytes: int = 8 * GIB
    ) -> None:
        self.do(c.RegisterNode(name=name, number=number, api="", agent="", cpu_milli=cpu_milli,
                               memory_bytes=memory_bytes))

    def secret(self, name: str) -> None:
        self.do(c.SetSecret(name, b"n" * 12, name.encode()))

    def plan(
        self, *specs: ServiceSpec, owner: str = MANUAL, prune: bool = False, build: int = 1
    ) -> Plan:
        wishes = [Wish(spec, digest(spec, build)) for spec in specs]
        return make_plan(wishes, self.state, owner=owner, prune=prune)

    def deploy(
        self, *specs: ServiceSpec, owner: str = MANUAL, prune: bool = False, build: int = 1
    ) -> Plan:
        plan = self.plan(*specs, owner=owner, prune=prune, build=build)
        kind = "manual" if owner == MANUAL else "git"
        self.carry_out(plan, Origin(kind=kind, source="" if owner == MANUAL else owner))
        return plan

    def carry_out(self, plan: Plan, origin: Origin | None = None) -> str:
        """Everything that the executor would log for a deploy in which nothing goes wrong."""
        for one in plan.diffs:
            if one.spec is not None:
                self.do(c.StoreSpec(spec_hash(one.spec), 0, 1, canonical(one.spec)))
        return self.start(c.StartDeploy(changes=plan.changes, origin=origin or Origin(),
                                        budget_ms=60_000))

    def start(self, command: c.StartDeploy) -> str:
        deploy = self.do(command).active_deploy
        for change in command.changes:
            self._fill(deploy, change)
        self.do(c.CommitDeploy(deploy))
        self.do(c.RouteDeploy(deploy))
        for alloc in list(self.state.allocations.values()):
            if alloc.status == "stopping":
                self.do(c.SetAllocStatus(alloc=alloc.id, status="stopped", was="stopping"))
        self.do(c.FinishDeploy(deploy))
        return deploy

    def _fill(self, deploy: str, change: Change) -> None:
        for number, slot in enumerate(change.slots):
            if slot.keep:
                continue
            self._ids += 1
            alloc = f"{change.service}-{self._ids:06}"
            self.do(c.ScheduleAlloc(alloc=alloc, service=change.service, node=slot.node,
                                    slot=number, deploy=deploy))
            self.do(c.SetAllocStatus(alloc=alloc, status="starting", was="pending"))
            self.do(c.SetAllocStatus(alloc=alloc, status="running", was="starting"))
            self.do(c.SetAllocStatus(alloc=alloc, status="healthy", was="running"))

    def running(self, name: str) -> dict[str, str]:
        """The service's live allocations, each with its node."""
        return {a.id: a.node for a in self.state.of_service(name)
                if a.live and a.status not in ENDED}


def three_nodes() -> Cluster:
    cluster = Cluster()
    for number in (1, 2, 3):
        cluster.node(f"node-{number}", number)
    return cluster
