"""Three real processes over loopback TLS, and SIGKILL."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import resource
import signal
from pathlib import Path

from tests.log.cluster import DEADLINE_S, ProcessCluster


async def test_a_killed_leader_is_replaced_and_comes_back_with_its_state(tmp_path: Path) -> None:
    async with ProcessCluster(tmp_path) as cluster:
        acked = []
        for number in range(30):
            if await cluster.write(b"first %d" % number):
                acked.append(b"first %d" % number)
        killed = await cluster.leader()
        await cluster.processes[killed].end()
        survivors = {n: p for n, p in cluster.processes.items() if n != killed}
        back = cluster.processes.pop(killed)
        for number in range(30):
            if await cluster.write(b"second %d" % number):
                acked.append(b"second %d" % number)
        assert len(acked) == 60
        await back.start()
        cluster.processes[killed] = back
        everywhere = [await cluster.commands(name, len(acked)) for name in cluster.processes]
        assert everywhere == [acked] * 3
        assert survivors.keys() < cluster.processes.keys()


async def test_everything_acknowledged_survives_sigkill_of_all_at_once(tmp_path: Path) -> None:
    async with ProcessCluster(tmp_path, snapshot_bytes=4096) as cluster:
        acked = []
        for round_number in range(3):
            for number in range(25):
                command = b"%d.%d" % (round_number, number) + bytes(100)
                if await cluster.write(command):
                    acked.append(command)
            for process in cluster.processes.values():
                process.signal(signal.SIGKILL)
            for process in cluster.processes.values():
                await process.end()
                await process.start()
        assert len(acked) == 75
        for name in cluster.processes:
            commands = await cluster.commands(name, len(acked), acked)
            assert [each for each in commands if each in set(acked)] == acked
            assert len(commands) == len(set(commands)), "none applied twice"


async def test_a_leader_killed_in_a_change_of_the_members_leaves_one_log(tmp_path: Path) -> None:
    async with ProcessCluster(tmp_path, 5, snapshot_bytes=4096, founding=1) as cluster:
        acked = []
        for number, member in enumerate(cluster.members[1:]):
            for question in (
                {"add": [member.name, member.host, member.port]}, {"promote": member.name},
            ):  # fmt: skip
                command = b"%d.%s" % (number, next(iter(question)).encode()) + bytes(300)
                if await cluster.write(command):
                    acked.append(command)
                leader = await cluster.leader()
                process = cluster.processes[leader]
                asked = asyncio.create_task(process.ask(**question))
                await asyncio.sleep(0)  # it is on its way; what becomes of it is the kill's luck
                process.signal(signal.SIGKILL)
                with contextlib.suppress(ConnectionError):
                    await asked
                await process.end()
                await process.start()
                await _until_done(cluster, question)
        assert len(acked) == 8
        assert await cluster.write(b"last")
        for name, process in cluster.processes.items():
            assert await cluster.commands(name, 9) == [*acked, b"last"]
            assert (await process.ask(status=True))["voters"] == sorted(cluster.processes)


async def _until_done(cluster: ProcessCluster, question: dict[str, object]) -> None:
    """Asked again: it was done, is done now, or it is not the time yet."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with contextlib.suppress(ConnectionError):
                answer = await cluster.processes[await cluster.leader()].ask(**question)
                if "index" in answer:
                    return
            await asyncio.sleep(0.02)


async def test_a_paused_leader_that_wakes_has_lost_and_overwrites_nothing(tmp_path: Path) -> None:
    async with ProcessCluster(tmp_path) as cluster:
        assert await cluster.write(b"before")
        paused = await cluster.leader()
        sleeper = cluster.processes.pop(paused)
        sleeper.signal(signal.SIGSTOP)
        assert await cluster.write(b"meanwhile")
        # Asked while it sleeps, answered when it wakes: it must not serve an old state.
        question = asyncio.create_task(sleeper.ask(read=True))
        await asyncio.sleep(0)
        sleeper.signal(signal.SIGCONT)
        answer = await question
        assert "error" in answer
        cluster.processes[paused] = sleeper
        assert await cluster.commands(paused, 2) == [b"before", b"meanwhile"]


async def test_a_full_disk_closes_the_log_of_this_node_until_there_is_room(
    tmp_path: Path,
) -> None:
    async with ProcessCluster(tmp_path, 3) as cluster:
        assert await cluster.write(b"first")
        full = await cluster.leader()
        node = cluster.processes[full]
        node.limit_files(6 << 20)  # the journal grows by 4 MiB: its second step fails
        acked = [b"first"]
        failed = ""
        for number in range(20):
            command = b"%d" % number + bytes(500_000)
            answer = await node.ask(propose=base64.b64encode(command).decode())
            if "error" in answer:
                failed = str(answer["error"])
                break
            acked.append(command)
        assert failed in {"OutcomeUnknown", "LogClosed", "NotLeader"}
        assert len(acked) > 5
        assert "error" in await node.ask(propose="")
        # The others go on, and the one with the full disk comes back once there is room.
        cluster.processes.pop(full)
        assert await cluster.write(b"last")
        acked.append(b"last")
        assert str(tmp_path / full) in str((await node.ask(status=True))["closed"])
        node.limit_files(resource.RLIM_INFINITY)
        cluster.processes[full] = node
        for name in cluster.processes:
            commands = await cluster.commands(name, len(acked), acked)
            assert [each for each in commands if each in set(acked)] == acked
