"""Bytes to checked text, and offsets to lines and columns; the bounds that come before grammar."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping

from reconciler.language.problems import Flaw, Problem

MAX_FILES = 1_000
MAX_FILE_BYTES = 256 * 1024
MAX_MANIFEST_BYTES = 2 * 1024 * 1024

# Control characters, marks that turn the direction of text round (they make a file read
# differently from what it says), line separators that editors count and we do not, and a
# byte order mark anywhere but in front.
_REFUSED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff]"
)


class Source:
    """One file's text. Line ends are LF whatever they were; columns are not moved by that."""

    __slots__ = ("_starts", "file", "text")

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self.text = text
        self._starts: list[int] = []

    def position(self, offset: int) -> tuple[int, int]:
        """(line, column) of an offset into `text`, both from 1, in characters."""
        if not self._starts:
            self._starts = [0, *(m.end() for m in re.finditer("\n", self.text))]
        line = bisect_right(self._starts, min(offset, len(self.text)))
        return line, min(offset, len(self.text)) - self._starts[line - 1] + 1

    def problem(self, flaw: Flaw) -> Problem:
        """The flaw with its place."""
        line, column = self.position(flaw.offset)
        return Problem(self.file, line, column, flaw.message, flaw.hint)


def over_bounds(files: Mapping[str, bytes]) -> Problem | None:
    """What is too much about the files together, before any of them is looked at."""
    first = min(files, default="")
    if len(files) > MAX_FILES:
        return Problem(first, 1, 1, f"{len(files)} files; a manifest has at most {MAX_FILES}",
                       "split it into several sources")
    for file in sorted(files):
        if len(files[file]) > MAX_FILE_BYTES:
            return Problem(file, 1, 1, f"the file is {len(files[file])} bytes, over 256 KiB",
                           "split it: all files of a folder are one manifest")
    total = sum(map(len, files.values()))
    if total > MAX_MANIFEST_BYTES:
        return Problem(first, 1, 1, f"the files are {total} bytes together, over 2 MiB",
                       "split it into several sources")
    return None


class Refused(Exception):
    """A file that cannot be read at all; `source` is what could, for the flaw's place."""

    def __init__(self, source: Source, flaw: Flaw) -> None:
        super().__init__(flaw.message)
        self.source = source
        self.flaw = flaw


def read_source(file: str, data: bytes) -> Source:
    """Checked text of one file; raises `Refused` at what cannot be read."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        before = data[: error.start].decode("utf-8").removeprefix("\ufeff")
        flaw = Flaw(len(before), "the file is not valid UTF-8", "save it as UTF-8 text")
        raise Refused(Source(file, before), flaw) from None
    source = Source(file, text.removeprefix("\ufeff").replace("\r\n", "\n"))
    found = _REFUSED.search(source.text)
    if found:
        code = ord(found[0])
        if code == 13:
            raise Refused(source, Flaw(found.start(), "a carriage return without a line feed",
                                       "end lines with LF or CRLF"))
        raise Refused(source, Flaw(found.start(), f"the character U+{code:04X} is refused",
                                   r"remove it; in a string write \uXXXX"))
    return source
