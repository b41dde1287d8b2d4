from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.log import records
from reconciler.log.disk import OsDisk
from reconciler.log.errors import LogDamaged, LogFailed
from reconciler.log.journal import NAME, Journal
from reconciler.log.records import Entry
from tests.sim.disk import SimDisk


def entry(index: int, term: int = 1) -> Entry:
    return Entry(b"\0command %d" % index, index, term)


def written(batches: int, each: int = 3) -> tuple[SimDisk, list[int]]:
    """A disk with `batches` synced batches after an unclean end; where each batch ends."""
    disk = SimDisk("node-1")
    journal = Journal(disk)
    ends = [journal.size_bytes]
    index = 1
    for _ in range(batches):
        for _ in range(each):
            journal.append(entry(index))
            index += 1
        journal.sync()
        ends.append(journal.size_bytes)
    journal.abandon()
    return disk, ends


def content(disk: SimDisk) -> bytes:
    data = disk.read(NAME)
    assert data is not None
    return data


def with_content(data: bytes) -> SimDisk:
    disk = SimDisk("node-1")
    disk.create(NAME).write_at(0, data)
    return disk


def test_what_was_synced_is_there_after_a_power_cut() -> None:
    disk, _ = written(4)
    disk.crash(random.Random(1))
    journal = Journal(disk)
    assert journal.positions(slice(None)) == [entry(index) for index in range(1, 13)]


def test_term_and_vote_are_durable_when_store_vote_returns() -> None:
    disk = SimDisk("node-1")
    Journal(disk).store_vote(7, "node-2")
    disk.crash(random.Random(1))
    journal = Journal(disk)
    assert (journal.term, journal.vote) == (7, "node-2")


def test_every_torn_length_gives_a_clean_prefix() -> None:
    disk, ends = written(8)
    data = content(disk)
    for length in range(ends[0], ends[-1] + 1):
        journal = Journal(with_content(data[:length] + bytes(64)))
        entries = journal.positions(slice(None))
        assert entries == [entry(index + 1) for index in range(len(entries))]
        synced = sum(end <= length for end in ends[1:])
        assert len(entries) >= 3 * synced, "a whole batch before the tear is kept"


def test_every_flipped_byte_before_the_last_batch_is_refused_at_its_record() -> None:
    disk, ends = written(6)
    data = content(disk)
    starts = []
    offset = len(records.MAGIC)
    while (record := records.decode(data, offset)) is not None:
        starts.append(offset)
        offset = record.end
    for at in range(ends[-2]):
        damaged = bytearray(data)
        damaged[at] ^= 1 << (at % 8)
        with pytest.raises(LogDamaged) as caught:
            Journal(with_content(bytes(damaged)))
        assert caught.value.path == f"node-1/{NAME}"
        assert caught.value.offset_bytes == max((s for s in starts if s <= at), default=0)


def test_a_flip_in_the_last_batch_is_refused_after_a_clean_stop() -> None:
    disk, ends = written(2)
    Journal(disk).close()
    disk.flip(NAME, ends[-1] - 1, 0x10)
    with pytest.raises(LogDamaged):
        Journal(disk)


def test_a_file_cut_short_of_what_was_renamed_into_place_is_refused() -> None:
    disk, _ = written(4)
    journal = Journal(disk)
    journal.compact(7)
    data = content(disk)
    with pytest.raises(LogDamaged):
        Journal(with_content(data[: journal.size_bytes - 1]))


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(LogDamaged) as caught:
        Journal(with_content(b""))
    assert caught.value.offset_bytes == 0


@given(st.randoms(use_true_random=False), st.integers(1, 12))
def test_a_torn_last_batch_never_costs_a_synced_entry(rng: random.Random, unsynced: int) -> None:
    disk, _ = written(3)
    journal = Journal(disk)
    for index in range(10, 10 + unsynced):
        journal.append(Entry(rng.randbytes(rng.randrange(1, 900)), index, 1))
    with_fault = disk
    with_fault.broken = True  # the write arrives in the cache, the sync fails
    with pytest.raises(LogFailed):
        journal.sync()
    disk.broken = False
    disk.crash(rng)
    entries = Journal(disk).positions(slice(None))
    assert entries[:9] == [entry(index) for index in range(1, 10)]
    assert [each.index for each in entries] == list(range(1, len(entries) + 1))


@pytest.mark.parametrize("fault", ["full", "broken"])
def test_after_a_failed_write_the_journal_is_closed_for_good(fault: str) -> None:
    disk, _ = written(1)
    journal = Journal(disk)
    setattr(disk, fault, True)
    journal.append(entry(4))
    with pytest.raises(LogFailed) as caught:
        journal.sync()
    assert f"node-1/{NAME}" in str(caught.value)
    setattr(disk, fault, False)
    with pytest.raises(LogFailed, match="cannot be written"):
        journal.sync()
    journal.abandon()
    assert Journal(disk).last.index >= 3


def test_group_commit_syncs_once_for_many() -> None:
    disk = SimDisk("node-1")
    journal = Journal(disk)
    before = disk.syncs
    for index in range(1, 101):
        journal.append(entry(index))
    journal.sync()
    journal.sync()
    assert disk.syncs - before == 1


def test_a_real_folder_is_private_and_held_by_one_process(tmp_path: Path) -> None:
    disk = OsDisk(tmp_path / "log")
    journal = Journal(disk)
    journal.append(entry(1))
    journal.sync()
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "log" / NAME).stat().st_mode & 0o777 == 0o600
    with pytest.raises(LogFailed, match="another process"):
        OsDisk(tmp_path / "log")
    journal.close()
    disk.close()
    reopened = OsDisk(tmp_path / "log")
    journal = Journal(reopened)
    assert journal.last == entry(1)
    journal.close()
    reopened.close()


@dataclass(frozen=True)
class View:
    entries: tuple[Entry, ...]
    term: int
    vote: str | None


def view(journal: Journal) -> View:
    return View(tuple(journal.positions(slice(None))), journal.term, journal.vote)


OPERATIONS = st.lists(
    st.sampled_from(["append", "append", "append", "cut", "vote", "sync", "compact", "reset"]),
    max_size=40,
)


@settings(max_examples=300)
@given(OPERATIONS, st.randoms(use_true_random=False))
def test_after_a_crash_the_journal_is_as_it_was_at_or_after_its_last_sync(
    operations: list[str], rng: random.Random
) -> None:
    disk = SimDisk("node-1")
    journal = Journal(disk)
    journal.append(entry(1))
    journal.sync()
    possible = [view(journal)]  # since the last sync, in order
    for operation in operations:
        first, last = journal.first, journal.last
        match operation:
            case "append":
                journal.append(entry(last.index + 1, journal.term or 1))
            case "cut" if last.index > first:
                journal.cut(rng.randint(first + 1, last.index))
            case "vote":
                journal.store_vote(max(journal.term, last.term) + 1, rng.choice(["node-2", None]))
            case "sync":
                journal.sync()
            case "compact":
                journal.compact(rng.randint(first, last.index))
            case "reset":
                journal.reset(entry(last.index + 5, last.term))
        if not journal.unsynced:
            possible.clear()
        possible.append(view(journal))
    journal.abandon()
    disk.crash(rng)
    assert view(Journal(disk)) in possible


class StopAt(Exception):
    """The power goes here."""


class PowerCut(SimDisk):
    """Loses power at the n-th call."""

    def __init__(self, calls: int) -> None:
        super().__init__("node-1")
        self.calls_left = calls

    def check_space(self) -> None:
        self._count()

    def check_sync(self) -> None:
        self._count()

    def rename(self, old: str, new: str) -> None:
        self._count()
        super().rename(old, new)

    def _count(self) -> None:
        self.calls_left -= 1
        if self.calls_left == 0:
            raise StopAt


@pytest.mark.parametrize("call", range(1, 8))
@pytest.mark.parametrize("seed", range(5))
def test_power_lost_at_any_step_of_compaction_leaves_the_old_or_the_new(
    call: int, seed: int
) -> None:
    disk = PowerCut(-1)
    journal = Journal(disk)
    for index in range(1, 10):
        journal.append(entry(index))
    journal.sync()
    disk.calls_left = call
    with contextlib.suppress(StopAt):
        journal.compact(6)
    disk.calls_left = -1
    disk.crash(random.Random(seed))
    after = Journal(disk)
    assert after.first in (1, 6)
    assert after.last == entry(9)


@pytest.mark.parametrize("seed", range(20))
def test_what_the_next_process_read_at_its_start_is_durable_from_then_on(seed: int) -> None:
    # Without being written anew: read from the cache, taken for stored, lost by the power cut.
    disk = SimDisk("node-1", random.Random(seed))
    journal = Journal(disk)
    journal.append(entry(1))
    journal.sync()
    journal.append(entry(2))
    disk.broken = True
    with pytest.raises(LogFailed):
        journal.sync()
    disk.mend()
    journal = Journal(disk)
    last = journal.last.index
    journal.append(entry(last + 1))
    journal.sync()
    disk.crash(random.Random(seed))
    assert Journal(disk).last == entry(last + 1)
