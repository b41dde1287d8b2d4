"""Handing leadership over without a failed write (Ongaro's thesis, 3.10).

The leader takes no more proposals (they wait), lets those under way commit, and tells the
voter that has everything to begin its election at once. What waited is then told who leads:
nothing of it was written. If nobody takes over in time, the leader goes on with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from reconciler.errors import MillError
from reconciler.log import pinned
from reconciler.log.core import Peer
from reconciler.log.errors import NobodyTakesOver, NotLeader
from reconciler.log.wire import TimeoutNow

if TYPE_CHECKING:
    from reconciler.log.hardening import Raft

HANDOVER_S = 2.0  # an election and its first commit

HandedOver = Callable[["MillError | None"], None]


class Handover:
    """One try; raft thread only. Raises NotLeader, or NobodyTakesOver where nobody could."""

    def __init__(self, raft: Raft, to: str | None, done: HandedOver) -> None:
        if not raft.is_raft_leader:
            raise NotLeader(raft.other_leader)
        self._raft, self._to, self._done = raft, to, done
        self._until_s = pinned.now() + HANDOVER_S
        self._told_at = float("-inf")
        if not self._able():
            raise NobodyTakesOver(
                f"{to} is no voter that can be reached" if to else "no other voter can be reached"
            )

    def tick(self) -> bool:
        """Go on with it; True once it is over, either way."""
        raft = self._raft
        if not raft.is_raft_leader:
            self._done(None)
            return True
        now = pinned.now()
        if now > self._until_s:
            self._done(NobodyTakesOver(f"nobody did within {HANDOVER_S:g} s"))
            return True
        if not raft.waits and now - self._told_at > raft.conf.raftMinTimeout:
            last = raft.journal.last.index
            ready = [peer for peer in self._able() if raft.match_index.get(peer, 0) == last]
            if ready:
                self._told_at = now
                raft.transport.transmit(ready[0], TimeoutNow(raft.term))
        return False

    def fail(self, error: MillError) -> None:
        """The node stops."""
        self._done(error)

    def _able(self) -> list[Peer]:
        raft = self._raft
        return [
            peer for peer in raft.voters
            if peer in raft.connected_peers and self._to in (None, peer.id)
        ]  # fmt: skip
