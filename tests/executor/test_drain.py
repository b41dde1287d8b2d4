"""A node is emptied: what is on it serves elsewhere before it leaves the routes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from reconciler.errors import Unavailable
from reconciler.executor import drain, drains, heal
from reconciler.executor.drains import Nodes
from reconciler.executor.ledger import CommandRefused, StateMachine
from reconciler.executor.requests import DrainStep
from reconciler.fsm import commands as c
from tests.executor.drained import (
    PLENTY_MS,
    drained,
    hold,
    live,
    quiet,
    served,
    service,
    standing,
    until,
)
from tests.executor.world import service as quick_service
from tests.executor.world import world


@pytest.fixture(autouse=True)
def _nobody_else_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of these worlds is led by node-1 until a test says otherwise: nothing to wait for."""
    monkeypatch.setattr(drain, "HAND_OVER_AGAIN_S", 0.02)
    monkeypatch.setattr(drains, "LEADER_S", 0.3)


async def test_a_drain_empties_the_node_and_no_service_ever_has_less(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await standing(w)
        before = len(w.replica.entries)
        was = {a.id for a in w.ledger.state.of_node("node-1")}
        untouched = {a for a, node in w.containers().items() if node != "node-1"}
        steps = await drained(w, "node-1")
        assert list(w.ledger.state.of_node("node-1")) == []
        await quiet(w)
        assert "node-1" not in w.containers().values()
        assert served(w, before) == {"web": 3, "api": 2, "db": 1}
        assert untouched <= set(w.containers())
        assert steps[0] == DrainStep(phase="draining", node="node-1", left=3)
        assert steps[-1].phase == "done"
        assert [s.left for s in steps if s.phase == "moved"][-1] == 0
        for alloc in was:
            phases = [s.phase for s in steps if s.alloc == alloc]
            assert phases == ["moving", "moved"], steps
        assert w.ledger.state.nodes["node-1"].status == "draining"


async def test_nothing_new_comes_to_a_draining_node_until_it_is_taken_back(
    tmp_path: Path
) -> None:
    async with world(tmp_path, 2) as w:
        steps = await drained(w, "node-2")
        assert [s.phase for s in steps] == ["draining", "done"]
        ended = await w.ended(await w.deploy(service("web", replicas=2)))
        assert ended.outcome == "deployed"
        assert set(w.containers().values()) == {"node-1"}
        await Nodes(w.ledger).undrain("node-2")
        await w.ended(await w.deploy(service("api", replicas=2)))
        assert set(w.containers().values()) == {"node-1", "node-2"}


async def test_a_drain_of_many_replicas_on_one_node_moves_one_after_the_other(
    tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        for name in ("node-2", "node-3"):
            await w.ledger.propose(c.DrainNode(name))
        await w.ended(await w.deploy(service("web", replicas=4)))
        assert set(w.containers().values()) == {"node-1"}
        for name in ("node-2", "node-3"):
            await w.ledger.propose(c.UndrainNode(name))
        before = len(w.replica.entries)
        await drained(w, "node-1")
        await quiet(w)
        assert served(w, before) == {"web": 4}
        machine, most = StateMachine(), 0
        for index, entry in enumerate(w.replica.entries, 1):
            machine.apply(index, entry)
            most = max(most, len(live(machine.state, "web")))
        assert most == 5
        assert sorted(w.containers().values()) == ["node-2"] * 2 + ["node-3"] * 2


async def test_what_fits_nowhere_is_said_and_moves_as_soon_as_there_is_room(
    tmp_path: Path
) -> None:
    async with world(tmp_path, 2) as w:
        await w.ended(await w.deploy(service("web", replicas=2, cpu_milli=3_000)))
        nodes, steps = Nodes(w.ledger), list[DrainStep]()

        async def follow() -> None:
            async for step in nodes.drain("node-2", PLENTY_MS):
                steps.append(step)
                if step.phase == "warning":
                    await w.ledger.propose(c.RegisterNode(
                        name="node-1", number=1, api="127.0.0.1:1",
                        agent=w.nodes["node-1"].address, cpu_milli=8_000,
                        memory_bytes=4_000_000_000))

        async with asyncio.timeout(60):
            await follow()
        (warning,) = [s.reason for s in steps if s.phase == "warning"]
        assert warning.startswith("web: no other node has room for web-")
        assert "each needs 3 cores" in warning
        assert "nearest is node-1, which has 1 cores free" in warning
        assert [s.phase for s in steps] == ["draining", "warning", "moving", "moved", "done"]
        await quiet(w)


async def test_a_drain_that_is_not_over_in_time_fails_and_the_node_stays_draining(
    tmp_path: Path
) -> None:
    async with world(tmp_path, 1) as w:
        await w.ended(await w.deploy(service("web")))
        steps = await drained(w, "node-1", timeout_ms=300)
        assert [s.phase for s in steps] == ["draining", "warning", "failed"]
        assert "no node is ready" in steps[1].reason
        assert "1 allocations are still there" in steps[-1].reason
        assert w.ledger.state.nodes["node-1"].status == "draining"
        assert len(w.containers()) == 1
        again = await drained(w, "node-1", timeout_ms=300)
        assert again[-1].phase == "failed", "a drain that goes on can be followed again"


async def test_the_old_one_serves_until_its_replacement_does(tmp_path: Path) -> None:
    async with world(tmp_path, 2) as w:
        await w.ended(await w.deploy(service("web")))
        hold(w, "web", "node-2")
        following = asyncio.create_task(drained(w, "node-1"))
        await until(w, lambda s: any(a.status == "running" for a in live(s, "web")))
        (old,) = [a for a in live(w.ledger.state, "web") if a.node == "node-1"]
        assert old.status == "healthy"
        w.nodes["node-2"].runtime.held.clear()
        assert (await following)[-1].phase == "done"
        await quiet(w)


async def test_undraining_in_the_middle_leaves_each_replica_once(tmp_path: Path) -> None:
    async with world(tmp_path, 2) as w:
        await w.ended(await w.deploy(service("web")))
        before = set(w.containers())
        hold(w, "web", "node-2")
        following = asyncio.create_task(drained(w, "node-1"))
        await until(w, lambda s: any(a.status == "running" for a in live(s, "web")))
        await Nodes(w.ledger).undrain("node-1")
        steps = await following
        assert steps[-1].phase == "failed"
        assert "called off" in steps[-1].reason
        await quiet(w)
        assert set(w.containers()) == before


async def test_a_replacement_that_serves_when_the_drain_is_called_off_is_one_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(tmp_path, 2) as w:
        await w.ended(await w.deploy(service("web")))
        monkeypatch.setattr(drain.Drain, "_over", lambda *_: False)
        await w.ledger.propose(c.DrainNode("node-1"))
        await until(w, lambda s: len([a for a in live(s, "web") if a.status == "healthy"]) == 2)
        monkeypatch.undo()
        await w.ledger.propose(c.UndrainNode("node-1"))
        await quiet(w)
        assert set(w.containers().values()) == {"node-1"}


async def test_a_deploy_in_flight_goes_on_and_is_moved_when_it_has_ended(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await standing(w)
        before = len(w.replica.entries)
        hold(w, "web", *w.nodes)
        deploy = await w.deploy(service("web", replicas=3, user="7"))
        await until(w, lambda s: len([
            a for a in s.of_deploy(deploy) if a.status == "running"]) == 3)
        following = asyncio.create_task(drained(w, "node-2"))
        state = await until(w, lambda s: not any(a.service == "api" for a in s.of_node("node-2")))
        assert {a.service for a in state.of_node("node-2")} == {"web"}
        for node in w.nodes.values():
            node.runtime.held.clear()
        assert (await w.ended(deploy)).outcome == "deployed"
        steps = await following
        assert steps[-1].phase == "done"
        assert f"web: moves once {deploy} has ended" in [s.reason for s in steps]
        await quiet(w)
        assert served(w, before)["web"] == 3
        assert "node-2" not in w.containers().values()


async def test_a_deploy_planned_before_the_drain_goes_elsewhere(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.ledger.propose(c.DrainNode("node-2"))
        deploy = await w.deploy(service("web", replicas=3))  # one slot of which is on node-2
        assert (await w.ended(deploy)).outcome == "deployed"
        assert "node-2" not in w.containers().values()


async def test_what_a_deploy_keeps_is_not_taken_from_under_it(tmp_path: Path) -> None:
    async with world(tmp_path, 2) as w:
        await w.ended(await w.deploy(service("web", replicas=2)))
        hold(w, "web", "node-1", "node-2")
        deploy = await w.deploy(service("web", replicas=3), scale=True)
        following = asyncio.create_task(drained(w, "node-2"))
        await until(w, lambda s: any(a.status == "running" for a in s.of_deploy(deploy)))
        for node in w.nodes.values():
            node.runtime.held.clear()
        assert (await w.ended(deploy)).outcome == "deployed"
        assert (await following)[-1].phase == "done"
        await quiet(w)
        assert set(w.containers().values()) == {"node-1"}


async def test_a_second_node_that_drains_meanwhile_is_left_again(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.ended(await w.deploy(service("web")))
        hold(w, "web", "node-2", "node-3")
        before = len(w.replica.entries)
        first = asyncio.create_task(drained(w, "node-1"))
        state = await until(w, lambda s: len(live(s, "web")) == 2)
        (target,) = [a.node for a in live(state, "web") if a.node != "node-1"]
        second = asyncio.create_task(drained(w, target))
        for node in w.nodes.values():
            node.runtime.held.clear()
        assert (await first)[-1].phase == (await second)[-1].phase == "done"
        await quiet(w)
        assert served(w, before) == {"web": 1}


async def test_a_sick_replica_keeps_no_node_from_being_emptied(tmp_path: Path) -> None:
    async with world(tmp_path, 2) as w:
        await w.ended(await w.deploy(quick_service("web")))
        hold(w, "web", "node-1", "node-2")
        await until(w, lambda s: all(a.status == "running" for a in live(s, "web")))
        assert (await drained(w, "node-1"))[-1].phase == "done"
        (alloc,) = live(w.ledger.state, "web")
        assert alloc.node == "node-2"


async def test_a_node_that_goes_down_as_it_drains_comes_back_draining(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heal, "DOWN_S", 1.0)
    async with world(tmp_path) as w:
        await standing(w)
        hold(w, "web", "node-1", "node-3")
        following = asyncio.create_task(drained(w, "node-2"))
        await until(w, lambda s: s.nodes["node-2"].draining)
        await w.nodes["node-2"].down()
        await until(w, lambda s: s.nodes["node-2"].status == "down")
        w.nodes["node-1"].runtime.held.clear()
        w.nodes["node-3"].runtime.held.clear()
        assert (await following)[-1].phase == "done"
        await w.nodes["node-2"].up()
        await until(w, lambda s: s.nodes["node-2"].status == "draining")
        await quiet(w)
        assert "node-2" not in w.containers().values()


async def test_leadership_leaves_first_and_the_next_leader_empties_the_node(
    tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        await standing(w)
        asked = asyncio.Event()

        async def transfer(to: str) -> None:
            w.replica.leading = False
            w.replica.node = to
            asked.set()

        w.transfer = transfer
        await w.unlead()
        w.lead()
        following = asyncio.create_task(drained(w, "node-1"))
        async with asyncio.timeout(30):
            await asked.wait()
        await w.unlead()
        assert not [a for a in w.ledger.state.allocations.values() if a.replaces]
        w.lead()
        steps = await following
        assert [s.node for s in steps if s.phase == "leader"] == [w.replica.node]
        assert w.replica.node != "node-1"
        assert steps[-1].phase == "done"
        await quiet(w)


async def test_a_leader_that_nobody_relieves_empties_its_node_all_the_same(
    tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        await standing(w)
        await w.ledger.propose(c.DrainNode("node-1"))
        await until(w, lambda s: not list(s.of_node("node-1")))
        await quiet(w)
        assert "node-1" not in w.containers().values()


async def test_a_move_whose_outcome_was_unknown_is_not_made_twice(tmp_path: Path) -> None:
    """As when the answer of the log is lost: the loop decides again, under another id."""
    async with world(tmp_path, 2) as w:
        await w.ended(await w.deploy(service("web")))
        hold(w, "web", "node-2")
        await w.ledger.propose(c.DrainNode("node-1"))
        state = await until(w, lambda s: len(live(s, "web")) == 2)
        old, new = sorted(live(state, "web"), key=lambda a: a.node)
        with pytest.raises(CommandRefused):
            await w.ledger.propose(c.ScheduleAlloc(
                alloc="web-again", service="web", node="node-2", slot=0, revision=1,
                replaces=old.id))
        with pytest.raises(CommandRefused, match="serves"):
            await w.ledger.propose(c.RetireAlloc(old.id, new.id, was="healthy"))
        w.nodes["node-2"].runtime.held.clear()
        await until(w, lambda s: s.allocations[old.id].status in ("stopping", "stopped"))
        with pytest.raises(CommandRefused):
            await w.ledger.propose(c.RetireAlloc(new.id, old.id, was="healthy"))
        await quiet(w)


async def test_a_drain_asked_of_a_node_that_does_not_lead_says_so(tmp_path: Path) -> None:
    async with world(tmp_path, 2) as w:
        w.replica.leading = False
        with pytest.raises(Unavailable):
            await drained(w, "node-2")
