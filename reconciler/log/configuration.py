"""Who takes part in the log, as entries of the log say it. Pure.

A configuration entry holds the whole new membership and is in effect as soon as it is in a
node's log, committed or not; cut off again, the one before it is back (Ongaro's thesis, 4.1).
Two that follow each other differ by at most one voter, so any two of their majorities share
a node. What is asked of whoever changes it is in `changes`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import assert_never

import msgspec

from reconciler.errors import Conflict, NotFound, Unprocessable
from reconciler.log.records import CONFIGURATION, Entry
from reconciler.log.settings import Member, Membership

MAX_MEMBERS = 64
"""Voters and learners: three times the nodes that a cluster is made for."""


@dataclass(frozen=True)
class AddLearner:
    """Let `member` follow. One that takes part already keeps its role, at this address."""

    member: Member


@dataclass(frozen=True)
class Promote:
    """Make a learner a voter, once it has nearly all that the leader has."""

    name: str


@dataclass(frozen=True)
class Demote:
    """Make a voter a learner."""

    name: str


@dataclass(frozen=True)
class Remove:
    """Let a voter or a learner take part no more."""

    name: str


Change = AddLearner | Promote | Demote | Remove


@dataclass(frozen=True)
class Progress:
    """What the leader knows of one other member.

    `matched`: the index up to which it surely holds the leader's log; 0 until it first answers.
    `heard_s`: seconds since it last answered this leader.
    """

    matched: int
    heard_s: float
    connected: bool


def changed(present: Membership, change: Change) -> Membership:
    """The membership after `change`, `present` itself where it is so already; its index is 0.

    Raises NotFound for a stranger's promotion or demotion, Conflict for the last voter's end,
    Unprocessable for too many members. Whether it may be done now is not asked here.
    """
    match change:
        case AddLearner(member):
            return _with(present, member)
        case Promote(name):
            member = _member(present, name)
            if present.votes(name):
                return present
            return Membership((*present.voters, member), _without(present.learners, name))
        case Demote(name):
            member = _member(present, name)
            if not present.votes(name):
                return present
            return Membership(_voters_without(present, name), (*present.learners, member))
        case Remove(name):
            if present.get(name) is None:
                return present
            return Membership(_voters_without(present, name), _without(present.learners, name))
        case _:
            assert_never(change)


def encode(membership: Membership) -> bytes:
    """What an entry or a snapshot carries."""
    return msgspec.msgpack.encode(membership)


def decode(data: bytes) -> Membership:
    """Read one; raises msgspec.MsgspecError."""
    return msgspec.msgpack.decode(data, type=Membership)


def entry_of(membership: Membership, index: int, term: int) -> Entry:
    """The entry at `index` that puts `membership` in effect."""
    return Entry(CONFIGURATION + encode(replace(membership, index=index)), index, term)


class Configurations:
    """The configurations that one node's log holds, oldest first; the last is in effect."""

    def __init__(self, founding: Membership) -> None:
        self._founding = founding
        self._held = [founding]

    @property
    def latest(self) -> Membership:
        """What is in effect."""
        return self._held[-1]

    def as_of(self, index: int) -> Membership:
        """What is in effect for a log that ends at `index`, which is not below the first held."""
        return next(
            (each for each in reversed(self._held) if each.index <= index), self._held[0]
        )

    def since(self, index: int) -> list[Membership]:
        """What is in effect there, and what comes after it: each may be in effect yet, or again."""
        base = self.as_of(index)
        return [base, *(each for each in self._held if each.index > base.index)]

    def append(self, entries: Iterable[Entry]) -> None:
        """Take those of the entries, appended in this order, that are configurations."""
        for entry in entries:
            if entry.command[:1] == CONFIGURATION and entry.index > self.latest.index:
                self._held.append(decode(entry.command[1:]))

    def cut(self, index: int) -> None:
        """The entry at `index` and all behind it are gone."""
        while len(self._held) > 1 and self.latest.index >= index:
            self._held.pop()

    def begin(self, base: Membership | None) -> None:
        """A snapshot stands for all before: begin with what it says, or with the founding."""
        self._held = [base or self._founding]

    def forget_before(self, index: int) -> None:
        """Nothing below `index` is ever cut."""
        self._held = self.since(index)


def _with(present: Membership, member: Member) -> Membership:
    known = present.get(member.name)
    if known == member:
        return present
    if known is not None:  # at a new address
        return Membership(
            tuple(member if each == known else each for each in present.voters),
            tuple(member if each == known else each for each in present.learners),
        )
    if len(present.everyone) >= MAX_MEMBERS:
        raise Unprocessable(
            f"the log has {MAX_MEMBERS} members, and takes no more",
            hint="remove the nodes that are gone with `mill remove`",
        )
    return Membership(present.voters, (*present.learners, member))


def _member(present: Membership, name: str) -> Member:
    member = present.get(name)
    if member is None:
        raise NotFound(f"{name} takes no part in the log", hint="`mill nodes` lists who does")
    return member


def _voters_without(present: Membership, name: str) -> tuple[Member, ...]:
    voters = _without(present.voters, name)
    if not voters:
        raise Conflict(f"{name} is the log's last voter", hint="make another node a voter first")
    return voters


def _without(members: tuple[Member, ...], name: str) -> tuple[Member, ...]:
    return tuple(each for each in members if each.name != name)
