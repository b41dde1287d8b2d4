"""The past stays readable, for a while and within a bound, and never in the log's way."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import msgspec
import pytest

from reconciler.errors import Unprocessable
from reconciler.log import archive, journal
from reconciler.log.archive import Archive, NotHeld, Past
from reconciler.log.replica import Replica
from tests.log.cluster import Cluster, running, until

SMALL = 4 << 10
"""A snapshot every hundred commands or so."""


def files(folder: Path, kind: str) -> list[Path]:
    found = folder.joinpath(archive.FOLDER).glob(f"{kind}-*")
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def replayed(past: Past) -> list[tuple[int, bytes]]:
    """The state that the test's machine has after it."""
    items = msgspec.msgpack.decode(past.base, type=list[tuple[int, bytes]]) if past.base else []
    return items + past.commands


async def written(replica: Replica, count: int) -> list[tuple[int, bytes]]:
    """So many commands, each with its index."""
    done = []
    for start in range(0, count, 50):
        commands = [b"%d" % n + b"." * 20 for n in range(start, min(start + 50, count))]
        answers = await asyncio.gather(*(replica.propose(command) for command in commands))
        done += [(answer[0], command) for answer, command in zip(answers, commands, strict=True)]
    return done


async def several_snapshots(cluster: Cluster) -> tuple[Replica, Path, list[tuple[int, bytes]]]:
    leader = await cluster.leader()
    name = next(name for name, each in cluster.replicas.items() if each is leader)
    items = await written(leader, 1000)
    folder = cluster.folder / name
    assert len(files(folder, "snapshot")) >= 3
    return leader, folder, items


async def test_the_state_at_every_index_is_that_of_the_commands_up_to_it(tmp_path: Path) -> None:
    async with running(tmp_path, 3, SMALL) as cluster:
        leader, _, items = await several_snapshots(cluster)
        for index in (*range(1, leader.applied_index, 7), leader.applied_index):
            past = await leader.history(index)
            assert replayed(past) == [item for item in items if item[0] <= index]
            assert sum(len(command) for _, command in past.commands) <= 2 * SMALL


async def test_the_past_outlives_a_restart_and_a_change_of_leader(tmp_path: Path) -> None:
    async with running(tmp_path, 3, SMALL) as cluster:
        _, _, items = await several_snapshots(cluster)
        await cluster.agree()
        await cluster.stop()
        await cluster.start()
        leader = await cluster.leader()
        items += await written(leader, 300)
        for replica in cluster.replicas.values():
            await until(lambda r=replica: r.applied_index >= items[-1][0], "all is applied")  # type: ignore[misc]  # bound in its turn
            for index in (1, 2, items[40][0], items[700][0], items[1200][0]):
                past = await replica.history(index)
                assert replayed(past) == [item for item in items if item[0] <= index]
        for name in cluster.replicas:
            # Each journal begins at a snapshot that is held too, also the first after a restart.
            held = {int(path.name.split("-")[1]) for path in files(tmp_path / name, "snapshot")}
            begins = [int(path.name.split("-")[1]) for path in files(tmp_path / name, "journal")]
            assert set(begins[1:]) <= held
            assert begins[0] == 0


async def test_history_answers_while_the_log_is_compacted_underneath(tmp_path: Path) -> None:
    async with running(tmp_path, 1, SMALL) as cluster:
        leader, _, items = await several_snapshots(cluster)
        before = len(items)
        writing = asyncio.create_task(written(leader, 1500))
        number = 0
        while not writing.done():
            index = items[number * 37 % before][0]
            past = await leader.history(index)
            assert replayed(past) == [item for item in items if item[0] <= index]
            number += 1
        await writing
        assert number > 5


async def test_killed_in_the_middle_of_a_compaction_nothing_of_the_past_is_wrong(
    tmp_path: Path,
) -> None:
    """The archive has the file, but the log has it still, and goes on writing into it."""
    async with running(tmp_path, 1) as cluster:
        items = await written(await cluster.leader(), 60)
    cluster = Cluster(tmp_path, 1, SMALL)
    Archive(tmp_path / "node-1", time.time).keep(0, items[50][0])
    try:
        await cluster.start()
        leader = await cluster.leader()
        items += await written(leader, 600)
        assert len(files(tmp_path / "node-1", "journal")) > 3
        for index, _ in items[::11]:
            past = await leader.history(index)
            assert replayed(past) == [item for item in items if item[0] <= index]
    finally:
        await cluster.stop()


async def test_an_index_that_is_not_applied_yet_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path, 1) as cluster:
        leader = await cluster.leader()
        await leader.propose(b"x")
        with pytest.raises(Unprocessable, match="not there yet"):
            await leader.history(leader.applied_index + 1)


async def test_a_damaged_snapshot_is_gone_around_by_an_older_one(tmp_path: Path) -> None:
    async with running(tmp_path, 1, SMALL) as cluster:
        leader, folder, items = await several_snapshots(cluster)
        second = files(folder, "snapshot")[1]
        index = int(second.name.partition("-")[2]) + 3
        second.write_bytes(second.read_bytes()[:-1] + b"~")
        past = await leader.history(index)
        assert past.base_index == int(files(folder, "snapshot")[0].name.partition("-")[2])
        assert replayed(past) == [item for item in items if item[0] <= index]


async def test_a_snapshot_of_another_index_is_not_taken_for_the_one_in_its_name(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, 1, SMALL) as cluster:
        leader, folder, items = await several_snapshots(cluster)
        second, third = files(folder, "snapshot")[1:3]
        index = int(second.name.partition("-")[2]) + 3
        second.unlink()
        second.write_bytes(third.read_bytes())
        past = await leader.history(index)
        assert replayed(past) == [item for item in items if item[0] <= index]


async def test_what_is_damaged_or_missing_is_not_held_and_the_next_index_is_named(
    tmp_path: Path,
) -> None:
    async with running(tmp_path, 1, SMALL) as cluster:
        leader, folder, items = await several_snapshots(cluster)
        first, second = files(folder, "snapshot")[:2]
        begins = int(first.name.partition("-")[2])
        damaged = files(folder, "journal")[0]
        content = bytearray(damaged.read_bytes())
        content[200] ^= 0x10
        damaged.write_bytes(content)
        with pytest.raises(NotHeld) as refused:
            await leader.history(begins - 1)
        assert refused.value.oldest == begins
        assert replayed(await leader.history(begins)) == [i for i in items if i[0] <= begins]
        first.unlink()
        with pytest.raises(NotHeld) as refused:
            await leader.history(begins)
        oldest = refused.value.oldest
        assert oldest == int(second.name.partition("-")[2])
        assert replayed(await leader.history(oldest)) == [i for i in items if i[0] <= oldest]


async def test_the_log_goes_on_without_an_archive(tmp_path: Path) -> None:
    async with running(tmp_path, 1, SMALL) as cluster:
        leader = await cluster.leader()
        # A file where the folder should be: nothing can be kept.
        (tmp_path / "node-1" / archive.FOLDER).write_bytes(b"in the way")
        items = await written(leader, 600)
        with pytest.raises(NotHeld) as refused:
            await leader.history(2)
        oldest = refused.value.oldest
        assert oldest <= leader.applied_index
        assert replayed(await leader.history(oldest)) == [i for i in items if i[0] <= oldest]
        assert not leader.fatal.done()


async def test_a_node_that_was_sent_a_snapshot_names_where_its_past_begins(tmp_path: Path) -> None:
    async with running(tmp_path, 3, SMALL) as cluster:
        leader = await cluster.leader()
        follower = next(name for name, each in cluster.replicas.items() if each is not leader)
        await cluster.stop(follower)
        items = await written(leader, 1000)
        await cluster.start(follower)
        await cluster.agree()
        replica = cluster.replicas[follower]
        with pytest.raises(NotHeld) as refused:
            await replica.history(items[100][0])
        oldest = refused.value.oldest
        assert items[100][0] < oldest <= replica.applied_index
        assert replayed(await replica.history(oldest)) == [i for i in items if i[0] <= oldest]


def grown(folder: Path, count: int) -> None:
    """An archive as compactions would leave it: a snapshot and a journal for each hundred."""
    for number in range(1, count + 1):
        base = number * 100
        for name in (f"snapshot-{base}", f"journal-{base}-{base + 100}"):
            path = folder / archive.FOLDER / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(bytes(1000))
            os.utime(path, (base, base))


def left(folder: Path) -> list[str]:
    return [path.name for path in files(folder, "snapshot") + files(folder, "journal")]


def test_what_is_too_old_goes_a_snapshot_with_its_journal(tmp_path: Path) -> None:
    (tmp_path / "snapshot").write_bytes(bytes(1000))
    (tmp_path / journal.NAME).write_bytes(b"")
    grown(tmp_path, 5)
    os.utime(tmp_path / archive.FOLDER / "journal-300-400", (410, 410))
    os.utime(tmp_path / journal.NAME, (900, 900))
    Archive(tmp_path, lambda: 1000.0, max_age_s=600.0).keep(600, 700)
    # The snapshot at 300 is too old by itself, but the last entry that needs it is not.
    assert left(tmp_path) == [
        "snapshot-300", "snapshot-400", "snapshot-500", "snapshot-600",
        "journal-300-400", "journal-400-500", "journal-500-600", "journal-600-700",
    ]


def test_the_past_takes_no_more_than_is_free_beside_it(tmp_path: Path) -> None:
    (tmp_path / "snapshot").write_bytes(bytes(1000))
    (tmp_path / journal.NAME).write_bytes(bytes(1000))
    grown(tmp_path, 5)
    Archive(tmp_path, lambda: 1000.0, free_bytes=lambda _folder: 4500).keep(600, 700)
    assert left(tmp_path) == ["snapshot-500", "snapshot-600", "journal-500-600", "journal-600-700"]
    Archive(tmp_path, lambda: 1000.0, free_bytes=lambda _folder: 0).keep(700, 800)
    assert left(tmp_path) == []


def test_what_is_too_much_goes_oldest_first(tmp_path: Path) -> None:
    (tmp_path / "snapshot").write_bytes(bytes(1000))
    (tmp_path / journal.NAME).write_bytes(bytes(1000))
    grown(tmp_path, 5)
    Archive(tmp_path, lambda: 1000.0, max_bytes=5000).keep(600, 700)
    assert left(tmp_path) == ["snapshot-500", "snapshot-600", "journal-500-600", "journal-600-700"]
