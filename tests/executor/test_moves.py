"""Any history of drains, failures and deploys: what the leader moves never costs a service."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.executor.heal import free_node
from reconciler.executor.moves import draining, in_deploy, may_go, pairs, room_for, stranded
from reconciler.fsm import commands as c
from reconciler.fsm.records import ENDED, Failure
from reconciler.plan.place import Demand, kept, standing
from tests.fsm.machine import Machine, cluster, service

NODES = tuple(f"node-{n}" for n in range(1, 5))
ONWARD = {"pending": "starting", "starting": "running", "running": "healthy",
          "stopping": "stopped"}


@dataclass
class Story:
    """A state machine, what happens to it, and the leader's decisions over it."""

    machine: Machine
    ids: itertools.count[int] = field(default_factory=itertools.count)

    def serving(self) -> dict[str, int]:
        state = self.machine.state
        return {name: sum(a.live and a.status == "healthy" for a in state.of_service(name))
                for name in state.services}

    def happens(self, what: str, number: int) -> None:
        """One thing from outside: a person, a node, a probe, a deploy's next step."""
        state, node = self.machine.state, NODES[number % len(NODES)]
        allocs = [a for a in state.allocations.values() if a.status not in ENDED]
        match what:
            case "drain":
                self.machine.do(c.DrainNode(node))
            case "undrain":
                self.machine.do(c.UndrainNode(node))
            case "down" | "ready":
                self.machine.do(c.SetNodeStatus(node, what))  # type: ignore[arg-type]  # one of two
            case "onward" | "sick" if allocs:
                alloc = allocs[number % len(allocs)]
                to = "running" if what == "sick" else ONWARD.get(alloc.status, "")
                self.machine.do(c.SetAllocStatus(alloc=alloc.id, status=to, was=alloc.status))  # type: ignore[arg-type]  # a state's name
            case "deploy":
                self.deploy(number)
            case _:
                pass

    def deploy(self, number: int) -> None:
        """Begin one, or bring the one that runs to its end."""
        state = self.machine.state
        deploy = state.running_deploy()
        if deploy is None:
            name = ("web", "api")[number % 2]
            started = self.machine.start(service(name, replicas=1 + number % 3, user=str(number)),
                                         nodes=4)
            for slot, at in enumerate(self.machine.state.deploys[started].changes[0].slots):
                self.machine.do(c.ScheduleAlloc(alloc=f"{name}-{next(self.ids)}", service=name,
                                                node=at.node, slot=slot, deploy=started))
            return
        if deploy.outcome == "rolling_back":
            for alloc in state.of_deploy(deploy.id):
                self.machine.do(c.SetAllocStatus(alloc=alloc.id, status="stopped",
                                                 was="stopping"))
            self.machine.do(c.EndRollback(deploy.id, "rolled_back"))
        elif deploy.committed or not self.machine.do(c.CommitDeploy(deploy.id)):
            self.machine.do(c.RouteDeploy(deploy.id))
            self.machine.do(c.FinishDeploy(deploy.id))
        elif number % 3 == 0:
            self.machine.do(c.RollBackDeploy(deploy.id, Failure(reason="no")))

    def decide(self) -> int:
        """As the leader's loops do, once over; how much it changed. No decision may take away
        from what serves, but one that leaves the whole count."""
        began = self.machine.state.index
        for pair in pairs(self.machine.state):
            state = self.machine.state
            if pair.goes.service not in in_deploy(state) and (
                    pair.stays.status == "healthy" or may_go(state, pair, self.machine.now_ms)):
                self._checked(c.RetireAlloc(pair.goes.id, pair.stays.id, was=pair.goes.status))
        for alloc in stranded(self.machine.state):
            room = room_for(self.machine.state, alloc)
            if isinstance(room, str):
                self._checked(c.ScheduleAlloc(
                    alloc=f"{alloc.service}-{next(self.ids)}", service=alloc.service, node=room,
                    slot=alloc.slot, replaces=alloc.id,
                    revision=self.machine.state.services[alloc.service].live))
        self._heal()
        return self.machine.state.index - began

    def _checked(self, command: c.RetireAlloc | c.ScheduleAlloc) -> None:
        before = {name: set(slots) for name, slots in self.healthy_slots().items()}
        refused = self.machine.do(command)
        assert not refused, (command, refused)
        assert {name: set(slots) for name, slots in self.healthy_slots().items()} == before

    def healthy_slots(self) -> dict[str, list[int]]:
        state = self.machine.state
        return {name: sorted(a.slot for a in state.of_service(name)
                             if a.live and a.status == "healthy") for name in state.services}

    def _heal(self) -> None:
        for name in list(self.machine.state.services):
            state = self.machine.state
            spec, record = state.live_spec(name), state.services[name]
            revision = record.revision(record.live)
            if spec is None or revision is None:
                continue
            held = {a.slot for a in state.of_service(name) if a.live}
            for slot in sorted(set(range(spec.replicas)) - held):
                node = free_node(self.machine.state, name, spec.cpu_milli, spec.memory_bytes,
                                 revision.digest, set(NODES))
                if node is not None:
                    assert not self.machine.do(c.ScheduleAlloc(
                        alloc=f"{name}-{next(self.ids)}", service=name, node=node, slot=slot,
                        revision=revision.number))

    def calm(self) -> None:
        """Nothing more happens from outside: what runs becomes healthy, what stops has stopped."""
        for again in range(60):
            if self.machine.state.running_deploy() is not None:
                self.deploy(1 if again < 10 else 0)  # one that has no place is given up
            for alloc in list(self.machine.state.allocations.values()):
                if alloc.status in ONWARD:
                    self.machine.do(c.SetAllocStatus(
                        alloc=alloc.id, status=ONWARD[alloc.status], was=alloc.status))  # type: ignore[arg-type]  # a state's name
            changed = self.decide()
            moving = any(a.status in ONWARD for a in self.machine.state.allocations.values())
            if not changed and not moving and self.machine.state.running_deploy() is None:
                return
        raise AssertionError("it never becomes quiet")


HAPPENINGS = st.lists(st.tuples(
    st.sampled_from(["drain", "undrain", "down", "ready", "onward", "onward", "onward", "sick",
                     "deploy", "decide", "decide"]), st.integers(0, 40)), max_size=60)


@settings(max_examples=150)
@given(HAPPENINGS)
def test_a_move_takes_nothing_away_and_every_history_ends_with_each_replica_once(
    happenings: list[tuple[str, int]]
) -> None:
    story = Story(cluster(4))
    for name, replicas in (("web", 3), ("api", 1)):
        story.machine.deploy(service(name, replicas=replicas), nodes=4)
    for what, number in happenings:
        if what == "decide":
            story.decide()
        else:
            story.happens(what, number)
    story.machine.do(c.UndrainNode("node-1"))  # so that there is room somewhere
    story.machine.do(c.SetNodeStatus("node-1", "ready"))
    story.calm()
    state = story.machine.state
    for name in state.services:
        spec = state.live_spec(name)
        assert spec is not None
        assert story.healthy_slots()[name] == list(range(spec.replicas))
    left = {a.node for a in state.allocations.values() if a.status not in ENDED}
    assert not left & draining(state)


@pytest.mark.parametrize("new", ["web-0", "web-x"])
def test_a_deploy_in_the_middle_of_a_move_keeps_what_serves(new: str) -> None:
    """Of the two in the slot, whichever has the smaller id."""
    machine = cluster(2)
    machine.deploy(service("web"))
    (old,) = machine.state.of_service("web")
    assert not machine.do(c.DrainNode("node-1"))
    assert not machine.do(c.ScheduleAlloc(alloc=new, service="web", node="node-2", slot=0,
                                          revision=1, replaces=old.id))

    def chosen() -> str:
        there = standing(machine.state.of_service("web"), machine.state.nodes)
        (stays,) = kept(Demand("web", 1, 1, replicas=1, standing=there))
        return stays.alloc

    assert chosen() == old.id
    machine.walk(new, "starting", "running")
    assert chosen() == old.id
    machine.walk(new, "healthy")
    assert chosen() == new
