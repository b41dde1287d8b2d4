"""A node is emptied: what is on it serves elsewhere before it leaves the routes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from reconciler.edge.table import edge_table
from reconciler.errors import NotFound, Unavailable
from reconciler.executor import drain, drains, heal, leader, links
from reconciler.executor.drains import Nodes
from reconciler.executor.ledger import CommandRefused, StateMachine
from reconciler.executor.requests import DrainStep
from reconciler.fsm import commands as c
from reconciler.fsm.records import ENDED, Allocation
from reconciler.fsm.state import State
from reconciler.language.spec import Health, ServiceSpec
from tests.executor.world import World, world
from tests.executor.world import service as quick_service

PLENTY_MS = 120_000


@pytest.fixture(autouse=True)
def _nobody_else_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log of these worlds is led by node-1 until a test says otherwise: nothing to wait for."""
    monkeypatch.setattr(drain, "HAND_OVER_AGAIN_S", 0.02)
    monkeypatch.setattr(drains, "LEADER_S", 0.3)


def service(name: str, tag: str = "ok", **changes: object) -> ServiceSpec:
    """One that has all the time it needs: the machine may be busy."""
    return quick_service(name, tag, **{"health": Health(
        kind="command", command=("check",), interval_ms=100, deadline_ms=100_000), **changes})


async def until(w: World, holds: Callable[[State], bool]) -> State:
    async with asyncio.timeout(60):
        return await w.ledger.until(holds)


async def drained(w: World, name: str, timeout_ms: int = PLENTY_MS) -> list[DrainStep]:
    return [step async for step in Nodes(w.ledger).drain(name, timeout_ms)]


async def standing(w: World) -> None:
    ended = await w.ended(await w.deploy(
        service("web", replicas=3), service("api", replicas=2), service("db")))
    assert ended.outcome == "deployed"


def live(state: State, name: str) -> list[Allocation]:
    return [a for a in state.of_service(name) if a.live]


def hold(w: World, name: str, *nodes: str) -> None:
    """On these nodes the service passes no probe."""
    for node in nodes:
        w.nodes[node].runtime.held.add(name)


def served(w: World, since: int) -> dict[str, int]:
    """The fewest endpoints that each service's traffic ever had, after every single entry."""
    machine, fewest = StateMachine(), dict[str, int]()
    for index, entry in enumerate(w.replica.entries, 1):
        machine.apply(index, entry)
        if index >= since:
            for cluster in edge_table(machine.state).clusters:
                serving = sum(not e.draining for e in cluster.endpoints)
                known = fewest.get(cluster.service, serving)
                fewest[cluster.service] = min(serving, known)
    return fewest


async def quiet(w: World) -> None:
    """Nothing is on its way any more, and what runs is what is live, each slot once."""

    def settled(state: State) -> bool:
        slots = sorted((a.service, a.slot) for a in state.allocations.values() if a.live)
        wanted = [(name, slot) for name in sorted(state.services)
                  for slot in range(state.live_spec(name).replicas)]  # type: ignore[union-attr]  # it is live
        return slots == wanted and all(
            (a.live and a.status == "healthy") or a.status in ENDED
            for a in state.allocations.values())

    async with asyncio.timeout(60):
        await w.ledger.until(settled)
        while set(w.containers()) != {a.id for a in w.ledger.state.allocations.values() if a.live}:
            await asyncio.sleep(0.01)
    assert settled(w.ledger.state)


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


async def test_a_leader_that_dies_after_any_entry_of_a_drain_is_followed_by_one_that_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "REDIAL_S", 0.02)
    monkeypatch.setattr(leader, "RETRY_S", 0.02)
    entries = await _interrupted(tmp_path / "x", None)
    room = asyncio.Semaphore(6)

    async def one(after: int) -> None:
        async with room:
            try:
                await _interrupted(tmp_path / str(after), after)
            except (AssertionError, TimeoutError) as error:
                raise AssertionError(f"dead after {after} of {entries}: {error}") from error

    async with asyncio.TaskGroup() as group:
        for after in range(entries + 1):
            group.create_task(one(after))


async def _interrupted(folder: Path, after: int | None) -> int:
    """A drain, with another leader after so many of its entries; how many there were."""
    folder.mkdir()
    async with world(folder) as w:
        await w.ended(await w.deploy(service("web", replicas=2), service("api", replicas=2)))
        await w.ledger.propose(c.DrainNode("node-2"))
        base = len(w.replica.entries) - 1
        if after is not None:
            w.replica.stop_after = base + 1 + after
            async with asyncio.timeout(60):
                while w.replica.leading and list(w.ledger.state.of_node("node-2")):
                    await asyncio.sleep(0.005)
            await w.unlead()
            w.lead()
        await until(w, lambda s: not list(s.of_node("node-2")))
        entries = len(w.replica.entries) - base
        await quiet(w)
        assert served(w, base) == {"web": 2, "api": 2}
        assert len([a for a in w.ledger.state.allocations.values() if a.replaces]) == 2
        return entries


async def test_a_node_is_removed_once_it_is_empty(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await standing(w)
        nodes = Nodes(w.ledger)
        with pytest.raises(CommandRefused) as refused:
            await nodes.remove("node-3")
        assert "mill drain node-3" in refused.value.hint
        assert (await drained(w, "node-3"))[-1].phase == "done"
        await nodes.remove("node-3")
        assert set(w.ledger.state.nodes) == {"node-1", "node-2"}
        assert w.links is not None
        async with asyncio.timeout(30):
            while w.links.get("node-3") is not None:
                await asyncio.sleep(0.01)
        await quiet(w)
        for name in ("node-3", "nobody"):
            with pytest.raises(NotFound):
                await nodes.undrain(name)
        with pytest.raises(NotFound):
            await drained(w, "node-3")


async def test_the_last_node_is_not_removed(tmp_path: Path) -> None:
    async with world(tmp_path, 1) as w:
        with pytest.raises(CommandRefused):
            await Nodes(w.ledger).remove("node-1")


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
