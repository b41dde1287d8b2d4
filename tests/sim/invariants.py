"""What must hold after every step, whatever the world did (Raft, figure 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from reconciler.log.journal import Journal
from reconciler.log.records import Entry


class Violation(AssertionError):
    """A promise of the log was broken."""


class Observed(Protocol):
    """What is looked at of a running node."""

    name: str

    @property
    def journal(self) -> Journal: ...
    @property
    def term(self) -> int: ...
    @property
    def leads(self) -> bool: ...
    @property
    def applied_index(self) -> int: ...


class Invariants:
    def __init__(self) -> None:
        self._leaders: dict[int, str] = {}  # term -> the one leader it may have
        self._history: dict[int, bytes] = {}  # index -> what any node applied there
        self._places: dict[bytes, int] = {}  # command -> where it was applied
        self.acked: dict[int, bytes] = {}
        self._acked_in: dict[int, int] = {}  # index -> the term whose leader acknowledged it
        self.highest_acked = 0
        self._looked_at: dict[str, tuple[int, int, int]] = {}

    def applied(self, name: str, index: int, command: bytes) -> None:
        """State machine safety, and each command in one place."""
        if self._history.setdefault(index, command) != command:
            raise Violation(
                f"{name} diverges: {command!r} at {index}, not {self._history[index]!r}"
            )
        if self._places.setdefault(command, index) != index:
            raise Violation(f"{command!r} applied at {index} and at {self._places[command]}")

    def loaded(self, name: str, items: Iterable[tuple[int, bytes]]) -> None:
        """A snapshot holds what was applied, no more and no less."""
        for index, command in items:
            if self._history.get(index) != command:
                raise Violation(f"{name} loads {command!r} at {index}, which nobody applied")

    def acknowledged(self, name: str, term: int, index: int, command: bytes) -> None:
        if self._history.get(index) != command:
            raise Violation(f"{name} acknowledges {command!r} at {index} before applying it")
        self.acked[index], self._acked_in[index] = command, term
        self.highest_acked = max(self.highest_acked, index)

    def read(self, name: str, asked_at: int, index: int) -> None:
        """A read sees every write that was acknowledged before it was asked for."""
        if index < asked_at:
            raise Violation(f"{name} reads at {index} after {asked_at} was acknowledged")

    def check(self, nodes: list[Observed]) -> None:
        """Election safety, leader completeness, log matching."""
        changed = []
        for node in nodes:
            last = node.journal.last
            look = (node.term, last.index, last.term)
            if self._looked_at.get(node.name) != look:
                self._looked_at[node.name] = look
                changed.append(node)
            if node.leads and self._leaders.setdefault(node.term, node.name) != node.name:
                raise Violation(
                    f"two leaders in term {node.term}: {node.name}, {self._leaders[node.term]}"
                )
        for node in changed:
            if node.leads:
                self._check_complete(node)
            for other in nodes:
                if other is not node:
                    _check_matching(node, other)

    def _check_complete(self, leader: Observed) -> None:
        for index in sorted(self.acked, reverse=True):
            if index < leader.journal.first:
                break  # in its snapshot, whose content `loaded` and `applied` check
            if self._acked_in[index] > leader.term:
                continue  # a leader of former days, paused or cut off, cannot know it
            entry = leader.journal.entry(index)
            if entry is None or entry.command[1:] not in (self.acked[index], b""):
                raise Violation(f"{leader.name} leads term {leader.term} without entry {index}")


def _check_matching(one: Observed, other: Observed) -> None:
    """If two logs agree at an index, they agree at all below."""
    low = max(one.journal.first, other.journal.first) + 1
    high = min(one.journal.last.index, other.journal.last.index)
    mine, theirs = _slice(one.journal, low, high), _slice(other.journal, low, high)
    if mine == theirs:
        return
    agreed = False
    for ours, others in zip(reversed(mine), reversed(theirs), strict=True):
        agreed = agreed or ours.term == others.term
        if agreed and ours != others:
            raise Violation(f"{one.name} and {other.name} disagree at {ours.index}")


def _slice(journal: Journal, low: int, high: int) -> list[Entry]:
    return journal.positions(slice(low - journal.first, max(0, high - journal.first + 1)))
