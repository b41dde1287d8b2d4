"""pysyncobj as the log sees it: its untyped parts given names, types and our own filling.

`Core` opens what the modules around need to see and to move; `hardening.Raft` is built on it.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, Protocol

from pysyncobj.node import Node
from pysyncobj.syncobj import _RAFT_STATE, SyncObj
from pysyncobj.transport import Transport

from reconciler.log import pinned, wire
from reconciler.log.journal import Journal
from reconciler.log.records import Entry
from reconciler.log.settings import Member

if TYPE_CHECKING:
    from reconciler.log.hardening import Raft


class Peer(Node):  # type: ignore[misc]  # pysyncobj has no types
    """A member as pysyncobj knows it; its id is its name."""

    def __hash__(self) -> int:
        """The same in every process, so that a simulation's seed replays."""
        return zlib.crc32(self.id.encode())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Peer) and bool(self.id == other.id)


class Listener(Protocol):
    """Told in the raft thread what changed; must return at once and not raise."""

    def moved(self, applied_index: int) -> None:
        """The machine has applied everything up to this index."""
        ...

    def led(self, leading: bool, term: int) -> None:
        """This node leads, its term's first entry applied; or it no longer does."""
        ...

    def flush(self) -> None:
        """A good moment to pass on what was told."""
        ...


class PeerTransport(Transport):  # type: ignore[misc]  # pysyncobj has no types
    """What every transport shares: between pysyncobj's dicts, our messages, and the wire.

    Subclasses give `transmit`, `has_room`, `soon`, `follow`; they call `receive`, and the two
    inherited `_onNodeConnected` and `_onNodeDisconnected`.
    """

    def __init__(self) -> None:
        Transport.__init__(self, None, None, ())
        self.raft: Raft

    def transmit(self, peer: Peer, message: wire.Message) -> bool:
        """Queue one message; False where it is lost."""
        raise NotImplementedError

    def has_room(self, peer: Peer) -> bool:
        """Whether bulk may be queued for this peer now."""
        raise NotImplementedError

    def soon(self) -> None:
        """The next poll must not wait."""
        raise NotImplementedError

    def follow(self, members: dict[str, Member]) -> None:
        """Reach these, by name, and let in nobody else; an address may be new."""
        raise NotImplementedError

    def send(self, node: Peer, message: dict[str, Any]) -> bool:
        """What pysyncobj itself still sends: votes and the transfer of leadership."""
        match message["type"]:
            case "request_vote":
                # A candidate's log must outlive it as far as it boasts of it.
                self.raft.journal.sync()
                asked = wire.RequestVote(
                    message["term"], message["last_log_index"], message["last_log_term"]
                )
                return self.transmit(node, asked)
            case "response_vote":
                return self.transmit(node, wire.Vote(message["term"]))
            case other:
                raise AssertionError(f"pysyncobj sends {other}, which was replaced")

    def receive(self, peer: Peer, message: wire.Message) -> None:
        """Act on one verified message; ProtocolBroken means: close this connection."""
        self.raft.receive(peer, message)


class Core(SyncObj):  # type: ignore[misc]  # pysyncobj has no types
    """pysyncobj's state, readable, and the few steps of it that other modules take."""

    @property
    def voters(self) -> list[Peer]:
        """The other voters, in order."""
        raise NotImplementedError

    @property
    def term(self) -> int:
        """The current term."""
        return int(self._SyncObj__raftCurrentTerm)

    @property
    def is_raft_leader(self) -> bool:
        """Elected; whether it may serve is `is_serving`."""
        return bool(self._SyncObj__raftState == _RAFT_STATE.LEADER)

    @property
    def is_serving(self) -> bool:
        """Leads, and has applied the first entry of its term: it knows all that was committed."""
        return self.is_raft_leader and self.applied_index >= (self._SyncObj__noopIDx or 0)

    @property
    def leader(self) -> str | None:
        """The last known leader's name."""
        node = self._SyncObj__raftLeader
        return None if node is None else str(node.id)

    @property
    def other_leader(self) -> str | None:
        """Whom to ask instead of this node."""
        return None if self.leader == self.selfNode.id else self.leader

    @property
    def commit_index(self) -> int:
        """The highest index known to be committed."""
        return int(self._SyncObj__raftCommitIndex)

    @property
    def applied_index(self) -> int:
        """The highest index that the machine has applied."""
        return int(self._SyncObj__raftLastApplied)

    @property
    def connected_peers(self) -> set[Peer]:
        """Whom the transport reaches now."""
        return self._SyncObj__connectedNodes  # type: ignore[no-any-return]  # untyped base

    @property
    def next_index(self) -> dict[Peer, int]:
        """The leader's guess of what each follower needs next."""
        return self._SyncObj__raftNextIndex  # type: ignore[no-any-return]  # untyped base

    @property
    def match_index(self) -> dict[Peer, int]:
        """The leader's knowledge of what each follower has."""
        return self._SyncObj__raftMatchIndex  # type: ignore[no-any-return]  # untyped base

    @property
    def last_response(self) -> dict[Peer, float]:
        """When each follower last answered."""
        return self._SyncObj__lastResponseTime  # type: ignore[no-any-return]  # untyped base

    @property
    def election_deadline(self) -> float:
        """When this node loses patience."""
        return float(self._SyncObj__raftElectionDeadline)

    @property
    def transfer_in_progress(self) -> bool:
        """The leader asked this node to take over."""
        return bool(self._SyncObj__transferInProgress)

    def is_majority(self, count: int) -> bool:
        """Whether `count` voters, this one included, are a majority."""
        return 2 * count > len(self.voters) + 1

    def count_voters(self, others: list[Peer]) -> None:
        """Let pysyncobj count these and this node: votes, commits, a leader's majority."""
        self._SyncObj__otherNodes = set(others)

    def postpone_election(self, part: float = 1.0) -> None:
        """Draw a new election deadline, so much of a whole timeout away."""
        wait_s = part * self._SyncObj__generateRaftTimeout()
        self._SyncObj__raftElectionDeadline = pinned.now() + wait_s

    def hold_election_now(self) -> None:
        """Let the next tick begin an election."""
        self._SyncObj__raftElectionDeadline = 0.0

    def follow_term(self, term: int) -> None:
        """Take over a higher term, without a vote and without a leader."""
        assert term > self.term, "terms never go back"
        self._SyncObj__setCurrentTerm(term, None)
        self._SyncObj__raftLeader = None
        self._SyncObj__setState(_RAFT_STATE.FOLLOWER)

    def spend_vote(self, term: int) -> None:
        """Take over a term, durably, in which this node can vote for nobody any more."""
        assert term >= self.term, "terms never go back"
        self._SyncObj__setCurrentTerm(term, self.selfNode.id)
        self._SyncObj__raftLeader = None
        self._SyncObj__setState(_RAFT_STATE.FOLLOWER)

    def advance_commit(self, index: int) -> None:
        """Follow the leader's commit index; never back."""
        if index > self.commit_index:
            self._SyncObj__raftCommitIndex = index


_CoreEntry = tuple[bytes, int, int]


def _core_entry(entry: Entry) -> _CoreEntry:
    return entry.command, entry.index, entry.term


class CoreJournal:
    """Our journal as pysyncobj's core reads and writes it."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def __len__(self) -> int:
        return len(self._journal)

    def __getitem__(self, at: int | slice) -> _CoreEntry | list[_CoreEntry]:
        if isinstance(at, slice):
            return [_core_entry(entry) for entry in self._journal.positions(at)]
        return _core_entry(self._journal[at])

    def add(self, command: bytes, index: int, term: int) -> None:
        """The first entry of all, and each leader's no-op."""
        self._journal.append(Entry(command, index, term))

    def getCurrentTerm(self) -> int:
        """As stored."""
        return self._journal.term

    def getVotedForNodeId(self) -> str | None:
        """As stored."""
        return self._journal.vote

    def setCurrentTerm(self, term: int, vote: str | None) -> None:
        """Durable on return: before it is spoken."""
        self._journal.store_vote(term, vote)

    def getRaftCommitIndex(self) -> int:
        """A commit index is learnt from the leader, never trusted from a disk."""
        return 1

    def setRaftCommitIndex(self, _index: int) -> None:
        """Not stored."""

    def onOneSecondTimer(self) -> None:
        """Nothing is deferred."""

    def _destroy(self) -> None:
        """Whoever opened the journal closes it."""
