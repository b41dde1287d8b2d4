"""A node that lost its log comes back under its name, and never votes twice."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from reconciler.log import acquaintance, journal, rejoin, snapshot
from reconciler.log.disk import OsDisk
from reconciler.log.journal import Journal
from reconciler.log.replica import LogDamaged, LogFailed, Membership, Replica
from tests.log.cluster import Cluster, Ledger, free_members, running, until


def name_of(cluster: Cluster, replica: Replica) -> str:
    return next(name for name, each in cluster.replicas.items() if each is replica)


async def _write(cluster: Cluster, first: int, end: int) -> None:
    for number in range(first, end):
        await (await cluster.leader()).propose(b"%d" % number + bytes(200))


@pytest.mark.parametrize("snapshot_bytes", [8 << 20, 2000], ids=["entries", "snapshot"])
async def test_a_damaged_node_comes_back_from_its_peers(
    tmp_path: Path, snapshot_bytes: int
) -> None:
    async with running(tmp_path, 3, snapshot_bytes=snapshot_bytes) as cluster:
        await _write(cluster, 0, 30)
        name = name_of(cluster, cluster.followers()[0])
        await cluster.stop(name)
        file = tmp_path / name / journal.NAME
        data = file.read_bytes()
        file.write_bytes(data[:40] + bytes([data[40] ^ 1]) + data[41:])
        with pytest.raises(LogDamaged) as refused:
            await Replica(cluster.settings(name), Ledger()).start()
        assert "--rejoin" in refused.value.hint
        moved = rejoin.begin(tmp_path / name)
        assert str(file) + ".damaged-1" in moved
        assert not (tmp_path / name / snapshot.NAME).exists()
        await cluster.start(name)
        await until(lambda: not (tmp_path / name / rejoin.MARK).exists(), "it has rejoined")
        await _write(cluster, 30, 40)
        assert len(await cluster.agree()) == 40
        # It counts again: without one of the others nothing is committed but by its vote.
        leader = name_of(cluster, await cluster.leader())
        await cluster.stop(next(n for n in cluster.replicas if n not in (name, leader)))
        await _write(cluster, 40, 45)
        assert len(await cluster.agree()) == 45


async def test_an_empty_log_waits_until_every_other_voter_has_said_its_term(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, 3) as cluster:
        await _write(cluster, 0, 5)
        lost, away = (name_of(cluster, each) for each in cluster.followers())
        await cluster.stop(lost, away)
        rejoin.begin(tmp_path / lost)
        await cluster.start(lost)
        leader = next(each for name, each in cluster.replicas.items() if name != lost)
        await until(lambda: not leader.is_leader, "its leader finds no majority")
        # Its vote would make one: it may have been given to the one that is away.
        timing = cluster.settings(lost).timing
        term = leader.term
        with pytest.raises(TimeoutError):
            await _elected(cluster, 4 * timing.election_max_s)
        assert leader.term == term
        assert (tmp_path / lost / rejoin.MARK).exists()
        await cluster.start(away)
        await until(lambda: not (tmp_path / lost / rejoin.MARK).exists(), "it has rejoined")
        await _write(cluster, 5, 8)
        assert len(await cluster.agree()) == 8


async def _elected(cluster: Cluster, within_s: float) -> None:
    async with asyncio.timeout(within_s):
        await cluster.leader()


async def test_a_log_that_nobody_else_holds_cannot_rejoin(tmp_path: Path) -> None:
    async with running(tmp_path, 1) as cluster:
        await _write(cluster, 0, 3)
    rejoin.begin(tmp_path / "node-1")
    with pytest.raises(LogFailed, match="nobody else"):
        await Replica(cluster.settings("node-1"), Ledger()).start()


async def test_a_running_log_is_not_moved_aside(tmp_path: Path) -> None:
    async with running(tmp_path, 1) as cluster:
        await _write(cluster, 0, 3)
        with pytest.raises(LogFailed, match="another process"):
            rejoin.begin(tmp_path / "node-1")
        await _write(cluster, 3, 5)


def test_what_is_moved_aside_is_kept_also_the_second_time(tmp_path: Path) -> None:
    for _ in range(2):
        disk = OsDisk(tmp_path)
        Journal(disk).close()
        disk.close()
        rejoin.begin(tmp_path)
    names = {each.name for each in tmp_path.iterdir()}
    assert {"journal.damaged-1", "journal.damaged-2", rejoin.MARK} < names
    assert journal.NAME not in names


def test_what_was_kept_of_the_members_and_is_damaged_counts_for_nothing(tmp_path: Path) -> None:
    disk = OsDisk(tmp_path)
    assert acquaintance.load(disk) is None
    kept = Membership(free_members(2), index=7)
    acquaintance.store(disk, kept)
    assert acquaintance.load(disk) == kept
    (tmp_path / acquaintance.NAME).write_bytes(b"\x93rot")
    assert acquaintance.load(disk) is None
    disk.close()
