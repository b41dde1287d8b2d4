"""Pre-vote (Ongaro's thesis, 9.6): nobody raises the term before a majority would follow.

A node that comes back from a partition, or from a pause, asks first; while the others
hear a leader they say no, and the leader it never knew of goes on undisturbed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reconciler.log import pinned
from reconciler.log.wire import AskTerm, PreVote, PreVoteReply

if TYPE_CHECKING:
    from reconciler.log.core import Peer
    from reconciler.log.hardening import Raft

# Of an election timeout: how soon a node asks that has heard of no leader since its start, or
# that only just reaches a majority. Pre-vote protects the leader of a cluster that runs.
HASTE = 0.25


class Elections:
    """Stands before pysyncobj's own election, which begins once its deadline has passed."""

    def __init__(self, raft: Raft) -> None:
        self._raft = raft
        self._granted_term = 0  # the term for which a majority said yes
        self._yes: set[str] = set()
        self._heard_at = float("-inf")  # when a current leader last spoke to this node

    @property
    def may_stand(self) -> bool:
        """Asked by pysyncobj when the deadline has passed, right before it holds an election."""
        raft = self._raft
        if raft.rejoin is not None or not raft.members.is_voter:
            return False
        if not raft.voters or raft.transfer_in_progress:
            return True
        return self._granted_term == raft.term + 1

    def heard_leader(self) -> None:
        """A message of the current term's leader arrived."""
        self._heard_at = pinned.now()

    def gate(self) -> None:
        """Before each tick: where no leader is heard, ask whether an election would be won."""
        raft = self._raft
        if raft.is_raft_leader or self.may_stand or pinned.now() <= raft.election_deadline:
            return
        raft.postpone_election()
        self._granted_term, self._yes = 0, set()
        # Whom this node does not know it does not let in: the new leader may be one of those.
        for peer in sorted(raft.connected_peers, key=lambda each: str(each.id)):
            raft.transport.transmit(peer, AskTerm(raft.term, 0))
        if raft.members.is_voter and raft.rejoin is None:
            self._ask()

    def _ask(self) -> None:
        raft = self._raft
        if not raft.is_majority(1 + sum(peer in raft.connected_peers for peer in raft.voters)):
            raft.postpone_election(HASTE)
            return
        last = raft.journal.last
        for peer in raft.voters:
            raft.transport.transmit(peer, PreVote(raft.term + 1, last.index, last.term))

    def on_pre_vote(self, peer: Peer, asked: PreVote) -> None:
        """Answer whether this node would vote for `peer`; changes nothing here."""
        raft = self._raft
        quiet = not raft.is_raft_leader and pinned.now() - self._heard_at > raft.conf.raftMinTimeout
        last = raft.journal.last
        fresh = (asked.last_term, asked.last_index) >= (last.term, last.index)
        granted = quiet and fresh and asked.term > raft.term
        current = raft.term if quiet else 0
        raft.transport.transmit(peer, PreVoteReply(asked.term, granted, current))

    def on_reply(self, peer: Peer, reply: PreVoteReply) -> None:
        """Count a yes; take over a higher term from a no."""
        raft = self._raft
        if raft.is_raft_leader:
            return
        if not reply.granted:
            if reply.current > raft.term:
                raft.follow_term(reply.current)
            return
        if reply.term != raft.term + 1 or peer not in raft.voters:
            return
        self._yes.add(peer.id)
        if raft.is_majority(1 + len(self._yes)):
            self._granted_term = reply.term
            raft.hold_election_now()
