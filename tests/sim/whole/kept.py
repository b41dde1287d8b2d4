"""An agent's newest term on a disk that may lose what was not synced, names included."""

from __future__ import annotations

import contextlib
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

from reconciler.executor.agent.terms import Terms


class KeptTerms(Terms):
    """The real one, over a real file; what would be left of it after a power cut is known.

    A file's content is there after its sync, its name after that of its folder (POSIX).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = path
        self._surely: bytes | None = None  # what a power cut cannot take away; None: no file
        self._perhaps: list[bytes | None] = []  # what it may leave instead

    def keep(self, term: int) -> None:
        with _syncs() as synced:
            super().keep(term)
        now = self._now()
        inode = self._file.stat().st_ino if self._file.exists() else 0
        if inode not in synced:
            now, synced = b"", []
        if synced[-1:] == [0]:
            self._surely, self._perhaps = now, []
        else:
            self._perhaps.append(now)

    def cut_power(self, rng: random.Random) -> None:
        """Leave one of what may be left."""
        left = rng.choice([self._surely, *self._perhaps]) if self._perhaps else self._surely
        self._perhaps, self._surely = [], left
        self._file.unlink(missing_ok=True)
        if left is not None:
            self._file.write_bytes(left)

    def _now(self) -> bytes | None:
        return self._file.read_bytes() if self._file.exists() else None


@contextlib.contextmanager
def _syncs() -> Iterator[list[int]]:
    """The inodes that are synced meanwhile, in order; 0 for a folder."""
    synced: list[int] = []
    sync = os.fsync

    def watched(descriptor: int) -> None:
        found = os.fstat(descriptor)
        synced.append(0 if stat.S_ISDIR(found.st_mode) else found.st_ino)

    os.fsync = watched  # type: ignore[assignment]  # of the two that it takes, the one used here
    try:
        yield synced
    finally:
        os.fsync = sync
