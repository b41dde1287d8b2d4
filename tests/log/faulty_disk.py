"""A real folder whose writes and syncs fail from the n-th on, until it is mended."""

from __future__ import annotations

import os
from pathlib import Path

from reconciler.log.disk import OsDisk, OsFile


class Faults:
    """What a test rules; outlives each opening of the folder."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._from: int | None = None
        self._code = 0

    def arm(self, number: int, code: int) -> None:
        """The operation `number`, counted from 0, fails, and all behind it."""
        self._from, self._code = number, code

    def mend(self) -> None:
        self._from = None

    def pass_through(self, name: str) -> None:
        self.done.append(name)
        if self._from is not None and len(self.done) > self._from:
            raise OSError(self._code, os.strerror(self._code))


class FaultyFile:
    def __init__(self, file: OsFile, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def write_at(self, offset: int, data: bytes) -> None:
        try:
            self._faults.pass_through("write")
        except OSError:
            self._file.write_at(offset, data[: len(data) // 2])
            raise
        self._file.write_at(offset, data)

    def reserve(self, offset: int, length: int) -> None:
        self._faults.pass_through("reserve")
        self._file.reserve(offset, length)

    def sync(self) -> None:
        self._faults.pass_through("sync")
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class FaultyDisk:
    def __init__(self, folder: Path, faults: Faults) -> None:
        self._disk, self._faults = OsDisk(folder), faults

    def read(self, name: str) -> bytes | None:
        return self._disk.read(name)

    def read_stored(self, name: str) -> bytes | None:
        return self._disk.read_stored(name)

    def create(self, name: str) -> FaultyFile:
        self._faults.pass_through("create")
        return FaultyFile(self._disk.create(name), self._faults)

    def open(self, name: str) -> FaultyFile:
        return FaultyFile(self._disk.open(name), self._faults)

    def rename(self, old: str, new: str) -> None:
        self._faults.pass_through("rename")
        self._disk.rename(old, new)

    def remove(self, name: str) -> None:
        self._disk.remove(name)

    def sync_folder(self) -> None:
        self._faults.pass_through("sync_folder")
        self._disk.sync_folder()

    def where(self, name: str) -> str:
        return self._disk.where(name)

    def close(self) -> None:
        self._disk.close()
