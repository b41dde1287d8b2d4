from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.log import snapshot
from reconciler.log.errors import LogDamaged, LogFailed
from reconciler.log.settings import Membership
from reconciler.log.snapshot import NAME, Snapshot, Snapshots
from tests.log.cluster import running
from tests.sim.disk import SimDisk


@given(st.integers(0, 1 << 62), st.integers(0, 1 << 62), st.binary(max_size=300))
def test_a_snapshot_reads_back_as_written(index: int, term: int, state: bytes) -> None:
    written = Snapshot(index, term, state)
    assert snapshot.decode(snapshot.encode(written), "x") == written


def test_no_damaged_byte_and_no_cut_is_taken_for_a_snapshot() -> None:
    data = snapshot.encode(Snapshot(41, 3, b"state" * 20))
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0x40
        with pytest.raises(LogDamaged):
            snapshot.decode(bytes(damaged), "node-1/snapshot")
        with pytest.raises(LogDamaged, match="node-1/snapshot"):
            snapshot.decode(data[:at], "node-1/snapshot")


def test_a_snapshot_survives_a_power_cut_once_stored() -> None:
    disk = SimDisk("node-1")
    Snapshots(disk).store(snapshot.encode(Snapshot(5, 1, b"five")))
    disk.crash(random.Random(3))
    assert Snapshots(disk).load() == Snapshot(5, 1, b"five")


@pytest.mark.parametrize("fault", ["full", "broken"])
def test_the_one_before_stays_where_the_next_cannot_be_written(fault: str) -> None:
    disk = SimDisk("node-1")
    snapshots = Snapshots(disk)
    snapshots.store(snapshot.encode(Snapshot(5, 1, b"five")))
    setattr(disk, fault, True)
    with pytest.raises(LogFailed):
        snapshots.store(snapshot.encode(Snapshot(9, 1, b"nine")))
    setattr(disk, fault, False)
    for seed in range(10):
        disk.crash(random.Random(seed))
        assert Snapshots(disk).load() == Snapshot(5, 1, b"five")
    assert disk.read(NAME) is not None


async def test_a_log_from_before_members_could_change_loads_as_its_settings_say(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, 1, snapshot_bytes=1000) as cluster:
        for number in range(30):
            await (await cluster.leader()).propose(b"%d" % number + bytes(100))
    file = tmp_path / "node-1" / snapshot.NAME
    stored = snapshot.decode(file.read_bytes(), "x")
    assert stored.members == Membership(cluster.members)
    head = struct.pack("<QQQ", stored.index, stored.term, len(stored.state))
    crc = struct.pack("<I", zlib.crc32(stored.state, zlib.crc32(head)))
    file.write_bytes(b"mill snapshot 1\n" + head + crc + stored.state)
    await cluster.start()
    try:
        await (await cluster.leader()).propose(b"goes on")
        assert cluster.replicas["node-1"].membership == Membership(cluster.members)
        assert len(await cluster.agree()) == 31
    finally:
        await cluster.stop()
