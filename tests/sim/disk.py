"""A disk that forgets what was not synced, and tears what it was writing.

It fills up, and it fails. A failed sync leaves its pages in the cache as if they were
written, and no later sync writes them (as ext4 and XFS have it); so with names.
"""

from __future__ import annotations

import errno
import random


class SimFile:
    """One inode: what is on the platter, and what is only in the page cache."""

    def __init__(self, disk: SimDisk) -> None:
        self._disk = disk
        self.durable = bytearray()
        self.current = bytearray()
        self._writes: list[tuple[int, bytes]] = []

    def write_at(self, offset: int, data: bytes) -> None:
        try:
            self._disk.check_space()
        except OSError:
            self._write(offset, data[: self._disk.rng.randrange(len(data) + 1)])
            raise
        self._write(offset, data)

    def _write(self, offset: int, data: bytes) -> None:
        _put(self.current, offset, data)
        self._writes.append((offset, bytes(data)))

    def reserve(self, offset: int, length: int) -> None:
        self._disk.check_space()
        # Kept small: the real figure would only make each simulated crash copy megabytes.
        length = min(length, 4096)
        _put(self.current, offset, bytes(length))
        _put(self.durable, offset, bytes(length))

    def sync(self) -> None:
        self._disk.syncs += 1
        try:
            self._disk.check_sync()
        except OSError:
            self._store_some(self._disk.rng)
            raise
        if self._disk.lies:
            return
        for offset, data in self._writes:
            _put(self.durable, offset, data)
        self._writes.clear()

    def close(self) -> None:
        """The page cache outlives the descriptor."""

    def forget_clean(self) -> None:
        """The cache lets go of all but what still waits to be written."""
        self.current = bytearray(self.durable)
        for offset, data in self._writes:
            _put(self.current, offset, data)

    def crash(self, rng: random.Random) -> None:
        self._store_some(rng)
        self.current = bytearray(self.durable)

    def _store_some(self, rng: random.Random) -> None:
        """Of each unsynced write any part may reach the platter, in any order; no more of it."""
        for offset, data in self._writes:
            kind = rng.random()
            if kind < 0.4:
                continue
            if kind < 0.7:
                _put(self.durable, offset, data[: rng.randrange(len(data) + 1)])
                continue
            sector = rng.choice((16, 64, 512))
            for start in range(0, len(data), sector):
                if rng.random() < 0.7:
                    _put(self.durable, offset + start, data[start : start + sector])
        self._writes.clear()


class SimDisk:
    """One folder of one node; implements `reconciler.log.disk.Disk`."""

    def __init__(self, name: str, rng: random.Random | None = None) -> None:
        self._name = name
        self.rng = rng or random.Random(name)
        self._names: dict[str, SimFile] = {}
        self._durable_names: dict[str, SimFile] = {}
        self._changes: list[tuple[str, str | None, SimFile]] = []  # name, old name, inode
        self._lost: set[str] = set()  # names that only the cache has, after a failed sync
        self.full = False
        self.broken = False
        self.flaky = 0.0  # how likely any write or sync fails
        self.nameless = 0.0  # how likely a sync of the folder fails
        self.lies = False
        self.syncs = 0

    @property
    def faulty(self) -> bool:
        return self.full or self.broken or self.flaky > 0.0 or self.nameless > 0.0

    def mend(self) -> None:
        """There is room again, and writes are taken; what was lost stays lost."""
        self.full, self.broken, self.flaky = False, False, 0.0
        self.nameless = 0.0

    def check_space(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._check_luck()

    def check_sync(self) -> None:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        self._check_luck()

    def _check_names(self) -> None:
        if self.nameless and self.rng.random() < self.nameless:
            raise OSError(errno.EIO, "Input/output error")

    def _check_luck(self) -> None:
        if self.flaky and self.rng.random() < self.flaky:
            raise OSError(errno.EIO, "Input/output error")

    def read(self, name: str) -> bytes | None:
        file = self._names.get(name)
        return None if file is None else bytes(file.current)

    def read_stored(self, name: str) -> bytes | None:
        if name in self._names:
            self._names[name].forget_clean()
        return self.read(name)

    def create(self, name: str) -> SimFile:
        self.check_space()
        self._lost.discard(name)
        file = self._names[name] = SimFile(self)
        self._changes.append((name, None, file))
        return file

    def open(self, name: str) -> SimFile:
        if name not in self._names:
            raise FileNotFoundError(errno.ENOENT, "No such file", name)
        return self._names[name]

    def rename(self, old: str, new: str) -> None:
        file = self._names.pop(old)
        self._names[new] = file
        self._lost.discard(new)
        self._changes.append((new, old, file))

    def remove(self, name: str) -> None:
        self._names.pop(name, None)

    def sync_folder(self) -> None:
        try:
            self.check_sync()
            self._check_names()
        except OSError:
            if self.rng.random() < 0.5:
                self._lost.update(name for name, _, _ in self._changes)
                self._changes.clear()
            raise
        if not self.lies:
            for name, file in self._names.items():
                if name not in self._lost:
                    self._durable_names[name] = file
            for name in self._durable_names.keys() - self._names.keys() - self._lost:
                del self._durable_names[name]
            self._changes.clear()

    def where(self, name: str) -> str:
        return f"{self._name}/{name}"

    def crash(self, rng: random.Random) -> None:
        """Power cut: names change in order, so some first of them survive; bytes in none."""
        for name, old, file in self._changes[: rng.randrange(len(self._changes) + 1)]:
            self._durable_names[name] = file
            if old is not None:
                self._durable_names.pop(old, None)
        self._changes.clear()
        self._lost.clear()
        self._names = dict(self._durable_names)
        for name in sorted(self._names):
            self._names[name].crash(rng)

    def flip(self, name: str, offset: int, mask: int) -> None:
        """Rot: change one byte on the platter and in the cache."""
        file = self._names[name]
        file.durable[offset] ^= mask
        file.current[offset] ^= mask


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if len(content) < offset:
        content += bytes(offset - len(content))
    content[offset : offset + len(data)] = data
