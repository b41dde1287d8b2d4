"""Whoever runs a node's process, `mill dev` knows it: to cut its power, not to start it twice,
and to end it with the cluster."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from reconciler.errors import Conflict, MillError
from tests.end_to_end.conftest import Cluster, eventually, running

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]


def processes(cluster: Cluster, name: str) -> list[int]:
    """Processes below this cluster's folder with the node's name as a word."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if name.encode() in words and any(
                    word.startswith(str(cluster.dev.data).encode()) for word in words):
                found.append(int(entry.name))
    return found


async def serves(cluster: Cluster) -> bool:
    try:
        async with cluster.client() as client:
            await client.status()
    except MillError:
        return False
    return True


@contextlib.asynccontextmanager
async def run_again(cluster: Cluster) -> AsyncIterator[asyncio.subprocess.Process]:
    """SIGKILL node-1's process, and run its own command line, as anyone may."""
    (pid,) = processes(cluster, "node-1")
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    os.kill(pid, signal.SIGKILL)
    await eventually(lambda: not processes(cluster, "node-1"))
    child = await asyncio.create_subprocess_exec(
        *words, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL, start_new_session=True)
    try:
        await eventually(lambda: serves(cluster))
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()


async def test_a_node_run_by_its_own_command_line_is_one_node_of_the_cluster(
    tmp_path: Path, registry: str
) -> None:
    async with contextlib.AsyncExitStack() as hands:
        async with running(tmp_path / "dev", registry, nodes=1) as cluster:
            async with run_again(cluster) as child:
                with pytest.raises(Conflict, match="runs already"):
                    await cluster.dev.start("node-1")
                await cluster.dev.kill("node-1")
                assert await child.wait() == -signal.SIGKILL
            await cluster.dev.start("node-1")
            await eventually(lambda: serves(cluster))
            # And the end of `mill dev` ends it too, as it does its own children.
            last = await hands.enter_async_context(run_again(cluster))
        assert await asyncio.wait_for(last.wait(), 30) == 0


async def test_what_a_node_keeps_is_for_root_alone(tmp_path: Path, registry: str) -> None:
    async with running(tmp_path / "dev", registry, nodes=1) as cluster:
        await cluster.deploy('service "web" { image = "REG/web:v1"; port = 3000 }')
        open_to_others = [
            str(path) for path in cluster.dev.data.rglob("*")
            # A container's own users read these two; the folders around them are closed.
            if path.is_file() and path.stat().st_mode & 0o077
            and path.name not in ("hosts", "resolv.conf")
            and "containerd/root" not in str(path) and "containerd/state" not in str(path)
        ]
        assert open_to_others == []
        folders = [cluster.dev.data, *(p for p in (cluster.dev.data / "node-1").rglob("*")
                                       if p.is_dir())]
        assert {oct(p.stat().st_mode & 0o777) for p in folders} == {"0o700"}
