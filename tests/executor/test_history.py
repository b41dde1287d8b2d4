"""Time travel through the real log: the state at an index is the state that was."""

from __future__ import annotations

from pathlib import Path

import pytest

from reconciler.clock import FakeClock
from reconciler.errors import NotFound
from reconciler.executor.history import MAX_STATES, History
from reconciler.executor.ledger import Ledger, StateMachine
from reconciler.fsm import commands as c
from reconciler.fsm.records import Change, Origin, Slot
from reconciler.fsm.state import State
from reconciler.language.spec import canonical, spec_hash
from reconciler.log.replica import Replica
from tests.fsm.machine import service
from tests.log.cluster import Cluster, until

SMALL = 16 << 10
"""A snapshot every few deploys."""


async def deploy(ledger: Ledger, number: int, states: dict[int, State]) -> None:
    """A whole deploy of one service, each state on the way remembered by its index."""
    spec = service("web", user=str(number))
    key = spec_hash(spec)

    async def done(command: c.AnyCommand) -> int:
        index = await ledger.propose(command)
        states[index] = ledger.state
        return index

    await done(c.StoreSpec(key, 0, 1, canonical(spec)))
    known = ledger.state.services.get("web")
    live, last = (known.live, known.last_revision) if known else (0, 0)
    change = Change(service="web", action="update" if live else "create", spec_hash=key,
                    digest="sha256:" + key, from_revision=live, to_revision=last + 1,
                    slots=(Slot("node-1"),))
    begun = await done(c.StartDeploy(changes=(change,), origin=Origin(), budget_ms=60_000))
    deploy_id, alloc = f"d-{begun}", f"web-{begun:06d}"
    await done(c.ScheduleAlloc(alloc=alloc, service="web", node="node-1", slot=0,
                               deploy=deploy_id))
    steps: tuple[tuple[str, str], ...] = (
        ("pending", "starting"), ("starting", "running"), ("running", "healthy"))
    for was, status in steps:
        await done(c.SetAllocStatus(alloc=alloc, status=status, was=was))  # type: ignore[arg-type]  # states' names
    await done(c.CommitDeploy(deploy_id))
    await done(c.RouteDeploy(deploy_id))
    for old in [a for a in ledger.state.allocations.values() if a.status == "stopping"]:
        await done(c.SetAllocStatus(alloc=old.id, status="stopped", was="stopping"))
    await done(c.FinishDeploy(deploy_id))
    await done(c.Trim(ledger.clock.wall_ms() - 60_000))


class Node:
    """One node with a real log and the real state machine."""

    def __init__(self, cluster: Cluster) -> None:
        self.clock, self.machine = FakeClock(), StateMachine()
        self.replica = Replica(cluster.settings("node-1"), self.machine)
        self.ledger = Ledger(self.replica, self.machine, self.clock)
        self.history = History(self.replica)

    async def up(self) -> None:
        await self.replica.start()
        await until(lambda: self.replica.is_leader, "it leads")


async def test_the_state_at_each_index_equals_the_state_then(tmp_path: Path) -> None:
    cluster, states = Cluster(tmp_path, 1, SMALL), dict[int, State]()
    node = Node(cluster)
    await node.up()
    try:
        await node.ledger.propose(c.InitCluster("test", "t", "0" * 64))
        await node.ledger.propose(c.RegisterNode(
            name="node-1", number=1, api="a:1", agent="a:2", cpu_milli=4000,
            memory_bytes=8_000_000_000))
        for number in range(30):
            node.clock.advance(10.0)
            await deploy(node.ledger, number, states)
        archived = list((tmp_path / "node-1" / "archive").glob("snapshot-*"))
        assert len(archived) >= 2
        for index in list(states)[::7]:
            assert await node.history.at(index) == states[index]
    finally:
        await node.replica.stop()
    again = Node(cluster)
    await again.up()
    try:
        for index in list(states)[::37]:
            assert await again.history.at(index) == states[index]
        # Asked for again, it is remembered; and no more of them than the bound.
        last = await again.history.at(index)
        assert await again.history.at(index) is last
        for other in list(states)[:MAX_STATES]:
            await again.history.at(other)
        assert await again.history.at(index) is not last
    finally:
        await again.replica.stop()


async def test_an_index_before_the_oldest_that_is_held_is_not_found(tmp_path: Path) -> None:
    cluster, states = Cluster(tmp_path, 1, SMALL), dict[int, State]()
    node = Node(cluster)
    await node.up()
    try:
        await node.ledger.propose(c.RegisterNode(
            name="node-1", number=1, api="a:1", agent="a:2", cpu_milli=4000,
            memory_bytes=8_000_000_000))
        for number in range(40):
            await deploy(node.ledger, number, states)
        folder = tmp_path / "node-1" / "archive"
        for path in folder.iterdir():
            path.unlink()
        with pytest.raises(NotFound, match="no longer held") as refused:
            await node.history.at(5)
        oldest = int(str(refused.value).rpartition(" ")[2])
        assert await node.history.at(oldest) == states[oldest]
    finally:
        await node.replica.stop()
