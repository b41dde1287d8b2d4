"""What is live and should run, runs: crashes, loops, and deploys in the middle of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from reconciler.executor import heal
from reconciler.executor.agent.orders import AllocReport, Probe, Start
from reconciler.executor.agent.supervise import StartFailed, Supervisor
from reconciler.executor.links import Link
from reconciler.fsm import commands as c
from reconciler.fsm.records import Allocation
from reconciler.fsm.state import State
from tests.executor.world import MemoryRuntime, SteppedClock, World, service, world

QUICK = (0.05, 0.05, 0.05, 0.05)


async def _until(w: World, holds: Callable[[State], bool]) -> State:
    async with asyncio.timeout(45):
        return await w.ledger.until(holds)


async def test_a_crash_loop_is_counted_and_gets_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heal, "BACKOFF_S", QUICK)
    async with world(tmp_path) as w:
        await w.ended(await w.deploy(service("web")))
        (alloc, node), = w.containers().items()
        w.nodes[node].runtime.doomed["web"] = 2
        w.nodes[node].runtime.broken["start"] = [
            StartFailed("no space left on device", node_fault=True) for _ in range(2)]
        w.nodes[node].runtime.kill(alloc)
        state = await _until(w, lambda s: s.allocations[alloc].restarts >= 5
                             and s.allocations[alloc].status == "healthy")
        assert state.allocations[alloc].restarts == 5


async def test_a_service_that_cannot_start_again_keeps_no_other_from_healing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heal, "BACKOFF_S", QUICK)
    async with world(tmp_path, 1) as w:
        await w.ended(await w.deploy(service("api"), service("web")))
        runtime = w.nodes["node-1"].runtime
        api, web = sorted(w.containers())
        runtime.doomed["api"] = 1_000_000
        runtime.kill(api)
        await _until(w, lambda s: s.allocations[api].restarts >= 3)
        runtime.kill(web)
        state = await _until(w, lambda s: s.allocations[web].restarts == 1
                             and s.allocations[web].status == "healthy")
        assert state.allocations[api].restarts >= 3


async def test_what_is_healed_while_an_update_runs_is_retired_by_its_commit(
    tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        await w.ended(await w.deploy(service("web", replicas=2)))
        for node in w.nodes.values():
            node.runtime.held.add("api")
        deploy = await w.deploy(service("web", replicas=2, user="7"), service("api"))
        await w.ledger.propose(c.SetNodeStatus("node-2", "down", "pulled the plug"))
        state = await _until(w, lambda s: len([
            a for a in s.allocations.values() if a.live and a.status == "healthy"]) == 2)
        healed = [a for a in state.allocations.values() if a.live and not a.deploy]
        assert healed
        for node in w.nodes.values():
            node.runtime.held.clear()
        assert (await w.ended(deploy)).outcome == "deployed"
        state = await _until(w, lambda s: s.allocations[healed[0].id].status == "stopped")
        assert {a.revision for a in state.of_service("web")} == {2}


def test_what_was_gone_and_is_told_of_again_is_not_gone() -> None:
    link = Link("node-1", "", SteppedClock(), lambda: None)
    link.hear(AllocReport(alloc="web-1", phase="absent"))
    assert link.gone == {"web-1"}
    link.hear(AllocReport(alloc="web-1", phase="running"))
    assert link.gone == set()


async def test_a_start_that_follows_a_stop_is_carried_out_after_it(tmp_path: Path) -> None:
    runtime = MemoryRuntime()
    order = Start(term=1, alloc="web-1", service="web", image="r/web:ok", digest="sha256:1",
                  address="10.77.1.9", probe=Probe(kind="running"))
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        supervisor = Supervisor(runtime, tmp_path, lambda _: None, lambda: 0.0)
        await supervisor.recover(group)
        supervisor.start(order)
        while not runtime.running:
            await asyncio.sleep(0)
        supervisor.stop("web-1", kill=False)
        while runtime.running:
            await asyncio.sleep(0)
        supervisor.start(order)
        while not runtime.running:
            await asyncio.sleep(0)
        assert runtime.started == ["web-1", "web-1"]
        for task in supervisor.tasks():
            task.cancel()


def _ended(restarts: int, started_ms: int, healthy_ms: int) -> Allocation:
    return Allocation(
        id="web-000000", service="web", revision=1, slot=0, node="node-1", address="10.77.1.2",
        deploy="", image="r/web:ok", digest="sha256:1", port=80, cpu_milli=1, memory_bytes=1,
        restarts=restarts, started_ms=started_ms, healthy_ms=healthy_ms)


def test_restarts_wait_longer_each_time_up_to_a_minute() -> None:
    waits = [heal.backoff_s(_ended(n, 1_000, 900), 2_000) for n in range(6)]
    assert waits == [1.0, 5.0, 30.0, 60.0, 60.0, 60.0]


def test_what_served_for_long_is_started_again_at_once() -> None:
    steady = _ended(9, started_ms=1_000, healthy_ms=2_000)
    assert heal.backoff_s(steady, 2_000 + heal.STEADY_MS) == 1.0
    assert heal.backoff_s(steady, 1_999 + heal.STEADY_MS) == 60.0
    never_healthy_since = _ended(9, started_ms=3_000, healthy_ms=2_000)
    assert heal.backoff_s(never_healthy_since, 2_000 + heal.STEADY_MS) == 60.0
