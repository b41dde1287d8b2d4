"""Three real processes, each log on a small disk of its own that really fills up."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.log.cluster import DEADLINE_S, Process, ProcessCluster

pytestmark = pytest.mark.containers

DISK = "40m"
COMMAND_BYTES = 400_000


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[Path]:
    """A folder with a mounted tmpfs for each node; unmounted whatever happens."""
    with contextlib.ExitStack() as undo:
        for number in (1, 2, 3):
            folder = tmp_path / f"node-{number}"
            folder.mkdir()
            subprocess.run(
                ["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0700", "tmpfs", folder],
                check=True,
            )
            undo.callback(subprocess.run, ["umount", "--lazy", folder], check=True)
        yield tmp_path


def fill(folder: Path) -> Path:
    """Take all the room there is; the file that holds it."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
    with pytest.raises(OSError, match="No space") as full:
        (folder / "one more").write_bytes(bytes(8192))
    assert full.value.errno == errno.ENOSPC
    (folder / "one more").unlink()
    return ballast


async def closed(process: Process, *, wanted: bool) -> str:
    """Wait until the node's log is closed, or open; what it says."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            reason = str((await process.ask(status=True))["closed"])
            if bool(reason) is wanted:
                return reason
            await asyncio.sleep(0.05)


async def write(cluster: ProcessCluster, acked: list[bytes], tried: int) -> None:
    command = b"%d" % tried + bytes(COMMAND_BYTES)
    if await cluster.write(command):
        acked.append(command)


@pytest.mark.parametrize("whose", ["leader", "follower"])
async def test_a_disk_that_fills_up_stops_its_node_alone_until_there_is_room(
    disks: Path, whose: str
) -> None:
    async with ProcessCluster(disks) as cluster:
        acked: list[bytes] = []
        await write(cluster, acked, 0)
        leader = await cluster.leader()
        name = leader if whose == "leader" else next(n for n in cluster.processes if n != leader)
        node, pid = cluster.processes[name], cluster.processes[name].pid
        ballast = fill(disks / name)
        tried = 0
        while not (await node.ask(status=True))["closed"]:
            tried += 1
            assert tried < 30, "the journal's own reserve is long used up"
            await write(cluster, acked, tried)
        reason = await closed(node, wanted=True)
        assert reason == f"No space left on device ({disks / name})"
        for question in ({"propose": base64.b64encode(b"refused").decode()}, {"read": True}):
            assert (await node.ask(**question))["error"] == "LogClosed"
        # The others go on.
        for _ in range(3):
            tried += 1
            before = len(acked)
            await write(cluster, acked, tried)
            assert len(acked) == before + 1
        assert await cluster.leader() != name
        ballast.unlink()
        await closed(node, wanted=False)
        assert node.pid == pid, "the same process"
        await write(cluster, acked, tried + 1)
        for each in cluster.processes:
            commands = await cluster.commands(each, len(acked), acked)
            assert [command for command in commands if command in set(acked)] == acked
            assert len(commands) == len(set(commands)), "none applied twice"
            assert b"refused" not in commands
