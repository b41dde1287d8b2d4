"""The log's only door to the file system, so that a test or a simulated disk can stand in.

Nothing here is retried: after a failed write or sync nobody knows what the disk holds
(the kernel may have dropped the dirty pages), so the caller has to close its files. How
they are opened again is in `reopening`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from reconciler.log.errors import DiskFailed, LogFailed


class File(Protocol):
    """One open file. All methods raise OSError."""

    def write_at(self, offset: int, data: bytes) -> None:
        """Write all of `data`; durable only after `sync`."""
        ...

    def reserve(self, offset: int, length: int) -> None:
        """Make room filled with zeros, so that later syncs touch no metadata."""
        ...

    def sync(self) -> None:
        """Return once everything written is on the disk."""
        ...

    def close(self) -> None:
        """Give the file back, without syncing it."""
        ...


class Disk(Protocol):
    """One folder. All methods raise OSError."""

    def read(self, name: str) -> bytes | None:
        """The whole content, or None where there is no such file."""
        ...

    def read_stored(self, name: str) -> bytes | None:
        """As `read`, but of the disk: clean pages are dropped from the kernel's cache first."""
        ...

    def create(self, name: str) -> File:
        """A new empty file, in place of any of that name."""
        ...

    def open(self, name: str) -> File:
        """An existing file, to write into."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Put `old` in the place of `new`; durable only after `sync_folder`."""
        ...

    def remove(self, name: str) -> None:
        """Take a file away; nothing where there is none."""
        ...

    def sync_folder(self) -> None:
        """Return once the names are on the disk."""
        ...

    def where(self, name: str) -> str:
        """The path for messages."""
        ...


def replace_file(disk: Disk, name: str, parts: Iterable[bytes]) -> int:
    """Put a whole new content in the place of `name`, all of it or nothing; returns its size.

    Written beside, synced, renamed, the folder synced: the old content stays until the
    new one is durable.
    """
    beside = f"{name}.new"
    offset = 0
    try:
        file = disk.create(beside)
        try:
            for part in parts:
                file.write_at(offset, part)
                offset += len(part)
            file.sync()
        finally:
            file.close()
    except OSError:
        # Half a file must not keep a full disk full. What went wrong first is what is told.
        with contextlib.suppress(OSError):
            disk.remove(beside)
        raise
    disk.rename(beside, name)
    disk.sync_folder()
    return offset


class OsFile:
    """A file descriptor."""

    def __init__(self, path: Path, flags: int) -> None:
        self._fd = os.open(path, flags | os.O_CLOEXEC, 0o600)

    def write_at(self, offset: int, data: bytes) -> None:
        """Write all of `data`; the kernel may take it in pieces."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, offset)
            view = view[written:]
            offset += written

    def reserve(self, offset: int, length: int) -> None:
        """Allocate, and make the new length durable now."""
        os.posix_fallocate(self._fd, offset, length)
        os.fsync(self._fd)

    def sync(self) -> None:
        """Fdatasync: the data and the length."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self._fd)


class OsDisk:
    """A real folder, root-only, held by one process at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskFailed("the log's folder cannot be opened", error, str(folder)) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise LogFailed(
                "another process holds this log", at=str(folder), hint="stop the other agent first"
            ) from error

    def read(self, name: str) -> bytes | None:
        """The whole content, or None."""
        try:
            return (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None

    def read_stored(self, name: str) -> bytes | None:
        """The whole content; what is dirty still comes from the cache (posix_fadvise(2))."""
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        return self.read(name)

    def create(self, name: str) -> OsFile:
        """A new empty file."""
        return OsFile(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    def open(self, name: str) -> OsFile:
        """An existing file."""
        return OsFile(self._folder / name, os.O_RDWR)

    def rename(self, old: str, new: str) -> None:
        """Atomic within the folder (rename(2))."""
        os.replace(self._folder / old, self._folder / new)

    def remove(self, name: str) -> None:
        """Unlink."""
        (self._folder / name).unlink(missing_ok=True)

    def sync_folder(self) -> None:
        """Fsync of the folder itself: without it a rename may be undone by a power cut."""
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def where(self, name: str) -> str:
        """The path for messages."""
        return str(self._folder / name)

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)
