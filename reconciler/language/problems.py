"""What is wrong with a manifest, as values: where, what, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from reconciler.errors import Unprocessable

MAX_PROBLEMS = 50  # more would bury the first; the rest is counted
_QUOTE_CHARS = 60  # of the text that a message repeats
_LINE_CHARS = 120  # of a source line above its caret


class Problem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One mistake. `line` and `column` count from 1, in characters of the file as written."""

    file: str
    line: int
    column: int
    message: str
    hint: str = ""

    @property
    def at(self) -> str:
        """`FILE:LINE:COLUMN`, as an editor or a terminal follows it."""
        return f"{printable(self.file)}:{self.line}:{self.column}"


class InvalidManifest(Unprocessable):
    """A manifest that cannot run: its first 50 problems in order, and how many more it has."""

    def __init__(self, problems: Sequence[Problem], omitted: int = 0) -> None:
        self.problems = tuple(problems)
        self.omitted = omitted
        count = len(self.problems) + omitted
        what = "the manifest has a problem" if count == 1 else f"the manifest has {count} problems"
        first = self.problems[0] if self.problems else None
        if first is not None:
            what += f": {first.message}" if count == 1 else f"; the first: {first.message}"
        super().__init__(what, at=first.at if first else "", hint=first.hint if first else "")


class Flaw(Exception):
    """A problem on its way up, still as an offset into the text being read."""

    def __init__(self, offset: int, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.offset = offset
        self.message = message
        self.hint = hint


def printable(text: str) -> str:
    r"""`text` for one line of a terminal: what is not printable becomes `\xNN` or `\uNNNN`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(text: str) -> str:
    """`text` in backticks, printable and cut, as messages name what was written."""
    cut = text if len(text) <= _QUOTE_CHARS else text[: _QUOTE_CHARS - 1] + "…"
    return f"`{printable(cut)}`"


def render(problem: Problem, text: str = "") -> str:
    """One problem for a person; `text` is its file as written, for the caret line.

    `error: WHAT`, `at FILE:LINE:COLUMN`, the line with a caret below, `hint: WHAT TO DO`.
    """
    lines = [f"error: {printable(problem.message)}", f"  at {problem.at}"]
    lines += _caret(problem, text)
    if problem.hint:
        lines.append(f"hint: {printable(problem.hint)}")
    return "\n".join(lines)


def render_all(problems: Sequence[Problem], omitted: int, texts: dict[str, str]) -> str:
    """Every problem with an empty line between, then how many more there are."""
    parts = [render(problem, texts.get(problem.file, "")) for problem in problems]
    if omitted:
        parts.append(f"and {omitted} more")
    return "\n\n".join(parts)


def _caret(problem: Problem, text: str) -> list[str]:
    lines = text.removeprefix("\ufeff").split("\n") if text else []
    if not 1 <= problem.line <= len(lines):
        return []
    line = lines[problem.line - 1].removesuffix("\r")
    if not line.strip():
        return []
    # A long line is cut around the caret; tabs become single spaces so that columns stay true.
    start = max(0, problem.column - _LINE_CHARS // 2) if len(line) > _LINE_CHARS else 0
    shown = "".join(c if c.isprintable() else " " for c in line[start : start + _LINE_CHARS])
    gutter = " " * len(str(problem.line))
    caret = " " * max(0, problem.column - 1 - start) + "^"
    return [f"  {problem.line} | {shown}", f"  {gutter} | {caret}"]
