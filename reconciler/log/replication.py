"""Log replication (Raft, figure 2), both ends: the leader's sending, the follower's taking.

It replaces pysyncobj's own, which truncates committed entries without a conflict, commits
on an unverified snapshot chunk and takes acknowledgements of any term. An acknowledgement
waits here until the journal is synced (`release`), so that one sync serves many entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reconciler.log import pinned, snapshot
from reconciler.log.errors import LogDamaged, LogFailed
from reconciler.log.wire import (
    BATCH_BYTES,
    CHUNK_BYTES,
    Ack,
    Append,
    Chunk,
    HigherTerm,
)

if TYPE_CHECKING:
    from reconciler.log.core import Peer
    from reconciler.log.hardening import Raft
    from reconciler.log.records import Entry
    from reconciler.log.snapshot import Snapshot


class ProtocolBroken(ValueError):
    """A peer said what no correct node says; its connection is closed."""


class _Transfer:
    """A snapshot on its way to one follower."""

    def __init__(self, data: bytes, index: int, term: int) -> None:
        self.data, self.index, self.term = data, index, term
        self.offset = 0


class Replication:
    """One node's side of every pair of leader and follower; raft thread only."""

    def __init__(self, raft: Raft) -> None:
        self._raft = raft
        self.chunk_bytes = CHUNK_BYTES
        self.next_number = 1  # of the next message a follower answers
        self._held: list[tuple[Peer, Ack]] = []
        self._reset_at: dict[str, int] = {}  # peer -> rejections up to this number are old news
        self._probed: dict[str, int] = {}  # peer -> where the last rejection sent us
        self._transfers: dict[str, _Transfer] = {}
        self._since: dict[str, int] = {}  # peer -> what it answers below this is of a former life
        self._incoming = bytearray()
        self._incoming_from: tuple[str, int, int, int] | None = None  # peer, term, index, size

    # The leader's end.

    def begin(self, peer: Peer) -> None:
        """A member that is new to this leader: nothing is known of what it has.

        It may bear the name of one that was removed, and whose answers are still on their way.
        """
        raft = self._raft
        raft.next_index[peer] = raft.journal.last.index + 1
        raft.match_index[peer] = 0
        raft.last_response[peer] = pinned.now()
        self._since[peer.id] = self.next_number
        self._probed.pop(peer.id, None)
        self._transfers.pop(peer.id, None)

    def broadcast(self) -> None:
        """A heartbeat to every follower, with what it lacks."""
        raft = self._raft
        for peer in raft.members.followers:
            if peer in raft.connected_peers:
                self.send(peer)
            else:
                self._transfers.pop(peer.id, None)

    def announce_commit(self) -> None:
        """Tell the followers at once what they may apply, and want no answer to it."""
        raft, last = self._raft, self._raft.journal.last
        notice = Append(raft.term, 0, raft.commit_index, last.index, last.term, [])
        for peer in raft.members.followers:
            if peer in raft.connected_peers:
                if raft.next_index[peer] == last.index + 1:
                    raft.transport.transmit(peer, notice)
                else:
                    self.send(peer)

    def send(self, peer: Peer) -> None:
        """One message at least, more while there are entries and room in the buffer."""
        raft, journal = self._raft, self._raft.journal
        while raft.transport.has_room(peer):
            last = raft.members.last_for(peer)
            following = min(raft.next_index[peer], last + 1)
            if following <= journal.first:
                self._send_snapshot(peer)
                return
            before = journal.entry(following - 1)
            assert before is not None, "the entry before the next one is held"
            entries = [
                entry for entry in journal.batch(following, BATCH_BYTES) if entry.index <= last
            ]
            message = Append(
                raft.term, self._number(), raft.commit_index, before.index, before.term, entries
            )
            raft.next_index[peer] = following + len(entries)
            if not raft.transport.transmit(peer, message) or following + len(entries) > last:
                return

    def on_ack(self, peer: Peer, ack: Ack) -> None:
        """A follower's answer counts only in the term in which it was asked for."""
        raft = self._raft
        if not raft.is_raft_leader or ack.term != raft.term or peer not in raft.next_index:
            return
        if ack.number < self._since.get(peer.id, 0):
            return
        raft.last_response[peer] = pinned.now()
        raft.reads.answered(peer.id, ack.number)
        if ack.success:
            matched = ack.next_index - 1
            if matched > raft.journal.last.index:
                raise ProtocolBroken(f"{peer.id} acknowledges {matched}, which nobody sent")
            # Never back: what was sent since is on its way, and would be sent again.
            raft.match_index[peer] = max(raft.match_index[peer], matched)
            raft.next_index[peer] = max(raft.next_index[peer], matched + 1)
            self._probed.pop(peer.id, None)
        elif ack.reset and ack.number > self._reset_at.get(peer.id, 0):
            # One step back for a whole pipeline of rejections, not one for each.
            self._reset_at[peer.id] = self.next_number - 1
            self._transfers.pop(peer.id, None)
            probe = max(ack.next_index, raft.match_index[peer] + 1)
            raft.next_index[peer] = probe
            if self._probed.get(peer.id) != probe:
                self._probed[peer.id] = probe
                self.send(peer)
            # The same answer twice: leave it to the heartbeat, or two nodes would spin.
            return
        behind = raft.next_index[peer] <= raft.members.last_for(peer)
        if behind or peer.id in self._transfers:
            self.send(peer)

    def forget_transfers(self) -> None:
        """A newer snapshot took the place of what was being sent."""
        self._transfers.clear()

    def _send_snapshot(self, peer: Peer) -> None:
        raft = self._raft
        transfer = self._transfers.get(peer.id)
        if transfer is None:
            data = raft.snapshots.read()
            if data is None:
                raise LogFailed("entries are gone, and there is no snapshot for them")
            head = snapshot.decode(data, raft.snapshots.path)
            transfer = self._transfers[peer.id] = _Transfer(data, head.index, head.term)
        while raft.transport.has_room(peer):
            part = transfer.data[transfer.offset : transfer.offset + self.chunk_bytes]
            chunk = Chunk(
                raft.term, self._number(), transfer.index, transfer.term,
                len(transfer.data), transfer.offset, part,
            )  # fmt: skip
            transfer.offset += len(part)
            if transfer.offset >= len(transfer.data):
                del self._transfers[peer.id]
                raft.next_index[peer] = transfer.index + 1
                raft.transport.transmit(peer, chunk)
                return
            if not raft.transport.transmit(peer, chunk):
                return

    def _number(self) -> int:
        number = self.next_number
        self.next_number += 1
        return number

    # The follower's end.

    def on_append(self, peer: Peer, message: Append) -> None:
        """Take the entries behind a place where both logs agree, or say where to go on."""
        _check_entries(message)
        raft = self._raft
        if not self._accept(peer, message.term):
            return
        journal = raft.journal
        start = message.prev_index
        if start >= journal.first and not journal.holds(start, message.prev_term):
            hint = self._hint(start)
            self._hold(peer, Ack(raft.term, message.number, hint, success=False, reset=True))
            return
        # An index below the first one held is in the snapshot: committed, and so the same.
        self._take(message.entries)
        matched = start + len(message.entries)
        raft.advance_commit(min(message.commit, matched))
        if message.number:
            self._hold(peer, Ack(raft.term, message.number, matched + 1, success=True, reset=False))

    def on_chunk(self, peer: Peer, chunk: Chunk) -> None:
        """Gather a snapshot; verify it before anything of it is used."""
        raft = self._raft
        if not self._accept(peer, chunk.term):
            return
        if not self._gather(peer, chunk):
            self._hold(peer, Ack(raft.term, chunk.number, 0, success=False, reset=False))
            return
        data, self._incoming, self._incoming_from = bytes(self._incoming), bytearray(), None
        try:
            received = snapshot.decode(data, f"what {peer.id} sent")
        except LogDamaged as error:
            raise ProtocolBroken(str(error)) from error
        if not self._covered(received):
            raft.install(received, data)
        self._hold(
            peer, Ack(raft.term, chunk.number, received.index + 1, success=True, reset=False)
        )

    def release(self) -> None:
        """After the journal's sync: let the acknowledgements go."""
        held, self._held = self._held, []
        for peer, ack in held:
            self._raft.transport.transmit(peer, ack)

    def _accept(self, peer: Peer, term: int) -> bool:
        """Follow the leader of this or a later term; tell an older one."""
        raft = self._raft
        if term < raft.term:
            raft.transport.transmit(peer, HigherTerm(raft.term))
            return False
        if raft.is_raft_leader and term == raft.term:
            raise LogFailed(f"two leaders in term {term}: this node and {peer.id}")
        raft.follow_leader(peer, term)
        return True

    def _covered(self, received: Snapshot) -> bool:
        """An older snapshot must never replace what this node already has."""
        raft = self._raft
        return received.index <= raft.applied_index or raft.journal.holds(
            received.index, received.term
        )

    def _take(self, entries: list[Entry]) -> None:
        raft, journal = self._raft, self._raft.journal
        taken: list[Entry] = []
        for entry in entries:
            if entry.index < journal.first or journal.holds(entry.index, entry.term):
                continue
            if entry.index <= journal.last.index:
                if entry.index <= raft.commit_index or entry.index <= raft.applied_index:
                    raise LogFailed(f"entry {entry.index} is committed, and another came for it")
                journal.cut(entry.index)
                raft.members.cut(entry.index)
            journal.append(entry)
            taken.append(entry)
        raft.members.append(taken)
        raft.members.settle()

    def _hint(self, index: int) -> int:
        """From where the leader should try next: past the end, or the start of a bad term."""
        raft, journal = self._raft, self._raft.journal
        here = journal.entry(index)
        if here is None:
            return journal.last.index + 1
        lowest = max(journal.first, raft.commit_index) + 1
        while index > lowest and journal.holds(index - 1, here.term):
            index -= 1
        return index

    def _gather(self, peer: Peer, chunk: Chunk) -> bool:
        """Append one part; whether the whole is there. Parts of another transfer are dropped."""
        if chunk.size > snapshot.MAX_BYTES or chunk.offset + len(chunk.data) > chunk.size:
            raise ProtocolBroken(f"{peer.id} sends a snapshot of {chunk.size} bytes")
        source = (peer.id, chunk.term, chunk.index, chunk.size)
        if chunk.offset == 0:
            self._incoming, self._incoming_from = bytearray(), source
        if self._incoming_from != source or chunk.offset != len(self._incoming):
            return False
        self._incoming += chunk.data
        return len(self._incoming) == chunk.size

    def _hold(self, peer: Peer, ack: Ack) -> None:
        self._held.append((peer, ack))


def _check_entries(message: Append) -> None:
    index, term = message.prev_index, message.prev_term
    for entry in message.entries:
        index += 1
        if entry.index != index or not term <= entry.term <= message.term or not entry.command:
            raise ProtocolBroken(f"entry {entry.index} of term {entry.term} is out of order")
        term = entry.term
