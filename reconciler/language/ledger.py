"""What has been found in a manifest so far: flaws, places, names, references, claims.

One ledger a manifest; a `Cursor` is where the reading is: a file, and in it a service or task.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal, NamedTuple

from reconciler.language.problems import MAX_PROBLEMS, Flaw, Problem, quoted
from reconciler.language.source import Source

MAX_EXPANDED_CHARS = 2 * 1024 * 1024  # of variables, wherever they are named
_MAX_NEAR = 200  # searches for a near name; each costs 100 us, and 50 problems are shown


class Place(NamedTuple):
    """A file, by its number in order of name, and an offset into its text."""

    file: int
    offset: int


class Header(NamedTuple):
    """A service or task that a manifest names, whether or not the rest of it can be read."""

    kind: Literal["service", "task"]
    place: Place
    port: int | None  # -1: it has one, which cannot be read


class Use(NamedTuple):
    """`owner` names `name` at a place, in one of its fields."""

    owner: str
    name: str
    field: str
    place: Place


class Claim(NamedTuple):
    """`owner` takes something that only one may have, or that all must see alike."""

    owner: str
    what: tuple[str, ...]
    place: Place


class Ledger:
    """Everything that the checks across services need, filled while the files are read."""

    def __init__(self) -> None:
        self.sources: list[Source] = []
        self.flaws: list[tuple[Place, str, str]] = []
        self.unread = False  # a file could not be parsed: what is missing may stand in it
        self.variables: dict[str, str] = {}
        self.headers: dict[str, Header] = {}
        self.marks: dict[str, dict[str, Place]] = {}
        self.depends: list[Use] = []
        self.addresses: list[Use] = []
        self.secrets: list[Use] = []
        self.routes: list[Claim] = []
        self.listens: list[Claim] = []
        self.volumes: list[Claim] = []
        self.expanded = 0
        self._near = _MAX_NEAR

    def flaw(self, place: Place, message: str, hint: str = "") -> None:
        """Write down one mistake."""
        self.flaws.append((place, message, hint))

    def near(self, name: str, known: Iterable[str]) -> str:
        """A hint with the known name that is most like `name`, or nothing."""
        if self._near <= 0 or len(name) > 64:
            return ""
        self._near -= 1
        found = difflib.get_close_matches(name, sorted(known), 1)
        return f"did you mean `{found[0]}`?" if found else ""

    def where(self, place: Place) -> str:
        """`FILE:LINE` for a message about another place."""
        source = self.sources[place.file]
        return f"{source.file}:{source.position(place.offset)[0]}"

    def problems(self) -> tuple[tuple[Problem, ...], int]:
        """The first 50 in order of file and place, and how many more there are."""
        ordered = sorted(set(self.flaws))
        shown = tuple(
            self.sources[place.file].problem(Flaw(place.offset, message, hint))
            for place, message, hint in ordered[:MAX_PROBLEMS]
        )
        return shown, len(ordered) - len(shown)


class Cursor(NamedTuple):
    """A place to read from: the file, the service or task, the path of the block in it."""

    ledger: Ledger
    source: Source
    file: int
    owner: str = ""
    prefix: str = ""

    def place(self, offset: int) -> Place:
        """An offset of this file."""
        return Place(self.file, offset)

    def flaw(self, flaw: Flaw) -> None:
        """Write down a mistake of this file."""
        self.ledger.flaw(self.place(flaw.offset), flaw.message, flaw.hint)

    def mark(self, field: str, offset: int) -> None:
        """Remember where a field of the owner was written; the first place counts."""
        if self.owner:
            marks = self.ledger.marks.setdefault(self.owner, {})
            marks.setdefault(self.prefix + field, self.place(offset))

    def inside(self, path: str) -> Cursor:
        """The cursor for a block of the owner."""
        return self._replace(prefix=f"{self.prefix}{path}.")

    def use(self, name: str, offset: int) -> Use:
        """A use of `name` by the owner in the block at hand."""
        return Use(self.owner, name, self.prefix.rstrip("."), self.place(offset))

    def variable(self, name: str, offset: int) -> str:
        """The text of a variable; raises `Flaw` where none has that name."""
        ledger = self.ledger
        if name not in ledger.variables:
            if ledger.unread:
                return ""
            raise Flaw(offset, f"unknown variable {quoted(name)}",
                       ledger.near(name, ledger.variables)
                       or f'declare it: variables {{ {name} = "..." }}')
        ledger.expanded += len(ledger.variables[name])
        if ledger.expanded > MAX_EXPANDED_CHARS:
            raise Flaw(offset, "the manifest is over 2 MiB with its variables filled in",
                       "shorten what they hold, or name them less often")
        return ledger.variables[name]
