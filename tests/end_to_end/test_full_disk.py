"""A node whose log's disk fills up: agent, edge and stale reads go on, and it comes back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from reconciler.api.types import NodeList, StatusAnswer
from reconciler.errors import MillError
from reconciler.node_remains import processes_with
from tests.end_to_end.conftest import Cluster, eventually
from tests.end_to_end.seed import SEED, answering
from tests.log.test_full_disk import fill

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]

PLAIN = SEED.replace("${secret(db.url)}", "x")


async def _status(cluster: Cluster, asked: str, *, stale: bool = False) -> StatusAnswer:
    async with cluster.client(asked) as client:
        return await client.status(stale=stale)


async def _nodes(cluster: Cluster, asked: str, *, stale: bool = False) -> NodeList:
    async with cluster.client(asked) as client:
        return await client.nodes(stale=stale)


def _pid(cluster: Cluster, node: str) -> int:
    (pid,) = processes_with(str(cluster.dev.data / node / "node.json"))
    return pid


async def _with_small_disk(cluster: Cluster, node: str) -> Path:
    """Give the log of a node a disk of its own; its folder."""
    folder = cluster.dev.data / node / "log"
    os.kill(_pid(cluster, node), signal.SIGKILL)
    await eventually(lambda: any(node in line and "signal 9" in line for line in cluster.said))
    kept = folder.with_name("kept")
    shutil.move(folder, kept)
    folder.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=0700", "tmpfs", folder],
                   check=True)
    shutil.copytree(kept, folder, dirs_exist_ok=True)
    await cluster.dev.start(node)
    return folder


async def test_a_node_whose_disk_is_full_goes_on_but_for_its_log(cluster: Cluster) -> None:
    await cluster.deploy(PLAIN)
    leader = (await _status(cluster, "node-1")).leader
    node, other = (n for n in ("node-1", "node-2", "node-3") if n != leader)
    folder = await _with_small_disk(cluster, node)
    try:
        await _fill_and_free(cluster, node, other, folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


async def _fill_and_free(cluster: Cluster, node: str, other: str, folder: Path) -> None:
    async def quiet() -> bool:
        try:
            status = await _status(cluster, other)
            own = await _status(cluster, node, stale=True)  # 503 until its log is open
            caught_up = own.index >= status.index and not status.warnings
            return caught_up and len(await answering(cluster.http(node))) == 2
        except MillError:
            return False

    await eventually(quiet)
    pid = _pid(cluster, node)
    ballast = fill(folder)
    said = f"{node}: its log is closed: No space left on device ({folder})"

    async def closed() -> bool:
        async with cluster.client(other) as client:
            await client.set_secret("ballast", "x" * 250_000)  # the cluster goes on
        return said in (await _status(cluster, other)).warnings

    await eventually(closed)
    for asked, stale in ((other, False), (node, False), (node, True)):
        assert said in (await _status(cluster, asked, stale=stale)).warnings
        nodes = await _nodes(cluster, asked, stale=stale)
        assert said in (nodes.warnings or ())
        assert {row.status for row in nodes.nodes} == {"ready"}, "its agent lives"
    assert len(await answering(cluster.http(node))) == 2, "its edge serves"
    ballast.unlink()
    await eventually(quiet)
    assert _pid(cluster, node) == pid, "the same process"
    seen = await cluster.deploy(PLAIN.replace("web:v1", "web:v2"))
    assert seen[-1][1].outcome == "deployed"  # type: ignore[attr-defined]  # a step
