"""A state machine to talk to: commands in, state and refusals out."""

from __future__ import annotations

from reconciler.fsm import commands as c
from reconciler.fsm.apply import Refused, apply
from reconciler.fsm.codec import Entry
from reconciler.fsm.records import Change, Origin, SecretPin, Slot
from reconciler.fsm.state import State
from reconciler.language.spec import Health, ServiceSpec, canonical, spec_hash


class Machine:
    """Applies commands one after the other, a second of logged time apart."""

    def __init__(self) -> None:
        self.state = State()
        self.now_ms = 1_000_000

    def do(self, command: c.AnyCommand) -> str:
        """Apply; "" or why it was refused."""
        self.now_ms += 1_000
        entry = Entry(self.now_ms, command)
        self.state, refused = apply(self.state, self.state.index + 1, entry)
        return refused.reason if isinstance(refused, Refused) else ""

    def node(self, number: int) -> str:
        name = f"node-{number}"
        assert not self.do(c.RegisterNode(
            name=name, number=number, api=f"127.0.0.1:{4400 + number}",
            agent=f"127.0.0.1:{4500 + number}", cpu_milli=4_000, memory_bytes=8_000_000_000))
        return name

    def start(self, *specs: ServiceSpec, remove: tuple[str, ...] = (), nodes: int = 1,
              secrets: tuple[SecretPin, ...] = ()) -> str:
        """StartDeploy of these specs; the deploy's id."""
        changes = []
        for spec in specs:
            key = spec_hash(spec)
            assert not self.do(c.StoreSpec(key, 0, 1, canonical(spec)))
            service = self.state.services.get(spec.name)
            live = service.live if service else 0
            changes.append(Change(
                service=spec.name, action="update" if live else "create", spec_hash=key,
                digest="sha256:" + key, from_revision=live, secrets=secrets,
                to_revision=(service.last_revision if service else 0) + 1,
                slots=tuple(Slot(f"node-{n % nodes + 1}") for n in range(spec.replicas)),
            ))
        changes += [Change(service=name, action="remove",
                           from_revision=self.state.services[name].live) for name in remove]
        refused = self.do(c.StartDeploy(changes=tuple(changes), origin=Origin(), budget_ms=60_000))
        assert not refused, refused
        return self.state.active_deploy

    def place(self, deploy: str) -> list[str]:
        """Schedule every slot; the allocations' ids."""
        placed = []
        for change in self.state.deploys[deploy].changes:
            for number, slot in enumerate(change.slots):
                if not slot.keep:
                    alloc = f"{change.service}-{deploy[2:]}x{number}"
                    assert not self.do(c.ScheduleAlloc(
                        alloc=alloc, service=change.service, node=slot.node, slot=number,
                        deploy=deploy))
                    placed.append(alloc)
        return placed

    def walk(self, alloc: str, *path: str) -> None:
        """Move an allocation along these states."""
        for status in path:
            was = self.state.allocations[alloc].status
            refused = self.do(c.SetAllocStatus(alloc=alloc, status=status, was=was))  # type: ignore[arg-type]  # a state's name
            assert not refused, refused

    def deploy(self, *specs: ServiceSpec, nodes: int = 1, **kw: object) -> str:
        """A whole deploy, to its end."""
        deploy = self.start(*specs, nodes=nodes, **kw)  # type: ignore[arg-type]  # as start's
        for alloc in self.place(deploy):
            self.walk(alloc, "starting", "running", "healthy")
        assert not self.do(c.CommitDeploy(deploy))
        assert not self.do(c.RouteDeploy(deploy))
        for alloc in list(self.state.allocations.values()):
            if alloc.status == "stopping":
                self.walk(alloc.id, "stopped")
        assert not self.do(c.FinishDeploy(deploy))
        return deploy


def service(name: str = "web", **fields: object) -> ServiceSpec:
    return ServiceSpec(**{  # type: ignore[arg-type]  # the test names the fields
        "name": name, "image": f"registry/{name}:v1", "port": 80,
        "health": Health(kind="tcp"), **fields,
    })


def cluster(nodes: int = 3) -> Machine:
    """A founded cluster."""
    machine = Machine()
    assert not machine.do(c.InitCluster("test", "root", "0" * 64))
    for number in range(1, nodes + 1):
        machine.node(number)
    return machine
