"""What must hold after every step, whatever the world did (Raft, figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from reconciler.log import configuration
from reconciler.log.journal import Journal
from reconciler.log.records import CONFIGURATION, Entry
from reconciler.log.settings import Membership
from reconciler.log.wire import Message, PreVote, RequestVote, Vote


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
    @property
    def commit_index(self) -> int: ...
    @property
    def membership(self) -> Membership: ...
    def membership_at(self, index: int) -> Membership: ...


Holds = Callable[[str, Entry], bool]


class Invariants:
    def __init__(self) -> None:
        self._leaders: dict[int, str] = {}  # term -> the one leader it may have
        self._history: dict[int, bytes] = {}  # index -> what any node applied there
        self._places: dict[bytes, int] = {}  # command -> where it was applied
        self.acked: dict[int, bytes] = {}
        self._acked_in: dict[int, int] = {}  # index -> the term whose leader acknowledged it
        self.highest_acked = 0
        self._looked_at: dict[str, tuple[int, int, int]] = {}
        self._votes: dict[tuple[int, str], set[str]] = {}  # term, candidate -> who gave its vote
        self._committed: dict[int, Entry] = {}
        self._commit_index: dict[str, int] = {}
        self.highest_committed = 0
        self.acted: dict[str, Membership] = {}  # by node, at the end of the last step
        self._members: list[Membership] = []  # committed, in order

    @property
    def members(self) -> Membership | None:
        """The newest committed configuration; None before the first change."""
        return self._members[-1] if self._members else None

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

    def said(self, node: Observed, target: str, message: Message) -> None:
        """Who gives its vote to whom; and nobody stands who may not."""
        match message:
            case Vote(term):
                self._votes.setdefault((term, target), set()).add(node.name)
            case RequestVote() | PreVote() if not node.membership.votes(node.name):
                raise Violation(f"{node.name}, no voter, stands in term {message.term}")

    def check(self, nodes: list[Observed], holds: Holds) -> None:
        """Election safety, leader completeness, log matching, and who counts for it."""
        changed = []
        for node in nodes:
            last = node.journal.last
            look = (node.term, last.index, last.term)
            if self._looked_at.get(node.name) != look:
                self._looked_at[node.name] = look
                changed.append(node)
            if node.leads and node.term not in self._leaders:
                self._check_elected(node)
            if node.leads and self._leaders.setdefault(node.term, node.name) != node.name:
                raise Violation(
                    f"two leaders in term {node.term}: {node.name}, {self._leaders[node.term]}"
                )
            if self._commit_index.get(node.name) != node.commit_index:
                self._check_committed(node, holds)
        for node in nodes:
            self.acted[node.name] = node.membership
        for node in changed:
            self._check_members(node)
            if node.leads:
                self._check_complete(node)
            for other in nodes:
                if other is not node:
                    _check_matching(node, other)

    def _check_elected(self, node: Observed) -> None:
        """A majority of the voters, as the winner's log has them, and nobody else."""
        before = max(
            (entry.index for entry in node.journal.held() if entry.term < node.term),
            default=node.journal.first,
        )
        voters = {each.name for each in node.membership_at(before).voters}
        given = (self._votes.get((node.term, node.name), set()) | {node.name}) & voters
        if 2 * len(given) <= len(voters):
            raise Violation(
                f"{node.name} leads term {node.term} by {sorted(given)} of {sorted(voters)}"
            )

    def _check_committed(self, node: Observed, holds: Holds) -> None:
        """What is committed is so for ever, and a majority of the voters held it by then."""
        former = self._commit_index.get(node.name, 0)
        journal, index = node.journal, node.commit_index
        self._commit_index[node.name] = index
        if journal.first > former:  # committed and compacted in one step
            base = node.membership_at(journal.first)
            if base.index > max(former, self._members[-1].index if self._members else 0):
                self._members.append(base)
        for at in range(max(former + 1, journal.first + 1), index + 1):
            entry = journal.entry(at)
            if entry is None:
                break  # told of before it arrives
            if self._committed.setdefault(at, entry) != entry:
                raise Violation(f"{node.name} commits {entry} at {at}: {self._committed[at]} was")
            if at > self.highest_committed and entry.command[:1] == CONFIGURATION:
                self._members.append(configuration.decode(entry.command[1:]))
        entry = journal.entry(index)
        if index > self.highest_committed and entry is not None:
            if node.leads:
                # A change may have begun in this very step, after the commit.
                possible = [node.membership, self.acted.get(node.name, node.membership)]
                if not any(_majority_holds(each, entry, holds) for each in possible):
                    voters = [each.name for each in node.membership.voters]
                    raise Violation(
                        f"{node.name} commits {index} of term {entry.term}, which"
                        f" {[name for name in voters if holds(name, entry)]} of {voters} hold"
                    )
            self.highest_committed = index

    def _check_members(self, node: Observed) -> None:
        """What is in effect is what the log says; one voter at a time, one change at a time."""
        open_changes = 0
        former: Membership | None = None
        for entry in node.journal.held():
            if entry.command[:1] != CONFIGURATION:
                continue
            members = configuration.decode(entry.command[1:])
            open_changes += entry.index > self.highest_committed
            if former is not None:
                _check_step(node, former, members)
            former = members
        if open_changes > 1:
            raise Violation(f"{node.name} has {open_changes} changes at once in its log")
        if former is not None and node.membership != former:
            raise Violation(f"{node.name} acts on {node.membership}, its log says {former}")
        known = [each for each in self._members if each.index <= node.applied_index]
        if known and node.membership_at(node.applied_index).index != known[-1].index:
            raise Violation(
                f"{node.name} at {node.applied_index} knows the members of "
                f"{node.membership_at(node.applied_index).index}, not of {known[-1].index}"
            )

    def _check_complete(self, leader: Observed) -> None:
        for index in sorted(self.acked, reverse=True):
            if index < leader.journal.first:
                break  # in its snapshot, whose content `loaded` and `applied` check
            if self._acked_in[index] > leader.term:
                continue  # a leader of former days, paused or cut off, cannot know it
            entry = leader.journal.entry(index)
            if entry is None or entry.command[1:] not in (self.acked[index], b""):
                raise Violation(f"{leader.name} leads term {leader.term} without entry {index}")


def _majority_holds(members: Membership, entry: Entry, holds: Holds) -> bool:
    count = sum(holds(each.name, entry) for each in members.voters)
    return 2 * count > len(members.voters)


def _check_step(node: Observed, former: Membership, members: Membership) -> None:
    one, other = ({each.name for each in side.voters} for side in (former, members))
    if len(one ^ other) > 1:
        raise Violation(f"{node.name}: from {sorted(one)} to {sorted(other)} in one step")


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
