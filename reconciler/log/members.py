"""The members of the log at one node: what its log says of them, and what follows from it.

Who counts (`voters`), whom a leader feeds (`followers`), whom the transport lets in. Changes
enter here, one at a time: the next one only after the present configuration is committed, and
after the leader's first entry of its term is (else two of them in different terms could differ
by two voters: Ongaro, raft-dev, 2015-07-10).

A vote is given to whoever asks with a good log, whatever this node's own configuration says: it
may lack the entry that makes it a voter, or the one that made the candidate one. Who counts is
up to the configuration of whoever counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from reconciler.errors import MillError
from reconciler.log import acquaintance, configuration, pinned
from reconciler.log.configuration import (
    AddLearner,
    Change,
    Configurations,
    Demote,
    Progress,
    Promote,
    Remove,
)
from reconciler.log.core import Peer
from reconciler.log.disk import Disk
from reconciler.log.errors import ChangeUnderWay, NobodyTakesOver, NotCaughtUp, NotLeader
from reconciler.log.settings import Member, Membership

if TYPE_CHECKING:
    from reconciler.log.hardening import Raft
    from reconciler.log.records import Entry

LEAVING_S = 5.0  # so long a removed node is fed, to learn of it
CLOSE_ENTRIES = 256  # a learner that lacks no more than these has them within one message

ChangeDone = Callable[[int, object, "MillError | None"], None]


@dataclass(frozen=True)
class _Leaving:
    member: Member
    index: int  # of the entry that removes it
    until_s: float


class Members:
    """Raft thread only, but for `ask` and `progress`."""

    def __init__(self, raft: Raft, me: str, founding: tuple[Member, ...], disk: Disk) -> None:
        self._raft, self.me, self._founding, self._disk = raft, me, founding, disk
        self.known_last = acquaintance.load(disk) or Membership(founding)
        self._configurations = Configurations(Membership(founding))
        self._asked: deque[tuple[Change, ChangeDone]] = deque()
        self._leaving: dict[str, _Leaving] = {}
        self._introduced: Membership | None = None
        self._settled: Membership | None = None
        self._open = False  # whether the present configuration may still be cut off again
        self.voters: list[Peer] = []
        self.followers: list[Peer] = []

    @property
    def latest(self) -> Membership:
        """In effect at this node, committed or not."""
        return self._configurations.latest

    @property
    def is_voter(self) -> bool:
        """Whether this node may stand for election."""
        return self.latest.votes(self.me)

    def as_of(self, index: int) -> Membership:
        """For the snapshot at `index`."""
        return self._configurations.as_of(index)

    # As the log moves; `settle` afterwards.

    def begin(self, base: Membership | None, entries: list[Entry]) -> None:
        """A snapshot with the entries behind it is the whole log now."""
        self._configurations.begin(base)
        self._configurations.append(entries)

    def append(self, entries: list[Entry]) -> None:
        """They are in the log."""
        self._configurations.append(entries)

    def cut(self, index: int) -> None:
        """All from `index` on is out of the log again."""
        self._configurations.cut(index)

    def forget_before(self, index: int) -> None:
        """A snapshot covers all before."""
        self._configurations.forget_before(index)

    def settle(self) -> None:
        """Let the latest configuration take effect."""
        latest, former = self.latest, self._settled
        if latest is former:
            return
        self._settled = latest
        raft = self._raft
        names = {each.name for each in latest.everyone}
        if former is not None and raft.is_raft_leader:
            until_s = pinned.now() + LEAVING_S
            for each in former.everyone:
                if each.name not in names and each.name != self.me:
                    self._leaving[each.name] = _Leaving(each, latest.index, until_s)
        for name in names:
            self._leaving.pop(name, None)
        if self._introduced is not None and self._introduced.index <= latest.index:
            self._introduced = None
        self._connect()
        if raft.is_raft_leader:
            known = {each.name for each in former.everyone} if former is not None else set()
            for peer in self.followers:
                if peer.id in names - known:
                    raft.replication.begin(peer)

    # Asked for from outside.

    def ask(self, change: Change, done: ChangeDone) -> None:
        """Queue a change, from any thread; `done(index, None, error)` once it is committed."""
        self._asked.append((change, done))

    def start_asked(self) -> None:
        """Begin what is queued, or say why not."""
        while self._asked:
            change, done = self._asked.popleft()
            try:
                self._start(change, done)
            except MillError as error:
                done(0, None, error)

    def progress(self) -> dict[str, Progress]:
        """Of each follower, from any thread; empty where this node does not lead."""
        raft, now = self._raft, pinned.now()
        if not raft.is_raft_leader:
            return {}
        return {
            str(peer.id): Progress(
                raft.match_index.get(peer, 0),
                max(0.0, now - raft.last_response.get(peer, now)),
                peer in raft.connected_peers,
            )
            for peer in self.followers
        }

    def is_followed(self) -> bool:
        """Whether a majority of the voters, this leader among them, has answered it within the time
        after which it would let go. From any thread: a process that slept knows it by the clock,
        before the raft thread has had its turn."""
        raft = self._raft
        if not raft.is_raft_leader:
            return False
        since = pinned.now() - raft.conf.leaderFallbackTimeout
        heard = sum(raft.last_response.get(peer, since) > since for peer in self.voters)
        return raft.is_majority(1 + heard)

    def introduce(self, membership: Membership) -> None:
        """A member knows a newer configuration: let in whom it names, before the log says so."""
        newest = max(self.latest.index, self._introduced.index if self._introduced else 0)
        if membership.index > newest:
            self._introduced = membership
            self._connect()

    def tick(self) -> None:
        """Let go of removed nodes that know it, or that had time enough to learn it; remember
        the members once they are committed."""
        raft = self._raft
        gone = [
            name for name, each in self._leaving.items()
            if not raft.is_raft_leader or pinned.now() > each.until_s
            or raft.match_index.get(Peer(name), 0) >= each.index <= raft.commit_index
        ]  # fmt: skip
        for name in gone:
            del self._leaving[name]
        if self.known_last.index != self.latest.index <= raft.commit_index:
            acquaintance.store(self._disk, self.latest)
            self.known_last = self.latest
        if gone or (self._open and self.latest.index <= raft.commit_index):
            self._connect()

    def last_for(self, peer: Peer) -> int:
        """Up to where a follower is fed.

        Who loses its vote is not told so before that is committed. Else, if the leader then is
        gone for good, the one with the longest log could not stand, and the others not win.
        """
        raft, latest = self._raft, self.latest
        last = raft.journal.last.index
        if latest.index <= raft.commit_index or latest.votes(str(peer.id)):
            return last
        loses = self._configurations.as_of(latest.index - 1).votes(str(peer.id))
        return latest.index - 1 if loses else last

    def is_leaving(self, peer: Peer) -> bool:
        """Whether it was removed, and is only fed on to learn so."""
        return peer.id in self._leaving

    def _start(self, change: Change, done: ChangeDone) -> None:
        raft, present = self._raft, self.latest
        if not raft.is_raft_leader or raft.handover is not None:
            raise NotLeader(raft.other_leader)
        if not raft.is_serving:
            raise ChangeUnderWay("the leader was elected just now")
        if present.index > raft.commit_index:
            raise ChangeUnderWay(f"the one of entry {present.index} is not committed yet")
        changed = configuration.changed(present, change)
        if changed is present:
            done(present.index, None, None)
            return
        if not changed.votes(self.me):
            raise NobodyTakesOver("this node leads, and would vote no more")
        self._check(change, changed)
        entry = configuration.entry_of(changed, raft.journal.last.index + 1, raft.term)
        raft.append_own(entry, done)
        self.settle()
        # Other entries may leave before they are synced here. With this one lost here and held
        # there, who holds it may not vote, and who votes may hold too little to win.
        raft.journal.sync()
        raft.send_heartbeat()

    def _check(self, change: Change, changed: Membership) -> None:
        match change:
            case AddLearner():
                return
            case Promote(name):
                self._check_caught_up(name)
            case Demote() | Remove():
                pass
            case _:
                assert_never(change)
        heard = sum(each.name == self.me or self._is_heard(each.name) for each in changed.voters)
        if 2 * heard <= len(changed.voters):
            raise ChangeUnderWay(
                f"of the {len(changed.voters)} voters that it leaves only {heard} answer"
            )

    def _check_caught_up(self, name: str) -> None:
        raft = self._raft
        if not self._is_heard(name):
            raise NotCaughtUp(name, "it does not answer")
        matched = raft.match_index.get(Peer(name), 0)
        if matched + CLOSE_ENTRIES < raft.commit_index or matched == 0:
            raise NotCaughtUp(name, f"it has {matched} of {raft.commit_index} entries")

    def _is_heard(self, name: str) -> bool:
        raft, peer = self._raft, Peer(name)
        since = pinned.now() - raft.conf.leaderFallbackTimeout
        return peer in raft.connected_peers and raft.last_response.get(peer, since) > since

    def _connect(self) -> None:
        """Tell pysyncobj who counts, and the transport whom to reach."""
        raft, latest = self._raft, self.latest
        self.voters = _peers(each.name for each in latest.voters if each.name != self.me)
        others = {each.name for each in latest.everyone if each.name != self.me}
        self.followers = _peers(others | self._leaving.keys())
        raft.count_voters(self.voters)
        for known in (raft.next_index, raft.match_index, raft.last_response):
            for peer in known.keys() - set(self.followers):
                del known[peer]
        self._open = latest.index > raft.commit_index
        raft.transport.follow(self._reached())

    def _reached(self) -> dict[str, Member]:
        latest = self.latest
        reached = {name: each.member for name, each in self._leaving.items()}
        if latest.index == 0 or latest.get(self.me) is None:
            # One that joins is let in by whom it found, before the log names it.
            reached |= {each.name: each for each in self._founding}
            reached |= {each.name: each for each in self.known_last.everyone}
        # What is not committed may be undone by one whom it removes: a leader of a later term.
        for each in self._configurations.since(self._raft.commit_index):
            reached |= {member.name: member for member in each.everyone}
        if self._introduced is not None:
            reached |= {each.name: each for each in self._introduced.everyone}
        reached.pop(self.me, None)
        return reached


def _peers(names: Iterable[str]) -> list[Peer]:
    return [Peer(name) for name in sorted(names)]
