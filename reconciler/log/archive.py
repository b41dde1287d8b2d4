"""The archive: what compaction takes out of the log, kept a while to look back at.

When a snapshot replaces journal entries, the files that it replaces get a second name here
(link(2)): the snapshot that was, and the journal that led from it to the new one. No byte is
copied; both files verify themselves as they did in the log. The log replaces files and never
writes into one that it has replaced, so what stands here does not change.

Nothing here may hinder the log: what fails is logged, and that part of the past is not held.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reconciler.errors import NotFound
from reconciler.log import journal, records, snapshot
from reconciler.log.errors import LogDamaged
from reconciler.log.records import Entry

FOLDER = "archive"
MAX_AGE_S = 7 * 24 * 3600.0
MAX_BYTES = 1 << 30
"""Seven days or 1 GiB, the smaller (contracts: Defaults); and never more than is free beside it,
so that the past does not fill the disk that the log needs."""
MAX_FILES = 4096
"""Bounds the walk of the folder where snapshots are small; at 8 MiB each it is never reached."""
MAX_REPLAY_BYTES = 256 << 20
"""Of commands for one answer: many times what lies between two snapshots."""

_NAME = re.compile(r"(snapshot)-(\d{1,19})|(journal)-(\d{1,19})-(\d{1,19})", re.ASCII)
_log = logging.getLogger(__name__)


class NotHeld(NotFound):
    """The log reaches back only so far; `oldest` is the next index that it can show."""

    def __init__(self, index: int, oldest: int) -> None:
        super().__init__(
            f"index {index} is no longer held; the oldest that is held from there on is {oldest}",
            hint=f"ask for {oldest} or later",
        )
        self.index, self.oldest = index, oldest


@dataclass(frozen=True)
class Past:
    """How a state came about: `base` is a snapshot's state (None: the very beginning) after
    `base_index`, `commands` what followed, each with its index."""

    base_index: int
    base: bytes | None
    commands: list[tuple[int, bytes]]


@dataclass(frozen=True)
class _Segment:
    """A journal that holds at least the entries above `base`, up to `last`, all committed."""

    base: int
    last: int
    path: Path


@dataclass(frozen=True)
class _Held:
    snapshots: dict[int, Path]
    segments: list[_Segment]


def _free_bytes(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


class Archive:
    """The folder `archive` within a log's own. `now` gives seconds since the epoch.

    `keep` is for the raft thread; `past` for any other, also while the first one writes.
    """

    def __init__(
        self, log_folder: Path, now: Callable[[], float], *,
        max_age_s: float = MAX_AGE_S, max_bytes: int = MAX_BYTES,
        free_bytes: Callable[[Path], int] = _free_bytes,
    ) -> None:
        self._log_folder, self._folder = log_folder, log_folder / FOLDER
        self._now = now
        self._max_age_s, self._max_bytes = max_age_s, max_bytes
        self._free_bytes = free_bytes
        self._damaged: set[Path] = set()

    def keep(self, base: int, last: int) -> None:
        """Called before the log lets go of its snapshot at `base` (0: none) and of the journal
        from there to `last`, which is applied, so committed, and synced. Never raises."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            if base:
                self._link(snapshot.NAME, f"snapshot-{base}")
            if last > base:
                self._link(journal.NAME, f"journal-{base}-{last}")
            self._prune()
            _sync_folder(self._folder)
        except OSError as error:
            _log.warning("archive_failed path=%s reason=%s", self._folder, error)

    def past(self, index: int, live: list[Entry]) -> Past:
        """What led to the state at `index`, which is applied; raises NotHeld.

        `live` is a copy of the journal's entries, taken before the call: what compaction moves
        meanwhile is in it or in the archive.
        """
        held = self._held()
        for base in sorted({0, *held.snapshots}, reverse=True):
            if base > index:
                continue
            entries = self._between(base, index, live, held.segments)
            if entries is None:
                continue
            if base == 0:
                return Past(0, None, _commands(entries))
            # Replaced since its index was read, the log's own snapshot is in the archive by now.
            for path in (held.snapshots[base], self._folder / f"snapshot-{base}"):
                stored = self._snapshot(path)
                if stored is not None and stored.index == base:
                    return Past(base, stored.state, _commands(entries))
        later = [
            base for base, path in held.snapshots.items()
            if base > index and path not in self._damaged
        ]
        raise NotHeld(index, min(later, default=live[-1].index if live else index + 1))

    def _held(self) -> _Held:
        snapshots: dict[int, Path] = {}
        segments: list[_Segment] = []
        for name in self._names():
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            if match[1]:
                snapshots[int(match[2])] = self._folder / name
            else:
                segments.append(_Segment(int(match[4]), int(match[5]), self._folder / name))
        present = self._snapshot_index()
        if present is not None:
            snapshots[present] = self._log_folder / snapshot.NAME
        return _Held(snapshots, sorted(segments, key=lambda each: (each.base, each.last)))

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._folder)
        except OSError:
            return []

    def _snapshot_index(self) -> int | None:
        """Of the log's own snapshot. One that is replaced just now is in the archive as well."""
        try:
            with (self._log_folder / snapshot.NAME).open("rb") as file:
                return snapshot.index_of(file.read(snapshot.HEAD_BYTES))
        except OSError:
            return None

    def _between(
        self, base: int, index: int, live: list[Entry], segments: list[_Segment]
    ) -> list[Entry] | None:
        """The entries above `base` up to `index`, or None where one of them is not held."""
        taken: list[Entry] = []
        size = 0
        while base < index:
            piece = _above(live, base, index) or self._from_segments(base, index, segments)
            if not piece:
                return None
            size += sum(len(entry.command) for entry in piece)
            if size > MAX_REPLAY_BYTES:
                return None
            taken += piece
            base = piece[-1].index
        return taken

    def _from_segments(self, base: int, index: int, segments: list[_Segment]) -> list[Entry]:
        for segment in reversed(segments):
            if segment.base <= base < segment.last and segment.path not in self._damaged:
                piece = _above(self._segment(segment), base, min(index, segment.last))
                if piece:
                    return piece
        return []

    def _segment(self, segment: _Segment) -> list[Entry]:
        path = segment.path
        try:
            return records.recover(path.read_bytes(), str(path)).entries
        except OSError:
            return []  # it grew too old just now
        except LogDamaged as error:
            self._distrust(path, error)
            return []

    def _snapshot(self, path: Path) -> snapshot.Snapshot | None:
        try:
            return snapshot.decode(path.read_bytes(), str(path))
        except OSError:
            return None
        except LogDamaged as error:
            self._distrust(path, error)
            return None

    def _distrust(self, path: Path, error: LogDamaged) -> None:
        _log.error("archive_damaged reason=%s", error)
        if path.parent == self._folder:  # the log's own changes, and is the log's own business
            self._damaged.add(path)

    def _link(self, source: str, name: str) -> None:
        target = self._folder / name
        # Killed between this and the log's own step, the same name comes again, and the file
        # may have grown since.
        target.unlink(missing_ok=True)
        os.link(self._log_folder / source, target)

    def _prune(self) -> None:
        """Oldest first, until what is left is young and small enough.

        A snapshot goes with the journals that begin at it: as long as one of their entries is
        young, it is needed.
        """
        held = self._held()
        present = self._log_folder / snapshot.NAME
        named = [(base, path) for base, path in held.snapshots.items() if path != present]
        named += [(segment.base, segment.path) for segment in held.segments]
        groups: dict[int, dict[Path, os.stat_result]] = {}
        for base, path in named:
            groups.setdefault(base, {})[path] = path.stat()
        files = sum(map(len, groups.values()))
        total = sum(stat.st_size for group in groups.values() for stat in group.values())
        oldest_s = self._now() - self._max_age_s
        limit = min(self._max_bytes, self._free_bytes(self._folder))
        for _, group in sorted(groups.items()):
            young = max(stat.st_mtime for stat in group.values()) >= oldest_s
            if young and total <= limit and files <= MAX_FILES:
                return
            for path, stat in group.items():
                path.unlink()
                files, total = files - 1, total - stat.st_size


def _above(entries: list[Entry], base: int, index: int) -> list[Entry]:
    """Those above `base` up to `index`, where the first of them is there."""
    if not entries or not entries[0].index <= base + 1 <= entries[-1].index:
        return []
    first = entries[0].index
    return entries[base + 1 - first : index + 1 - first]


def _commands(entries: list[Entry]) -> list[tuple[int, bytes]]:
    """What the machine is given; an entry without a command is Raft's own."""
    return [
        (entry.index, entry.command[1:]) for entry in entries
        if entry.command[:1] == records.COMMAND
    ]


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
