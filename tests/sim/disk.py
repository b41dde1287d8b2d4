"""A disk that forgets what was not synced, and tears what it was writing."""

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
        self._disk.check_space()
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
        self._disk.check_sync()
        if self._disk.lies:
            return
        for offset, data in self._writes:
            _put(self.durable, offset, data)
        self._writes.clear()

    def close(self) -> None:
        """The page cache outlives the descriptor."""

    def crash(self, rng: random.Random) -> None:
        """Of each unsynced write any part may have reached the platter, in any order."""
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
        self.current = bytearray(self.durable)


class SimDisk:
    """One folder of one node; implements `reconciler.log.disk.Disk`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._names: dict[str, SimFile] = {}
        self._durable_names: dict[str, SimFile] = {}
        self._changes: list[tuple[str, str | None, SimFile]] = []  # name, old name, inode
        self.full = False
        self.broken = False
        self.lies = False
        self.syncs = 0

    def check_space(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")

    def check_sync(self) -> None:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")

    def read(self, name: str) -> bytes | None:
        file = self._names.get(name)
        return None if file is None else bytes(file.current)

    def create(self, name: str) -> SimFile:
        self.check_space()
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
        self._changes.append((new, old, file))

    def sync_folder(self) -> None:
        self.check_sync()
        if not self.lies:
            self._durable_names = dict(self._names)
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
