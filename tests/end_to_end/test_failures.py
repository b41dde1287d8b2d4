"""Nodes that die, leaders that die in the middle, and everything at once."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from reconciler.dev import Dev, Options
from reconciler.node_remains import processes_with
from tests.end_to_end.conftest import Cluster, eventually, running
from tests.end_to_end.seed import SEED, answering
from tests.ports import free_base

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]

PLAIN = SEED.replace("${secret(db.url)}", "x")


def pid_of(cluster: Cluster, node: str) -> int:
    (pid,) = processes_with(str(cluster.dev.data / node / "node.json"))
    return pid


async def _status(cluster: Cluster, asked: str) -> object:
    async with cluster.client(asked) as client:
        return await client.status()


async def _leader(cluster: Cluster, asked: str = "node-1") -> str:
    status = await _status(cluster, asked)
    return str(status.leader)  # type: ignore[attr-defined]  # a StatusAnswer


async def _healthy(cluster: Cluster, asked: str) -> dict[str, str]:
    """Healthy allocations and their nodes."""
    async with cluster.client(asked) as client:
        services = (await client.services()).services
    return {a.id: a.node for s in services for a in s.allocations if a.status == "healthy"}


async def test_a_killed_node_process_leaves_its_containers_and_comes_back_to_them(
    cluster: Cluster
) -> None:
    await cluster.deploy(PLAIN)
    before = await _healthy(cluster, "node-1")
    leader = await _leader(cluster)
    other = next(n for n in ("node-1", "node-2", "node-3") if n != leader)
    os.kill(pid_of(cluster, leader), signal.SIGKILL)
    assert len(await answering(cluster.http(leader))) == 2  # its Envoy and containers go on

    async def followed() -> bool:
        return await _leader(cluster, other) not in (leader, "None")

    await eventually(lambda: _safely(followed))
    assert set(await _healthy(cluster, other)) == set(before)
    assert any(leader in line and "signal 9" in line for line in cluster.said)
    await cluster.dev.start(leader)

    async def back() -> bool:
        status = await _status(cluster, leader)
        nodes = status.nodes  # type: ignore[attr-defined]  # a StatusAnswer
        return all(n.last_seen for n in nodes) and not status.warnings  # type: ignore[attr-defined]  # a StatusAnswer

    await eventually(lambda: _safely(back))
    assert await _healthy(cluster, other) == before
    seen = await cluster.deploy(PLAIN.replace("web:v1", "web:v2"))
    assert seen[-1][1].outcome == "deployed"  # type: ignore[attr-defined]  # a step


async def _safely(check: object) -> bool:
    from reconciler.errors import MillError
    try:
        return bool(await check())  # type: ignore[operator]  # a coroutine function
    except MillError:
        return False


@pytest.mark.parametrize("phase", ["scheduled", "starting", "healthy", "routed"])
async def test_a_leader_killed_in_mid_deploy_is_followed_by_one_that_ends_it(
    cluster: Cluster, phase: str
) -> None:
    await cluster.deploy(PLAIN)
    leader = await _leader(cluster)
    other = next(n for n in ("node-1", "node-2", "node-3") if n != leader)
    text = PLAIN.replace("web:v1", "web:v2").replace("REG", cluster.registry)
    killed, last = False, None
    async with cluster.client(other) as client:
        ids: list[int] = []
        async for event in client.deploy({"app.mill": text}):
            ids += [event.id] if event.id is not None else []
            last = event
            if event.step.phase == phase and not killed:
                killed = True
                os.kill(pid_of(cluster, leader), signal.SIGKILL)
    assert killed
    assert last is not None
    assert last.step.outcome in ("deployed", "rolled_back")
    assert ids == sorted(set(ids))
    version = "v2" if last.step.outcome == "deployed" else "v1"
    async with cluster.client(other) as client:
        (web,) = [s for s in (await client.services()).services if s.name == "web"]
    assert web.image.endswith(version)

    async def both_answer() -> bool:
        return len(await answering(cluster.http(other))) == 2

    # Where an old allocation stood on the node that died, the end came with its being `down`: then
    # what it ran was lost with it, and is being started elsewhere.
    await eventually(both_answer)


async def test_a_power_cut_moves_its_allocations_to_the_others(cluster: Cluster) -> None:
    await cluster.deploy(PLAIN)
    before = await _healthy(cluster, "node-1")
    victim = next(node for alloc, node in before.items() if alloc.startswith("web"))
    asked = next(n for n in ("node-1", "node-2", "node-3") if n != victim)
    await cluster.dev.kill(victim)

    async def moved() -> bool:
        healthy = await _healthy(cluster, asked)
        return len(healthy) == 3 and victim not in healthy.values()

    await eventually(lambda: _safely(moved), within_s=120)
    await cluster.dev.start(victim)

    async def ready() -> bool:
        async with cluster.client(asked) as client:
            return all(n.status == "ready" for n in (await client.nodes()).nodes)

    await eventually(lambda: _safely(ready))
    assert len(await answering(cluster.http(asked))) == 2


async def test_a_stopped_cluster_comes_back_with_its_services(
    tmp_path: Path, registry: str
) -> None:
    dev = Dev(Options(data=tmp_path / "dev", base_port=free_base()), lambda _: None)
    try:
        async with dev.up() as founding:
            await Cluster(dev, founding, registry, []).deploy(PLAIN)
        async with dev.up() as founding:
            cluster = Cluster(dev, founding, registry, [])
            await eventually(lambda: _safely(lambda: _three(cluster)))
            assert len(await answering(cluster.http())) == 2
    finally:
        await dev.reset()


async def _three(cluster: Cluster) -> bool:
    return len(await _healthy(cluster, "node-1")) == 3


async def test_two_clusters_run_side_by_side(
    cluster: Cluster, tmp_path: Path, registry: str
) -> None:
    await cluster.deploy(PLAIN)
    async with running(tmp_path / "second", registry, nodes=1) as second:
        await second.deploy(PLAIN.replace("web:v1", "web:v2"))
        mine, its = await asyncio.gather(answering(cluster.http()), answering(second.http()))
        assert mine
        assert its
        assert not mine & its
    assert len(await answering(cluster.http())) == 2
