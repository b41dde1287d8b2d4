"""The documents as tests see them: pages, fences, inline code, tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "examples").rglob("*.md")))

_FENCE = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True)
class Fence:
    """A fenced block: its language, its text, and where it begins."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def page(path: str) -> str:
    return (ROOT / path).read_text()


def fences(language: str | None = None) -> list[Fence]:
    """All fenced blocks of all pages, or those of a language."""
    return [
        Fence(where, text.count("\n", 0, found.start()) + 1, found[1], found[2])
        for where in PAGES
        for text in [where.read_text()]
        for found in _FENCE.finditer(text)
        if language is None or found[1] == language
    ]


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", path.read_text())


def paragraphs(path: Path) -> list[str]:
    """Paragraphs, list items and table rows, each on one line."""
    marked = re.sub(r"\n(?=\s*(?:[-|]|\d+\.) ?)", "\n\n", prose(path))
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", marked) if part.strip()]


def inline(text: str) -> list[str]:
    """The inline code of a text."""
    return [" ".join(code.split()) for code in _INLINE.findall(text)]


def table(path: str, first: str, second: str, after: str = "") -> list[dict[str, str]]:
    """The rows of the first table with these two headings, below the text `after`."""
    lines = page(path).split("\n")
    start = lines.index(after) if after else 0
    for at in range(start, len(lines)):
        heads = _cells(lines[at])
        if heads[:2] == [first, second]:
            rows = []
            for line in lines[at + 2 :]:
                if not line.startswith("|"):
                    break
                rows.append(dict(zip(heads, _cells(line), strict=True)))
            return rows
    raise AssertionError(f"{path} has no table of {first} and {second}")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]
