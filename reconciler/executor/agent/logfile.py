"""The file of one allocation's output: lines in, stamped and rotated; lines out, tail and follow.

`FOLDER/current` takes at most 10 MB, then becomes `current.1`, and that `current.2`; the oldest
goes. A line in it is `2026-01-31T12:00:00.000001Z stdout TEXT`; the stamp has one width, so it
sorts as text, and no two lines of an allocation share one, so it names a line.
"""

from __future__ import annotations

import calendar
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

FILE_BYTES = 10 * 1024 * 1024
NAMES = ("current", "current.1", "current.2")  # newest first
LINE_BYTES = 16 * 1024  # longer ones are split, so that no reader has to hold more
BLOCK_BYTES = 256 * 1024
_SECOND_US = 1_000_000
_STAMP = re.compile(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


class LogLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of output; `ts` is RFC 3339 in UTC with microseconds, `stream` stdout or stderr."""

    ts: str
    stream: str
    line: str


class LineSplitter:
    """Bytes of one stream in, whole lines out; holds back the unfinished one."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that `data` completes, without newlines, in pieces of at most LINE_BYTES."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) <= LINE_BYTES and max(map(len, lines), default=0) <= LINE_BYTES:
            return lines
        pieces = [piece for line in lines for piece in _pieces(line)]
        *whole, self._rest = _pieces(self._rest)
        return pieces + whole

    def flush(self) -> list[bytes]:
        """The unfinished line, if there is one."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


class LogFile:
    """Appends stamped lines to `folder/current`; a full disk costs lines, never the process."""

    def __init__(self, folder: Path, file_bytes: int = FILE_BYTES) -> None:
        self._folder = folder
        self._file_bytes = file_bytes
        self._lost_lines = 0
        last = tail(folder, 1)
        self._last_us = _microseconds(last[0].ts) if last else 0
        self._open()

    def append(self, stream: bytes, lines: list[bytes]) -> None:
        """Write lines of `stream`, each with a stamp of its own, later than all before."""
        told = b""
        if self._lost_lines:
            text = b"mill: %d lines of this log were lost: the disk was full" % self._lost_lines
            told = self._stamped(b"stderr", [text])
        # In one write: a disk with room for the notice alone would be filled with notices.
        if self._write(told + self._stamped(stream, lines)):
            self._lost_lines = 0
        else:
            self._lost_lines += len(lines)

    def close(self) -> None:
        """Close the file; nothing is held back in memory."""
        os.close(self._file)

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._file = os.open(self._folder / NAMES[0], flags, 0o600)
        self._size = os.fstat(self._file).st_size
        if self._size and os.pread(self._file, 1, self._size - 1) != b"\n":
            self._size += os.write(self._file, b"\n")  # a write that a kill tore

    def _stamped(self, stream: bytes, lines: list[bytes]) -> bytes:
        start_us = max(time.time_ns() // 1000, self._last_us + 1)
        self._last_us = start_us + len(lines) - 1
        blocks = []
        while lines:
            second, us = divmod(start_us, _SECOND_US)
            now, lines = lines[: _SECOND_US - us], lines[_SECOND_US - us :]
            to_second = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second)).encode()
            form = to_second + b"%06dZ " + stream + b" %b\n"
            blocks.extend([form % pair for pair in enumerate(now, us)])
            start_us += len(now)
        return b"".join(blocks)

    def _write(self, block: bytes) -> bool:
        try:
            if self._size and self._size + len(block) > self._file_bytes:
                self._rotate()
            if os.write(self._file, block) == len(block):
                self._size += len(block)
                return True
        except OSError:
            pass  # no space, or a disk that fails: told in the log as soon as it takes lines again
        with suppress(OSError):
            os.ftruncate(self._file, self._size)
        return False

    def _rotate(self) -> None:
        for older, newer in ((2, 1), (1, 0)):
            with suppress(FileNotFoundError):
                os.replace(self._folder / NAMES[newer], self._folder / NAMES[older])
        full = self._file
        self._open()
        os.close(full)


class Follower:
    """Reads an allocation's lines in order, once each, across rotations. Blocking; one caller."""

    def __init__(self, folder: Path, after: str) -> None:
        self._folder = folder
        self._after = after
        self._file: BinaryIO | None = None

    def read(self) -> list[LogLine]:
        """The next lines, at most about BLOCK_BYTES of them; none where there is nothing new."""
        if self._file is None:
            self._file = self._first_file()
        while self._file is not None:
            rotated = self._is_rotated(self._file)  # before reading: then its end is final
            read_bytes, found = _whole_lines(self._file)
            lines = [line for line in found if line.ts > self._after]
            if lines:
                self._after = lines[-1].ts
                return lines
            if not read_bytes:
                if not rotated:
                    return []
                following = self._next_file()
                if following is None:
                    return []
                self.close()
                self._file = following
        return []

    def close(self) -> None:
        """Close the file that is being read."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _first_file(self) -> BinaryIO | None:
        """The newest file that begins at or before `after`; the oldest where none does."""
        with ExitStack() as stack:
            files = _open_all(self._folder, stack)
            chosen = next((f for f in files if _first_ts(f) <= self._after), None)
            return _taken(chosen or (files[-1] if files else None), stack)

    def _next_file(self) -> BinaryIO | None:
        """The oldest file that begins after the last line read; None while there is none."""
        with ExitStack() as stack:
            files = reversed(_open_all(self._folder, stack))
            return _taken(next((f for f in files if _first_ts(f) > self._after), None), stack)

    def _is_rotated(self, file: BinaryIO) -> bool:
        try:
            return (self._folder / NAMES[0]).stat().st_ino != os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            return True


def tail(folder: Path, count: int) -> list[LogLine]:
    """The last `count` lines, oldest first; none where there is no such allocation. Blocking."""
    lines: list[LogLine] = []  # newest first
    with ExitStack() as stack:
        for file in _open_all(folder, stack):
            for line in _lines_backwards(file):
                if len(lines) >= count:
                    break
                lines.append(line)
    return lines[::-1]


def decoded(line: bytes) -> LogLine | None:
    """A line of the file; None for what a kill tore."""
    stamp, _, rest = line.partition(b" ")
    stream, space, text = rest.partition(b" ")
    if not space or not _STAMP.fullmatch(stamp) or stream not in (b"stdout", b"stderr"):
        return None
    return LogLine(stamp.decode(), stream.decode(), text.decode(errors="replace"))


def _pieces(line: bytes) -> list[bytes]:
    """`line` cut at LINE_BYTES, but not inside a character of UTF-8 (RFC 3629)."""
    pieces = []
    while len(line) > LINE_BYTES:
        cut = LINE_BYTES
        while cut > LINE_BYTES - 4 and line[cut] & 0xC0 == 0x80:
            cut -= 1
        pieces.append(line[:cut])
        line = line[cut:]
    return [*pieces, line]


def _microseconds(ts: str) -> int:
    seconds = calendar.timegm(time.strptime(ts[:19], "%Y-%m-%dT%H:%M:%S"))
    return seconds * _SECOND_US + int(ts[20:26])


def _whole_lines(file: BinaryIO) -> tuple[int, list[LogLine]]:
    """The bytes read and the lines in them; an unfinished line stays for the next time."""
    block = file.read(BLOCK_BYTES)
    end = block.rfind(b"\n") + 1
    file.seek(end - len(block), os.SEEK_CUR)
    return end, [line for raw in block[:end].split(b"\n") if (line := decoded(raw))]


def _first_ts(file: BinaryIO) -> str:
    """The stamp of the first line; one that is later than any in an empty file."""
    start = os.pread(file.fileno(), 27, 0)
    return start.decode("ascii", "replace") if len(start) == 27 else "~"


def _lines_backwards(file: BinaryIO) -> Iterator[LogLine]:
    end = file.seek(0, os.SEEK_END)
    rest = b""
    while end:
        start = max(0, end - BLOCK_BYTES)
        raw = os.pread(file.fileno(), end - start, start) + rest
        rest, *lines = raw.split(b"\n") if start else [b"", *raw.split(b"\n")]
        yield from (line for one in reversed(lines) if (line := decoded(one)))
        end = start


def _open_all(folder: Path, stack: ExitStack) -> list[BinaryIO]:
    """The files that exist, newest first, all from between the same two rotations."""
    for _ in range(10):  # a rotation takes 10 MB of output; even one retry is rare
        files: list[BinaryIO] = []
        for name in NAMES:
            with suppress(FileNotFoundError):
                files.append(stack.enter_context((folder / name).open("rb")))
        if [os.fstat(file.fileno()).st_ino for file in files] == _inodes(folder):
            break
        stack.close()
    return files


def _inodes(folder: Path) -> list[int]:
    found = []
    for name in NAMES:
        with suppress(FileNotFoundError):
            found.append((folder / name).stat().st_ino)
    return found


def _taken(file: BinaryIO | None, stack: ExitStack) -> BinaryIO | None:
    """`file` under a descriptor of its own, because `stack` closes the one it has."""
    if file is None:
        return None
    return os.fdopen(os.dup(file.fileno()), "rb")
