"""A node that slept through more than the log still holds: everything on it is right at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest

from reconciler.errors import MillError
from reconciler.fsm.codec import decode_state
from reconciler.log import snapshot
from tests.end_to_end.conftest import Cluster, eventually
from tests.end_to_end.seed import SEED, answering, curl, dig
from tests.end_to_end.test_failures import pid_of

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]

PLAIN = SEED.replace("${secret(db.url)}", "x")
MORE = PLAIN.replace("replicas = 2", "replicas = 3") + '''
service "late" {
  image = "REG/api:v1"
  port = 8080
  health { path = "/healthz" }
  route "late.example.com" { path = "/" }
}
'''


async def test_every_watcher_is_right_after_a_snapshot_install_on_a_quiet_cluster(
    cluster: Cluster
) -> None:
    await cluster.deploy(PLAIN)
    async with cluster.client("node-1") as client:
        leader = (await client.status()).leader
    sleeper = next(n for n in ("node-3", "node-2") if n != leader)
    asked = next(n for n in ("node-1", "node-2") if n != sleeper)
    os.kill(pid_of(cluster, sleeper), signal.SIGKILL)
    await cluster.deploy(MORE)
    async with cluster.client(asked) as client:
        before = (await client.status()).index
        await _write_more_than_the_log_holds(cluster, asked)
        quiet = (await client.status()).index
    installed = cluster.dev.data / sleeper / "log" / "snapshot"
    await cluster.dev.start(sleeper)

    async def up() -> bool:
        async with cluster.client(sleeper) as client:
            return (await client.services(stale=True)).index >= quiet

    await eventually(lambda: _quietly(up))
    found = snapshot.decode(installed.read_bytes(), str(installed))
    assert decode_state(found.state).index > before  # it could not have come entry by entry
    await eventually(lambda: _serves_late(cluster, sleeper))
    assert len(await answering(cluster.http(sleeper))) == 3
    async with cluster.client(sleeper) as client:
        names = [s.name for s in (await client.services(stale=True)).services]
        assert names == ["api", "late", "web"]
        async with contextlib.aclosing(client.follow_events(after=0)) as events:
            first = await anext(events)
        assert first.index > 0  # a stream from the node that slept


async def _write_more_than_the_log_holds(cluster: Cluster, asked: str) -> None:
    """Twice what a snapshot is made after: 8 MiB of journal."""
    text = "x" * 60_000
    async with cluster.client(asked) as client:
        for number in range(0, 280, 8):
            await asyncio.gather(*(
                client.set_secret(f"filler.{number % 16 + n}", text) for n in range(8)))


async def _serves_late(cluster: Cluster, node: str) -> bool:
    body = await curl(cluster.http(node), "late.example.com", "/healthz")
    return body.endswith(" 200") and bool(await dig(cluster.dns(node), "late.mill"))


async def _quietly(check: object) -> bool:
    try:
        return bool(await check())  # type: ignore[operator]  # a coroutine function
    except MillError:
        return False
