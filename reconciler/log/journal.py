"""The journal: every entry, the term and the vote, on disk before anybody hears of them.

Appends are buffered; `sync` writes what has gathered since the last one and syncs once
(group commit). After a failed write or sync this journal is closed for good; another one,
from what the disk then holds, may take its place (`reopening`).
"""

from __future__ import annotations

import contextlib
import logging

from reconciler.log import records
from reconciler.log.disk import Disk, File, replace_file
from reconciler.log.errors import DiskFailed, LogDamaged, LogFailed
from reconciler.log.records import Entry

NAME = "journal"
RESERVE_BYTES = 4 << 20  # grown in steps, so that a sync of new data touches no metadata

_log = logging.getLogger(__name__)


class Journal:
    """The entries from `first` to `last`, never empty once Raft has put its first one in.

    Raises LogDamaged on opening, DiskFailed from anything that reads or writes.

    On opening, what the disk holds is verified from the first byte and written into a new
    file: what the former process wrote last may be in the kernel's cache alone, unsynced, or
    never to be written since its sync failed, and its name likewise (`reopening`).
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._path = disk.where(NAME)
        self._pending: list[bytes] = []
        self._file: File | None = None
        self._failure: DiskFailed | None = None
        try:
            data = disk.read_stored(NAME)
            self._state = records.Recovered() if data is None else records.recover(data, self._path)
            self._say_torn()
            self._rewrite()
        except OSError as error:
            raise self._failed(error) from error

    @property
    def first(self) -> int:
        """The lowest index held."""
        return self._state.entries[0].index

    @property
    def last(self) -> Entry:
        """The highest entry held."""
        return self._state.entries[-1]

    @property
    def term(self) -> int:
        """The current term, as last stored."""
        return self._state.term

    @property
    def vote(self) -> str | None:
        """Whom this node voted for in the current term."""
        return self._state.vote

    @property
    def size_bytes(self) -> int:
        """How much the file holds."""
        return self._state.end

    @property
    def unsynced(self) -> bool:
        """Whether anything waits for `sync`."""
        return bool(self._pending)

    def __len__(self) -> int:
        return len(self._state.entries)

    def __getitem__(self, at: int) -> Entry:
        """By position, not by index; negative counts from the end."""
        return self._state.entries[at]

    def positions(self, at: slice) -> list[Entry]:
        """A slice by position."""
        return self._state.entries[at]

    def held(self) -> list[Entry]:
        """A copy of all entries, from any thread: to copy a list is one step of the interpreter,
        and so is each change that the raft thread makes to it."""
        return self._state.entries[:]

    def entry(self, index: int) -> Entry | None:
        """The entry at `index`, where it is held."""
        entries = self._state.entries
        at = index - entries[0].index
        return entries[at] if 0 <= at < len(entries) else None

    def batch(self, index: int, max_bytes: int) -> list[Entry]:
        """Entries from `index` on, together at most `max_bytes`, but at least one."""
        entries = self._state.entries
        taken: list[Entry] = []
        size = 0
        for at in range(index - entries[0].index, len(entries)):
            size += len(entries[at].command) + records.OVERHEAD_BYTES
            if taken and size > max_bytes:
                break
            taken.append(entries[at])
        return taken

    def start_of(self, index: int, max_bytes: int) -> int:
        """The lowest index from which all entries up to `index` are at most `max_bytes`."""
        entries = self._state.entries
        at = index - entries[0].index
        size = 0
        while at > 0 and size < max_bytes:
            at -= 1
            size += len(entries[at].command) + records.OVERHEAD_BYTES
        return entries[at].index

    def holds(self, index: int, term: int) -> bool:
        """Whether the entry at `index` is held and of that term."""
        entry = self.entry(index)
        return entry is not None and entry.term == term

    def append(self, entry: Entry) -> None:
        """Add the next entry; durable after `sync`."""
        entries = self._state.entries
        assert not entries or entry.index == entries[-1].index + 1, "the log has no gaps"
        entries.append(entry)
        self._pending.append(records.encode_entry(self._state.end, entry))

    def cut(self, index: int) -> None:
        """Drop the entry at `index` and all behind it; durable after `sync`."""
        assert self.first < index <= self.last.index, "what is cut must be there"
        del self._state.entries[index - self.first :]
        self._pending.append(records.encode(records.CUT, self._state.end, index, 0, b""))

    def store_vote(self, term: int, vote: str | None) -> None:
        """Make the term and the vote durable before returning."""
        if (term, vote) == (self._state.term, self._state.vote):
            return
        assert term >= self._state.term, "terms never go back"
        self._state.term, self._state.vote = term, vote
        self._pending.append(records.encode_vote(self._state.end, term, vote))
        self.sync()

    def sync(self) -> None:
        """Make everything appended durable, with one write and one sync."""
        if not self._pending:
            return
        data = b"".join(self._pending)
        if self._file is None:
            raise self._failure or LogFailed("the journal is closed", at=self._path)
        try:
            if self._state.end + len(data) > self._reserved:
                length = max(RESERVE_BYTES, len(data))
                self._file.reserve(self._reserved, length)
                self._reserved += length
            self._file.write_at(self._state.end, data)
            self._file.sync()
        except OSError as error:
            raise self._failed(error) from error
        self._pending.clear()
        self._state.end += len(data)

    def compact(self, index: int) -> None:
        """Forget the entries below `index`, in a new file; a crash leaves the old or the new."""
        del self._state.entries[: max(0, index - self.first)]
        self._rewrite_or_fail()

    def reset(self, entry: Entry) -> None:
        """Hold `entry` alone: a snapshot stands for everything up to it."""
        self._state.entries[:] = [entry]
        self._rewrite_or_fail()

    def close(self) -> None:
        """Sync, unless a write failed before, and let go of the file."""
        if self._file is not None:
            self.sync()
            self._seal()
            self._close_file()

    def abandon(self) -> None:
        """Let go of the file as it is: what was not synced may be lost."""
        self._pending.clear()
        self._close_file()

    def _say_torn(self) -> None:
        state = self._state
        if state.torn_bytes:
            _log.warning(
                "journal_torn path=%s offset=%d dropped_bytes=%d",
                self._path,
                state.end,
                state.torn_bytes,
            )

    def _seal(self) -> None:
        """End with a batch that says nothing new: damage before it cannot be taken for torn."""
        state = self._state
        self._pending.append(records.encode_vote(state.end, state.term, state.vote))
        self.sync()

    def _rewrite_or_fail(self) -> None:
        try:
            self._rewrite()
        except OSError as error:
            raise self._failed(error) from error

    def _rewrite(self) -> None:
        state = self._state
        self._pending.clear()
        self._close_file()
        content = records.encode_file(state.term, state.vote, state.entries)
        state.end = replace_file(self._disk, NAME, (content,))
        self._file = self._disk.open(NAME)
        self._reserved = state.end

    def _failed(self, error: OSError) -> DiskFailed:
        self._close_file()
        self._failure = DiskFailed("the journal cannot be written", error, self._path)
        return self._failure

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            # All that counts was synced before, or is given up: close(2) has nothing to add.
            with contextlib.suppress(OSError):
                file.close()


def check_beside_snapshot(journal: Journal, snapshot_index: int, path: str) -> None:
    """Raise LogDamaged where entries are missing between the snapshot and the journal."""
    if len(journal) and journal.first > snapshot_index:
        raise LogDamaged(
            f"entries {snapshot_index + 1} to {journal.first - 1} are missing "
            "between the snapshot and the journal",
            path,
            0,
        )
