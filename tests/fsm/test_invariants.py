"""Whatever is proposed, in whatever order: what must never be, is not.

Commands are drawn half from what the state would take next and half at random, stale ones and
nonsense included. After each one the whole state is looked at.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest

from reconciler.fsm import commands as c
from reconciler.fsm.codec import decode_state, encode_state
from reconciler.fsm.events import Note
from reconciler.fsm.records import (
    ENDED,
    Allocation,
    Change,
    Failure,
    Origin,
    SealedAuthority,
    SecretPin,
    Slot,
    Token,
)
from reconciler.fsm.state import State
from reconciler.language.spec import ServiceSpec, canonical, spec_hash
from reconciler.plan.place import Demand, images, place, reserved, standing
from tests.fsm.machine import Machine, cluster, service

NAMES = ("api", "db", "web")
STATUSES = ("pending", "pulling", "starting", "running", "healthy", "stopping", "stopped",
            "failed", "lost")
ONWARD = {"pending": "starting", "pulling": "starting", "starting": "running",
          "running": "healthy", "healthy": "running", "stopping": "stopped"}
MACHINES = ("m-a", "m-b", "m-c", "m-d")
STEPS = 400


class Storm:
    """A machine under random commands, and what was seen of it so far."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.machine = cluster()
        self.ended: dict[str, str] = {}
        self.ids = 0
        self.authority: SealedAuthority | None = None

    @property
    def state(self) -> State:
        return self.machine.state

    def step(self) -> str:
        command = self.random.choice((
            *[self.drive] * 12, self.deploy, self.schedule, self.move, self.move,
            self.forward, self.back, self.node, self.heal, self.secret, self.nonsense,
            self.member, self.token, self.away, self.away, self.away, self.retire, self.retire,
        ))()
        if command is None:
            return ""
        refused = self.machine.do(command)
        return f"{type(command).__name__}: {refused}"

    # -- what could come next --------------------------------------------------------------

    def deploy(self) -> c.AnyCommand | None:
        specs = [
            service(name, replicas=self.random.randrange(4), cpu_milli=self.random.choice(
                (250, 1_000, 2_000)), user=str(self.random.randrange(3)))
            for name in self.random.sample(NAMES, self.random.randrange(1, 4))
        ]
        for spec in specs:
            self.machine.do(c.StoreSpec(spec_hash(spec), 0, 1, canonical(spec)))
        demands = [self._demand(spec) for spec in specs]
        placed = place(demands, self.state.nodes.values(), reserved(self.state),
                       images(self.state))
        changes = [self._change(s, placed.slots[s.name]) for s in specs if s.name in placed.slots]
        gone = [n for n in self.state.services if n not in {s.name for s in specs}]
        if gone and self.random.random() < 0.3:
            changes.append(Change(service=gone[0], action="remove",
                                  from_revision=self.state.services[gone[0]].live))
        return c.StartDeploy(changes=tuple(changes), origin=Origin(), budget_ms=1,
                             key=self.random.choice(("", "", str(self.random.randrange(50)))))

    def _demand(self, spec: ServiceSpec) -> Demand:
        keeps = self.random.random() < 0.4
        allocs = list(self.state.of_service(spec.name))
        return Demand(
            service=spec.name, cpu_milli=spec.cpu_milli, memory_bytes=spec.memory_bytes,
            replicas=spec.replicas,
            standing=standing(allocs, self.state.nodes)
            if keeps and all(a.cpu_milli == spec.cpu_milli for a in allocs) else ())

    def _change(self, spec: ServiceSpec, slots: tuple[Slot, ...]) -> Change:
        known = self.state.services.get(spec.name)
        live = known.live if known else 0
        pins = tuple(SecretPin(s.name, s.versions[-1].version)
                     for s in self.state.secrets.values() if self.random.random() < 0.3)
        return Change(
            service=spec.name, action="update" if live else "create", spec_hash=spec_hash(spec),
            digest="sha256:" + spec_hash(spec), from_revision=live, secrets=pins,
            to_revision=(known.last_revision if known else 0) + 1, slots=slots)

    def drive(self) -> c.AnyCommand | None:
        """What the pipeline would do now."""
        deploy = self.state.running_deploy()
        if deploy is None:
            return self.deploy()
        if deploy.outcome == "rolling_back":
            return self._moved("stopping") or c.EndRollback(
                deploy.id, "cancelled" if deploy.failure and deploy.failure.cancelled
                else "rolled_back")
        if deploy.committed:
            return (self._moved("stopping") if deploy.routed else c.RouteDeploy(deploy.id)) \
                or c.FinishDeploy(deploy.id)
        return self.schedule() or self._moved("pending", "starting", "running", deploy=deploy.id) \
            or self.random.choice((c.CommitDeploy(deploy.id), c.CommitDeploy(deploy.id),
                                   c.FinishDeploy(deploy.id),
                                   c.RollBackDeploy(deploy.id, Failure(reason="no"))))

    def _moved(self, *statuses: str, deploy: str = "") -> c.AnyCommand | None:
        some = sorted(a.id for a in self.state.allocations.values()
                      if a.status in statuses and deploy in ("", a.deploy))
        if not some:
            return None
        alloc = self.state.allocations[self.random.choice(some)]
        return c.SetAllocStatus(alloc=alloc.id, status=ONWARD[alloc.status], was=alloc.status)  # type: ignore[arg-type]  # a state's name

    def schedule(self) -> c.AnyCommand | None:
        deploy = self.state.running_deploy()
        wanted = [
            (change.service, number, slot.node)
            for change in (deploy.changes if deploy else ())
            for number, slot in enumerate(change.slots) if not slot.keep
        ]
        if deploy is None or not wanted:
            return None
        tried = {(a.service, a.slot) for a in self.state.of_deploy(deploy.id)}
        wanted = [w for w in wanted if w[:2] not in tried]
        if not wanted:
            return None
        name, number, node = self.random.choice(wanted)
        return c.ScheduleAlloc(alloc=self._id(name), service=name, node=node, slot=number,
                               deploy=deploy.id)

    def move(self) -> c.AnyCommand | None:
        alloc = self._alloc()
        if alloc is None:
            return None
        was = self.state.allocations[alloc].status
        return c.SetAllocStatus(alloc=alloc, status=ONWARD.get(was, "lost"), was=was)  # type: ignore[arg-type]  # a state's name

    def forward(self) -> c.AnyCommand | None:
        deploy = self.state.active_deploy or "d-0"
        return self.random.choice((
            c.BeginPulls(deploy), c.FinishPulls(deploy), c.CommitDeploy(deploy),
            c.CommitDeploy(deploy), c.RouteDeploy(deploy), c.FinishDeploy(deploy),
            c.FinishDeploy(deploy), c.PassService(deploy, self.random.choice(NAMES), 1),
            c.RecordPull(deploy, "image", "node-1", cached=False), c.WarnDeploy(deploy, "so"),
        ))

    def back(self) -> c.AnyCommand | None:
        deploy = self.state.active_deploy or "d-0"
        if self.random.random() < 0.8:
            return c.EndRollback(deploy, "rolled_back")
        return c.RollBackDeploy(deploy, Failure(reason="so", cancelled=self.random.random() < 0.5))

    def node(self) -> c.AnyCommand | None:
        name = self.random.choice(sorted(self.state.nodes))
        down = self.random.random() < 0.1
        return c.SetNodeStatus(name, "down" if down else "ready")

    def member(self) -> c.AnyCommand | None:
        """Machines come with four keys and names, drain, and leave; at most four at a time, so
        that deploys find room."""
        name = self.random.choice(MACHINES)
        known = self.random.choice(sorted(self.state.nodes))
        return self.random.choice((
            c.JoinNode(
                token=self.random.choice([*self.state.tokens, "t-none"]),
                key_sha256=self.random.choice((name, name, *MACHINES))[-1] * 64, name=name,
                api=f"{name}:4400", agent=f"{name}:4402", log=f"{name}:4401",
                cpu_milli=4_000, memory_bytes=8_000_000_000),
            c.DrainNode(known) if self.random.random() < 0.5 else c.UndrainNode(known),
            c.UndrainNode(known),
            c.RemoveNode(name if self.random.random() < 0.7 else known)
            if len(self.state.nodes) > 2 else c.UndrainNode(known),
        ))

    def away(self) -> c.AnyCommand | None:
        """What stands on a draining node is replaced elsewhere, where there is room."""
        stranded = [a for a in self.state.allocations.values()
                    if a.live and a.status not in ENDED and self.state.nodes[a.node].draining]
        if not stranded:
            return None
        old = self.random.choice(sorted(stranded, key=lambda alloc: alloc.id))
        demand = Demand(service=old.service, cpu_milli=old.cpu_milli,
                        memory_bytes=old.memory_bytes, replicas=1, standing=())
        slots = place([demand], self.state.nodes.values(), reserved(self.state),
                      images(self.state)).slots.get(old.service, ())
        if not slots:
            return None
        return c.ScheduleAlloc(alloc=self._id(old.service), service=old.service,
                               node=slots[0].node, slot=old.slot, replaces=old.id)

    def retire(self) -> c.AnyCommand | None:
        """One of two in a slot, half of the time as the one that drains would: any other pair too,
        which is never to be taken."""
        allocs = [a for a in self.state.allocations.values() if a.live]
        pairs = [(self.state.allocations[a.replaces], a) for a in allocs
                 if a.replaces in self.state.allocations]
        if self.random.random() < 0.2 and allocs:
            pairs = [(self.random.choice(allocs), self.random.choice(allocs))]
        if not pairs:
            return None
        goes, stays = self.random.choice(pairs)
        return c.RetireAlloc(goes.id, stays.id, was=goes.status)

    def token(self) -> c.AnyCommand | None:
        self.ids += 1
        some = self.random.choice([*self.state.tokens, "t-none"])
        return self.random.choice((
            c.CreateToken(Token(
                id=f"t-{self.ids}", sha256=f"{self.ids:064x}", role="join",
                uses=self.random.randrange(4),
                expires_ms=self.machine.now_ms + self.random.randrange(60_000))),
            c.CreateToken(Token(
                id=f"t-{self.ids}", sha256=f"{self.random.randrange(9):064x}",
                role=self.random.choice(("admin", "deploy", "read")))),
            c.RevokeToken(some), c.SetAuthority(SealedAuthority(b"c", b"n", some.encode())),
        ))

    def heal(self) -> c.AnyCommand | None:
        """As the heal loop does, at times on the state of a while ago."""
        name = self.random.choice(NAMES)
        spec = self.state.live_spec(name)
        if spec is None:
            return None
        live = self.state.services[name].live
        seen, replicas = (live, spec.replicas) if self.random.random() < 0.7 else (live - 1, 4)
        if not seen or not replicas:
            return None
        there = standing(self.state.of_service(name), self.state.nodes)
        placed = place(
            [Demand(service=name, cpu_milli=spec.cpu_milli, memory_bytes=spec.memory_bytes,
                    replicas=len(there) + 1, standing=there)],
            self.state.nodes.values(), reserved(self.state), images(self.state))
        node = next((s.node for s in placed.slots.get(name, ()) if not s.keep), None)
        if node is None:
            return None
        return c.ScheduleAlloc(alloc=self._id(name), service=name, node=node,
                               slot=self.random.randrange(max(1, replicas)), revision=seen)

    def secret(self) -> c.AnyCommand | None:
        name = self.random.choice(("a", "b"))
        return c.DeleteSecret(name) if self.random.random() < 0.3 \
            else c.SetSecret(name, b"n" * 12, b"sealed")

    def nonsense(self) -> c.AnyCommand | None:
        """What no honest leader proposes, and a deposed one might. It never schedules: where
        things go is the plan's word, which nothing here may exceed."""
        some = self.random.choice([*self.state.deploys, "d-0", ""])
        return self.random.choice((
            c.SetAllocStatus(alloc=self._alloc() or "x", status=self.random.choice(STATUSES),  # type: ignore[arg-type]  # a state's name
                             was=self.random.choice(STATUSES),  # type: ignore[arg-type]  # as above
                             restarts=self.random.choice((None, 0, 1, 2))),
            c.CommitDeploy(some), c.FinishDeploy(some), c.EndRollback(some, "cancelled"),
            c.RollBackDeploy(some, Failure(reason="late")), c.RouteDeploy(some),
            c.ScheduleAlloc(alloc=self._id("x"), service="x", node="node-9", slot=0),
            c.StoreSpec("f" * 64, 1, 2, b"junk"),
            c.Trim(self.random.choice((0, self.machine.now_ms))),
        ))

    def _alloc(self) -> str | None:
        return self.random.choice(sorted(self.state.allocations)) \
            if self.state.allocations else None

    def _id(self, name: str) -> str:
        self.ids += 1
        return f"{name}-{self.ids:06d}"

    # -- what must hold --------------------------------------------------------------------

    def check(self) -> None:
        one_deploy_at_most(self.state)
        room_is_never_exceeded(self.state)
        live_ones_fill_committed_slots(self.state)
        addresses_differ(self.state)
        streams_end_once(self.state)
        what_is_needed_is_kept(self.state)
        nodes_are_told_apart(self.state)
        tokens_hold_what_they_promise(self.state)
        if self.state.authority is not None:
            assert self.authority in (None, self.state.authority)
            self.authority = self.state.authority
        for alloc in self.state.allocations.values():
            assert self.ended.get(alloc.id, alloc.status) == alloc.status, "it was revived"
            if alloc.status in ENDED:
                self.ended[alloc.id] = alloc.status
                assert not alloc.live
                assert not alloc.routed


def one_deploy_at_most(state: State) -> None:
    assert [d.id for d in state.deploys.values() if not d.finished] == (
        [state.active_deploy] if state.active_deploy else [])


def room_is_never_exceeded(state: State) -> None:
    for name, held in reserved(state).items():
        assert held.cpu_milli <= state.nodes[name].cpu_milli, name
        assert held.memory_bytes <= state.nodes[name].memory_bytes, name


def live_ones_fill_committed_slots(state: State) -> None:
    """One a slot, or two while the one is moving to where the other is."""
    slots: dict[tuple[str, int], list[Allocation]] = defaultdict(list)
    for alloc in state.allocations.values():
        if alloc.live:
            spec = state.live_spec(alloc.service)
            assert spec is not None, alloc
            assert alloc.slot < spec.replicas, alloc
            slots[alloc.service, alloc.slot].append(alloc)
    for allocs in slots.values():
        assert len(allocs) == 1 or [a.replaces in {b.id for b in allocs} for a in allocs].count(
            True) == len(allocs) - 1 == 1, allocs


def addresses_differ(state: State) -> None:
    used: dict[str, str] = defaultdict(str)
    for alloc in state.allocations.values():
        if alloc.status not in ENDED:
            assert not used[alloc.address], (alloc.id, used[alloc.address])
            used[alloc.address] = alloc.id


def streams_end_once(state: State) -> None:
    ids = [event.index for event in state.events_after(0)]
    assert ids == sorted(set(ids))
    for deploy, stream in state.deploy_events.items():
        ends = [n for n, event in enumerate(stream) if event.kind != "progress"]
        assert ends in ([], [len(stream) - 1])
        assert bool(ends) == state.deploys[deploy].finished


def what_is_needed_is_kept(state: State) -> None:
    for record in state.services.values():
        for revision in record.revisions:
            assert revision.spec_hash in state.specs
    deploy = state.running_deploy()
    for change in deploy.changes if deploy else ():
        assert change.action == "remove" or change.spec_hash in state.specs
    for alloc in state.allocations.values():
        if alloc.live or (alloc.status not in ENDED and alloc.status != "stopping"):
            assert state.spec_for(alloc) is not None, alloc
            live = state.services[alloc.service].revision(alloc.revision)
            for pin in live.secrets if live and alloc.live else ():
                assert any(v.version == pin.version for v in state.secrets[pin.name].versions)


def nodes_are_told_apart(state: State) -> None:
    """By number, key and address; each allocation that has not ended stands on one of them."""
    nodes = list(state.nodes.values())
    assert nodes, "the last node is never removed"
    for values in ([n.number for n in nodes], [n.api for n in nodes], [n.agent for n in nodes],
                   [n.key_sha256 for n in nodes if n.key_sha256]):
        assert len(set(values)) == len(values), values
    for node in nodes:
        assert 1 <= node.number <= 253
        assert node.status in (("draining", "down") if node.draining else ("ready", "down")), node
    for alloc in state.allocations.values():
        assert alloc.status in ENDED or state.nodes[alloc.node].status != "down", alloc


def tokens_hold_what_they_promise(state: State) -> None:
    tokens = list(state.tokens.values())
    assert any(t.role == "admin" and not t.expires_ms for t in tokens)
    assert len({t.sha256 for t in tokens}) == len(tokens)
    for token in tokens:
        assert len(token.joined) <= token.uses


@pytest.mark.parametrize("seed", range(25))
def test_nothing_that_must_never_be_is_reached_by_any_commands(seed: int) -> None:
    storm = Storm(seed)
    outcomes: Counter[str] = Counter()
    for number in range(STEPS):
        said = storm.step()
        try:
            storm.check()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, step {number}, after {said}: {error}") from error
        if number % 20 == 0:
            assert decode_state(encode_state(storm.state)) == storm.state
    outcomes.update(d.outcome for d in storm.state.deploys.values())
    assert sum(outcomes.values()) > 2, "the storm does not get anywhere"


def test_the_storm_reaches_every_outcome() -> None:
    outcomes: set[str] = set()
    for seed in range(40):
        storm = Storm(seed)
        for _ in range(STEPS):
            storm.step()
        outcomes |= {d.outcome for d in storm.state.deploys.values()}
    assert {"deployed", "rolled_back", "cancelled"} <= outcomes


def test_the_storm_lets_machines_in_and_out() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(25):
        storm = Storm(seed)
        for _ in range(STEPS):
            storm.step()
        kinds.update(e.data.kind for e in storm.state.events_after(0) if isinstance(e.data, Note))
    for kind in ("node_joined", "node_removed", "node_draining", "node_undrained",
                 "token_created", "token_revoked", "moved"):
        assert kinds[kind] >= 3, kinds


def test_a_machine_is_a_pure_function_of_its_commands() -> None:
    assert encode_state(_after(7)) == encode_state(_after(7))


def _after(seed: int) -> State:
    storm = Storm(seed)
    for _ in range(STEPS):
        storm.step()
    machine: Machine = storm.machine
    return machine.state
