"""What a full or failing disk does to a node's log, at each write and sync that there is."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
from pathlib import Path

import pytest

from reconciler.errors import MillError
from reconciler.log import journal, snapshot
from reconciler.log.replica import LogClosed, LogDamaged, Replica, Settings, Timing
from tests.log.cluster import Cluster, Ledger, until
from tests.log.faulty_disk import Faults, FaultyDisk

COMMANDS = [b"%d" % number + bytes(300) for number in range(12)]
OFTEN = Timing(reopen_s=0.02)


def alone(folder: Path) -> Settings:
    """One voter; a snapshot every few commands."""
    settings = Cluster(folder, 1, snapshot_bytes=1200).settings("node-1")
    return dataclasses.replace(settings, timing=OFTEN)


class Watched:
    """A replica, what it was told to do, and what it told."""

    def __init__(self, settings: Settings, faults: Faults) -> None:
        self.ledger = Ledger()
        self.replica = Replica(
            settings, self.ledger, lambda folder: FaultyDisk(folder, faults))
        self.acked: list[bytes] = []
        self.led: list[bool] = []
        self.closed: list[str] = []
        self.replica.on_leadership(lambda leading, _term: self.led.append(leading))
        self.replica.on_closed(self.closed.append)

    async def write(self) -> None:
        """Until something fails."""
        replica = self.replica
        await until(lambda: replica.is_leader or replica.closed, "it leads, or is closed")
        for command in COMMANDS:
            try:
                await replica.propose(command)
            except MillError:
                return
            self.acked.append(command)


async def _operations(folder: Path) -> list[str]:
    """What a run without a fault does to the disk, in order, its stop left out."""
    faults = Faults()
    watched = Watched(alone(folder), faults)
    await watched.replica.start()
    await watched.write()
    assert watched.acked == COMMANDS
    done = list(faults.done)
    await watched.replica.stop()
    return done


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
async def test_at_each_write_and_sync_the_log_closes_and_comes_back_with_all(
    tmp_path: Path, code: int
) -> None:
    (tmp_path / "whole").mkdir()
    operations = await _operations(tmp_path / "whole")
    assert set(operations) == {"create", "write", "reserve", "sync", "rename", "sync_folder"}
    for number, name in enumerate(operations):
        folder = tmp_path / str(number)
        folder.mkdir()
        await _fail_and_mend(alone(folder), number, code, f"{name}, operation {number}")


async def _fail_and_mend(settings: Settings, number: int, code: int, what: str) -> None:
    faults = Faults()
    faults.arm(number, code)
    watched = Watched(settings, faults)
    replica = watched.replica
    await replica.start()
    await watched.write()
    await until(lambda: replica.closed, f"closed: {what}")
    assert replica.closed == f"{os.strerror(code)} ({settings.folder})"
    assert not replica.is_leader
    assert watched.led in ([], [True, False])
    for refused in (replica.propose(b"refused"), replica.read_index()):
        with pytest.raises(LogClosed, match=os.strerror(code)):
            await refused
    failed = len(faults.done)
    await until(lambda: len(faults.done) > failed + 1, "it tries again")
    assert replica.closed
    faults.mend()
    await until(lambda: replica.is_leader and not replica.closed, f"back: {what}")
    assert watched.closed == [f"{os.strerror(code)} ({settings.folder})", ""]
    await replica.propose(b"after")
    _check(watched.ledger.commands, watched.acked, what)
    assert not replica.fatal.done()
    await replica.stop()
    await _check_restart(settings, watched.acked, what)


def _check(commands: list[bytes], acked: list[bytes], what: str) -> None:
    assert commands[-1] == b"after", what
    # The one that failed may be there as well; it was not acknowledged, and not denied.
    assert commands[: len(acked)] == acked, what
    assert len(commands) <= len(acked) + 2, what
    assert b"refused" not in commands
    assert len(commands) == len(set(commands)), what


async def _check_restart(settings: Settings, acked: list[bytes], what: str) -> None:
    ledger = Ledger()
    replica = Replica(settings, ledger)
    await replica.start()
    await until(lambda: replica.is_leader, "it leads")
    _check(ledger.commands, acked, what)
    await replica.stop()


async def test_the_cluster_goes_on_without_the_node_whose_disk_fails(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 3)
    faults = {member.name: Faults() for member in cluster.members}
    watched = {}
    for name, its in faults.items():
        settings = dataclasses.replace(cluster.settings(name), timing=OFTEN)
        watched[name] = Watched(settings, its)
        cluster.replicas[name], cluster.ledgers[name] = watched[name].replica, watched[name].ledger
    await asyncio.gather(*(each.start() for each in cluster.replicas.values()))
    acked = []
    try:
        for number in range(3):
            leader = await cluster.leader()
            name = next(n for n, each in cluster.replicas.items() if each is leader)
            await leader.propose(b"before %d" % number)
            faults[name].arm(0, errno.EIO)
            with pytest.raises(MillError):
                await leader.propose(b"failing %d" % number)
            await until(lambda leader=leader: leader.closed, "closed")
            await (await cluster.leader()).propose(b"without %d" % number)
            acked += [b"before %d" % number, b"without %d" % number]
            faults[name].mend()
            await until(lambda leader=leader: not leader.closed, "open again")
        await (await cluster.leader()).propose(b"last")
        commands = await cluster.agree()
        assert [each for each in commands if not each.startswith(b"failing")] == [*acked, b"last"]
        assert len(commands) == len(set(commands))
    finally:
        await cluster.stop()


async def test_a_log_that_is_closed_stops_at_once(tmp_path: Path) -> None:
    faults = Faults()
    faults.arm(0, errno.ENOSPC)
    settings = dataclasses.replace(alone(tmp_path), timing=Timing())
    replica = Replica(settings, Ledger(), lambda folder: FaultyDisk(folder, faults))
    await replica.start()
    assert replica.closed
    await replica.stop()
    await _check_restarts_empty(settings)


async def _check_restarts_empty(settings: Settings) -> None:
    """Nothing holds the folder any more."""
    replica = Replica(settings, Ledger())
    await replica.start()
    await until(lambda: replica.is_leader, "it leads")
    await replica.stop()


@pytest.mark.parametrize("name", [journal.NAME, snapshot.NAME])
async def test_damage_found_on_opening_again_keeps_it_closed_and_is_named(
    tmp_path: Path, name: str
) -> None:
    faults = Faults()
    settings = alone(tmp_path)
    watched = Watched(settings, faults)
    replica = watched.replica
    await replica.start()
    await watched.write()
    faults.arm(0, errno.EIO)
    with pytest.raises(MillError):
        await replica.propose(b"failing")
    await until(lambda: replica.closed, "closed")
    file = settings.folder / name
    content = file.read_bytes()
    file.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    faults.mend()
    await until(lambda: str(file) in replica.closed, "the damaged file is named")
    assert "byte" in replica.closed
    with pytest.raises(LogClosed, match="byte"):
        await replica.propose(b"refused")
    assert not replica.fatal.done()
    file.write_bytes(content)
    await until(lambda: replica.is_leader, "it leads again")
    assert watched.ledger.commands[: len(COMMANDS)] == COMMANDS
    await replica.stop()
    file.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    with pytest.raises(LogDamaged, match=r"damaged|checksum|missing"):
        await Replica(settings, Ledger()).start()


async def test_a_closed_log_leaves_no_half_file_on_a_full_disk(tmp_path: Path) -> None:
    faults = Faults()
    settings = alone(tmp_path)
    watched = Watched(settings, faults)
    await watched.replica.start()
    await watched.write()
    number = len(faults.done)
    faults.arm(number, errno.ENOSPC)
    with pytest.raises(MillError):
        await watched.replica.propose(bytes(400))
    await until(lambda: len(faults.done) > number + 2, "it tries again")
    await watched.replica.stop()
    left = {each.name for each in settings.folder.iterdir()}
    assert left - {"archive"} == {"lock", journal.NAME, snapshot.NAME}
