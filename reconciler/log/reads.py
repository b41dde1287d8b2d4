"""Read index (Ongaro's thesis, 6.4): linearizable reads without writing to the log.

A read notes the commit index, then a heartbeat that leaves AFTER the read was asked for is
answered by a majority in this term: so no other leader had committed anything by then, also
when this process was paused in between. All reads of one tick share a heartbeat.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reconciler.log.errors import NotLeader

if TYPE_CHECKING:
    from reconciler.errors import MillError
    from reconciler.log.hardening import Raft

ReadDone = Callable[[int, "MillError | None"], None]


@dataclass(frozen=True)
class _Waiting:
    term: int
    index: int
    number: int
    done: ReadDone


class Reads:
    """The reads of one node; `ask` from any thread, the rest in the raft thread."""

    def __init__(self, raft: Raft) -> None:
        self._raft = raft
        self._asked: deque[ReadDone] = deque()
        self._waiting: list[_Waiting] = []
        self._answered: dict[str, int] = {}  # peer -> the newest heartbeat it answered

    def ask(self, done: ReadDone) -> None:
        """Call `done(index, None)` once it is safe to read at `index`, or with an error."""
        self._asked.append(done)

    def answered(self, peer_id: str, number: int) -> None:
        """A peer answered heartbeat `number` of the current term."""
        self._answered[peer_id] = max(self._answered.get(peer_id, 0), number)

    def start(self) -> None:
        """Send one heartbeat for everything asked since the last tick."""
        if not self._asked:
            return
        raft, batch = self._raft, [self._asked.popleft() for _ in range(len(self._asked))]
        if not raft.is_serving:
            for done in batch:
                done(0, NotLeader(raft.other_leader))
            return
        index, number = raft.commit_index, raft.replication.next_number
        raft.send_heartbeat()
        self._waiting += [_Waiting(raft.term, index, number, done) for done in batch]
        if not raft.voters:
            self.settle()

    def settle(self) -> None:
        """Answer what a majority has confirmed and this node has applied."""
        raft, waiting, self._waiting = self._raft, self._waiting, []
        for read in waiting:
            if not raft.is_serving or read.term != raft.term:
                read.done(0, NotLeader(raft.other_leader))
            elif raft.applied_index >= read.index and self._confirmed(read.number):
                read.done(read.index, None)
            else:
                self._waiting.append(read)

    def _confirmed(self, number: int) -> bool:
        answered = sum(self._answered.get(peer.id, 0) >= number for peer in self._raft.voters)
        return self._raft.is_majority(1 + answered)
