"""Nodes that fall, come back, stumble or lie about the time, in the middle of a deploy."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from reconciler.executor import heal, pulling
from reconciler.executor.agent import server
from reconciler.executor.agent.orders import Hello
from reconciler.fsm import commands as c
from reconciler.fsm.records import Allocation, Failure
from reconciler.fsm.state import State
from reconciler.language.spec import Health, ServiceSpec
from tests.executor.world import World, service, world


async def _until(w: World, holds: Callable[[State], bool]) -> State:
    async with asyncio.timeout(45):
        return await w.ledger.until(holds)


def _of(state: State, name: str) -> list[Allocation]:
    return [a for a in state.allocations.values() if a.service == name]


def _hold(w: World, *names: str) -> None:
    """These services pass no probe, until they are let go."""
    for node in w.nodes.values():
        node.runtime.held |= set(names)


def _let_go(w: World, *names: str) -> None:
    for node in w.nodes.values():
        node.runtime.held -= set(names)


def _patient(name: str, tag: str = "ok", **changes: object) -> ServiceSpec:
    """A service with all the time in the world to become healthy."""
    return service(name, tag, health=Health(kind="command", command=("check",), interval_ms=100,
                                       deadline_ms=60_000), **changes)


async def test_a_replica_replaced_on_another_node_counts_once(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.nodes["node-2"].runtime.held.add("web")
        deploy = await w.deploy(_patient("web", replicas=2))
        await _until(w, lambda s: any(a.status == "healthy" for a in _of(s, "web")))
        await w.ledger.propose(c.SetNodeStatus("node-1", "down", "pulled the plug"))
        await _until(w, lambda s: any(a.status == "healthy" for a in _of(s, "web")))
        w.nodes["node-2"].runtime.held.clear()
        assert (await w.ended(deploy)).outcome == "deployed"


async def test_a_replica_lost_after_its_service_passed_is_waited_for_again(
    tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        _hold(w, "api")
        deploy = await w.deploy(_patient("web"), _patient("api", replicas=2))
        await _until(w, lambda s: "web" in s.deploys[deploy].healthy)
        _hold(w, "web")
        (first,) = _of(w.ledger.state, "web")
        await w.ledger.propose(c.SetNodeStatus(first.node, "down", "pulled the plug"))
        _let_go(w, "api")
        await _until(w, lambda s: "api" in s.deploys[deploy].healthy)
        _let_go(w, "web")
        assert (await w.ended(deploy)).outcome == "deployed"
        assert [a.status for a in _of(w.ledger.state, "web")] == ["lost", "healthy"]


async def test_a_container_gone_with_a_power_cut_proves_itself_again(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        _hold(w, "api")
        deploy = await w.deploy(_patient("web"), _patient("api"))
        await _until(w, lambda s: "web" in s.deploys[deploy].healthy)
        (web,) = _of(w.ledger.state, "web")
        node = w.nodes[web.node]
        _hold(w, "web")
        await node.down()
        node.runtime.cut_power()
        await node.up()
        await _until(w, lambda s: s.allocations[web.id].status in ("starting", "running"))
        _let_go(w, "api", "web")
        assert (await w.ended(deploy)).outcome == "deployed"
        assert w.ledger.state.allocations[web.id].status == "healthy"
        assert node.runtime.started.count(web.id) == 2


async def test_an_agent_that_restarts_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        _hold(w, "api")
        deploy = await w.deploy(_patient("web", replicas=3), _patient("api", replicas=3))
        await _until(w, lambda s: "web" in s.deploys[deploy].healthy)
        for node in w.nodes.values():
            await node.down()
            await node.up()
        _let_go(w, "api")
        assert (await w.ended(deploy)).outcome == "deployed"
        assert all(len(n.runtime.started) == 2 for n in w.nodes.values())


async def test_a_deploy_onto_a_node_that_never_answers_goes_to_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heal, "DOWN_S", 1.0)
    async with world(tmp_path) as w:
        await w.nodes["node-2"].down()
        deploy = await w.deploy(service("web", replicas=3))
        assert (await w.ended(deploy)).outcome == "deployed"
        assert set(w.containers().values()) == {"node-1", "node-3"}


async def test_a_node_that_falls_silent_is_no_fault_of_the_version(tmp_path: Path) -> None:
    """Its health deadline passes before the node counts as down."""
    async with world(tmp_path) as w:
        w.nodes["node-1"].runtime.held.add("web")
        deploy = await w.deploy(service("web"))
        await _until(w, lambda s: any(a.status == "running" for a in _of(s, "web")))
        await w.nodes["node-1"].down()
        assert (await w.ended(deploy)).outcome == "deployed"
        assert [a.node for a in _of(w.ledger.state, "web") if a.live] != ["node-1"]


async def test_a_rollback_ends_though_a_node_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heal, "DOWN_S", 1.0)
    async with world(tmp_path) as w:
        _hold(w, "web")
        deploy = await w.deploy(_patient("web", replicas=3))
        await _until(w, lambda s: len([a for a in _of(s, "web") if a.status == "running"]) == 3)
        await w.nodes["node-2"].down()
        await w.ledger.propose(c.RollBackDeploy(deploy, Failure(reason="no", cancelled=True)))
        assert (await w.ended(deploy)).outcome == "cancelled"
        assert {a.status for a in _of(w.ledger.state, "web")} == {"stopped", "lost"}


async def test_retiring_ends_though_a_node_stays_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heal, "DOWN_S", 1.0)
    async with world(tmp_path) as w:
        await w.ended(await w.deploy(service("web", replicas=3)))
        await w.nodes["node-2"].down()
        deploy = await w.deploy(remove=("web",))
        assert (await w.ended(deploy)).outcome == "deployed"
        assert "node-2" not in {a.node for a in _of(w.ledger.state, "web")
                                if a.status == "stopped"}


async def test_a_wall_clock_that_jumps_takes_no_node_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "BEAT_S", 3.0)  # the leader looks several times in between
    async with world(tmp_path) as w:
        await w.ended(await w.deploy(service("web", replicas=3)))
        w.clock.step_ms = 3_600_000
        assert w.links is not None
        since = w.clock.wall_ms()
        async with asyncio.timeout(45):
            await w.links.until(lambda: all(k.last_seen_ms > since + 2_000 for k in w.links.all()))
        assert {n.status for n in w.ledger.state.nodes.values()} == {"ready"}
        assert not [e for e in w.ledger.state.events_after(0) if "node_down" in str(e.wire())]


async def test_a_draining_node_that_falls_silent_is_down_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heal, "DOWN_S", 1.0)
    async with world(tmp_path) as w:
        await w.ledger.propose(c.DrainNode("node-2"))
        await w.nodes["node-2"].down()
        state = await _until(w, lambda s: s.nodes["node-2"].status != "draining")
        assert state.nodes["node-2"].status == "down"


async def test_a_report_that_cannot_be_read_costs_one_session(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.ended(await w.deploy(service("web", replicas=3)))
        for node in w.nodes.values():
            assert node.server is not None
            node.server.tell(Hello(1, "no report"))  # type: ignore[arg-type]  # that is the point
        deploy = await w.deploy(service("api", replicas=3))
        assert (await w.ended(deploy)).outcome == "deployed"


@pytest.mark.parametrize("what", ["start", "wait", "tail", "stop"])
async def test_what_nobody_thought_of_in_one_container_leaves_the_node_alone(
    tmp_path: Path, what: str
) -> None:
    async with world(tmp_path, 1) as w:
        await w.ended(await w.deploy(service("web")))
        node = w.nodes["node-1"]
        started = list(node.runtime.started)
        node.runtime.broken[what] = [RuntimeError("nobody thought of this")]
        deploy = await w.deploy(service("api", "exits"))
        ended = await w.ended(deploy)
        assert ended.outcome == "rolled_back"
        assert (await w.ended(await w.deploy(service("db")))).outcome == "deployed"
        assert [a for a in node.runtime.started if a.startswith("web")] == started


async def test_a_pull_that_breaks_ends_the_deploy_and_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "PULL_BACKOFF_S", (0.0, 0.0, 0.0))
    async with world(tmp_path) as w:
        ended = await w.ended(await w.deploy(service("web", "explodes")), within_s=30)
        assert ended.outcome == "rolled_back"
        assert ended.failure is not None
        assert "nobody thought of this" in ended.failure.reason


async def test_a_node_that_cannot_write_an_order_down_is_left_for_another(
    tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        folder = w.nodes["node-1"].folder
        shutil.rmtree(folder)
        folder.write_text("where a folder should be")
        deploy = await w.deploy(service("web"))
        assert (await w.ended(deploy)).outcome == "deployed"
        assert "node-1" not in w.containers().values()


async def test_a_leader_that_is_deposed_leaves_no_task_behind(tmp_path: Path) -> None:
    before = asyncio.all_tasks()
    async with world(tmp_path) as w:
        deploy = await w.deploy(_patient("web", "sick", replicas=3))
        await _until(w, lambda s: any(a.status == "running" for a in _of(s, "web")))
        assert not w.ledger.state.deploys[deploy].finished
    left = [t for t in asyncio.all_tasks() - before if "Executor" not in repr(t)]
    assert left == []


async def test_a_node_that_goes_down_between_plan_and_schedule_is_passed_by(
    tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        await w.nodes["node-2"].down()
        await w.ledger.propose(c.SetNodeStatus("node-2", "down", "pulled the plug"))
        deploy = await w.deploy(service("web", replicas=3))
        assert (await w.ended(deploy)).outcome == "deployed"
        assert set(w.containers().values()) == {"node-1", "node-3"}
