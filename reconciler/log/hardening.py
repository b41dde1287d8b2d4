"""pysyncobj's Raft made safe: its elections and its counting of commits, our everything else.

Kept of it: the tick, terms, votes, election timeouts, the leader's commit rule, stepping
down without a majority, the transfer of leadership. Replaced: journal, snapshots,
replication (`replication`), application, proposals, reads (`reads`), transport; added:
pre-vote (`elections`). All of it runs in one thread, which `doTick` drives; an exception
from it means that the node must stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from pysyncobj.config import SyncObjConf
from pysyncobj.syncobj import _RAFT_STATE

from reconciler.errors import MillError
from reconciler.log import pinned, snapshot, wire
from reconciler.log.archive import Archive
from reconciler.log.core import Core, CoreJournal, Listener, Peer, PeerTransport
from reconciler.log.disk import Disk
from reconciler.log.elections import HASTE, Elections
from reconciler.log.errors import ChangeUnderWay, LogFailed, NotLeader, OutcomeUnknown
from reconciler.log.handover import HandedOver, Handover
from reconciler.log.journal import Journal, check_beside_snapshot
from reconciler.log.members import Members
from reconciler.log.reads import Reads
from reconciler.log.records import COMMAND, NO_OP, Entry
from reconciler.log.rejoin import Rejoin, is_rejoining
from reconciler.log.replication import ProtocolBroken, Replication
from reconciler.log.settings import Machine, Member, Timing
from reconciler.log.snapshot import Snapshot, Snapshots

APPLIED_PER_TICK = 2048  # so that a long replay does not silence the heartbeats
TAKEN_PER_TICK_BYTES = 4 << 20  # of proposals, for the same reason
KEPT_FOR_FOLLOWERS = 4  # 1/4 of snapshot_bytes stays in the journal for those a little behind

ProposalDone = Callable[[int, object, "MillError | None"], None]


@dataclass(frozen=True)
class Parts:
    """What a node of the log is made of."""

    journal: Journal
    snapshots: Snapshots
    machine: Machine
    transport: PeerTransport
    poller: object  # pysyncobj calls its poll(timeout_s)
    listener: Listener
    disk: Disk
    archive: Archive | None = None  # none where the disk is simulated


class Raft(Core):
    """One node of the log. From another thread only `propose`, `hand_over`, `reads.ask`,
    `members.ask` and `members.progress` may be called."""

    def __init__(
        self, me: str, founding: tuple[Member, ...], parts: Parts, timing: Timing,
        snapshot_bytes: int,
    ) -> None:
        self.journal, self.snapshots = parts.journal, parts.snapshots
        self.machine, self.listener = parts.machine, parts.listener
        self._archive, self._snapshot_index = parts.archive, 0
        self.transport = parts.transport
        self.elections, self.reads = Elections(self), Reads(self)
        self.replication = Replication(self)
        self.members = Members(self, me, founding, parts.disk)
        self.rejoin: Rejoin | None = None
        self.handover: Handover | None = None
        self._handovers: deque[tuple[str | None, HandedOver]] = deque()
        self._inbox: deque[tuple[bytes, ProposalDone]] = deque()
        self._waiting: dict[int, tuple[int, ProposalDone]] = {}  # index -> term, whom to tell
        self._votes: tuple[int, set[str]] = (0, set())
        self._announced = False
        self._snapshot_bytes, self._compact_at = snapshot_bytes, snapshot_bytes
        self.transport.raft = self
        conf = SyncObjConf(
            autoTick=False, appendEntriesUseBatch=False, useFork=False, fullDumpFile=None,
            dynamicMembershipChange=False, commandsWaitLeader=False,
            raftMinTimeout=timing.election_min_s, raftMaxTimeout=timing.election_max_s,
            appendEntriesPeriod=timing.heartbeat_s, leaderFallbackTimeout=timing.step_down_s,
            connectionTimeout=timing.silence_s, connectionRetryTime=timing.redial_s,
            journalFile=CoreJournal(parts.journal), pollerType=parts.poller,
        )  # fmt: skip
        super().__init__(Peer(me), [], conf, nodeClass=Peer, transport=parts.transport)
        if is_rejoining(parts.disk):
            self.rejoin = Rejoin(self, parts.disk)
        self._load()
        self.members.settle()
        self.journal.sync()
        self.postpone_election(HASTE if self.voters else 0.0)

    @property
    def voters(self) -> list[Peer]:
        """The other voters, in order."""
        return self.members.voters

    @property
    def waits(self) -> bool:
        """Whether anything proposed here is not applied yet."""
        return bool(self._waiting)

    # What the parts around move.

    def follow_leader(self, peer: Peer, term: int) -> None:
        """A leader of this or a later term spoke."""
        self.elections.heard_leader()
        heartbeat = {"type": "append_entries", "term": term, "commit_index": self.commit_index}
        self._onMessage(peer, heartbeat)

    def send_heartbeat(self) -> None:
        """To all followers, now."""
        self._SyncObj__sendAppendEntries()

    # From other threads.

    def propose(self, command: bytes, done: ProposalDone) -> None:
        """Queue a command; `done(index, result, error)` is called in the raft thread."""
        self._inbox.append((command, done))

    def hand_over(self, to: str | None, done: HandedOver) -> None:
        """Give leadership to a voter, or to the best of them; then `done(error or None)`."""
        self._handovers.append((to, done))

    # The raft thread.

    def doTick(self, timeToWait: float = 0.0) -> None:
        """One round: elect, commit, apply, propose, then wait for the network and answer it."""
        self.elections.gate()
        self.reads.start()
        self.journal.sync()  # the leader counts its own copy: it must be durable by then
        super().doTick(timeToWait)
        self.journal.sync()
        self.replication.release()
        self.reads.settle()
        if self.rejoin is not None and self.rejoin.tick():
            self.rejoin = None
        self._start_handovers()
        if self.handover is not None and self.handover.tick():
            self.handover = None
        self.members.tick()
        self.listener.flush()

    def append_own(self, entry: Entry, done: ProposalDone) -> None:
        """A leader's entry, and whom to tell once it is committed and applied."""
        self.journal.append(entry)
        self.members.append([entry])
        self._waiting[entry.index] = (self.term, done)

    def fail_waiting(self, why: str) -> None:
        """Answer everybody who still waits; for a node that stops."""
        self._drop_waiting(why)
        self._SyncObj__raftState = _RAFT_STATE.FOLLOWER
        self._refuse_proposals()
        self.members.start_asked()
        self._start_handovers()
        if self.handover is not None:
            self.handover.fail(NotLeader(self.other_leader))

    def receive(self, peer: Peer, message: wire.Message) -> None:
        """Act on one message of a peer."""
        if self.rejoin is not None and not self.rejoin.hears(peer, message):
            return
        if self.members.is_leaving(peer) and not isinstance(message, wire.Ack):
            return  # removed, and not aware of it: it has no say any more
        match message:
            case wire.Append():
                self.replication.on_append(peer, message)
            case wire.Ack():
                self.replication.on_ack(peer, message)
            case wire.Chunk():
                self.replication.on_chunk(peer, message)
            case wire.PreVote():
                self.elections.on_pre_vote(peer, message)
            case wire.PreVoteReply():
                self.elections.on_reply(peer, message)
            case wire.HigherTerm(term):
                if term > self.term:
                    self.follow_term(term)
            case wire.RequestVote(term, last_index, last_term):
                ask = {"type": "request_vote", "term": term}
                self._onMessage(
                    peer, ask | {"last_log_index": last_index, "last_log_term": last_term}
                )
            case wire.Vote(term):
                self._on_vote(peer, term)
            case wire.TimeoutNow(term):
                if self.members.is_voter:
                    self._onMessage(peer, {"type": "timeout_now", "term": term})
            case wire.AskTerm(_, number):
                answer = wire.TermIs(self.term, number, self.members.latest)
                self.transport.transmit(peer, answer)
            case wire.TermIs(_, _, membership):
                self.members.introduce(membership)
            case other:
                raise ProtocolBroken(f"{type(other).__name__} is no message between nodes")

    def install(self, received: Snapshot, data: bytes) -> None:
        """Put a verified snapshot of the leader in the place of everything here."""
        self._keep_past()
        self.snapshots.store(data)
        self.machine.load(received.state)
        self.journal.reset(Entry(NO_OP, received.index, received.term))
        self.members.begin(received.members, [])
        self.members.settle()
        self._begin_at(received.index)
        self.listener.moved(received.index)

    def _onMessage(self, peer: Peer, message: dict[str, Any]) -> None:
        self._SyncObj__onMessageReceived(peer, message)

    def _on_vote(self, peer: Peer, term: int) -> None:
        if term != self.term:
            return  # of an election that is over; it must not make those of this one count anew
        if self._votes[0] != term:
            self._votes = (term, set())
        # pysyncobj counts messages: neither voters, nor whether they are any.
        if peer in self.voters and peer.id not in self._votes[1]:
            self._votes[1].add(peer.id)
            self._onMessage(peer, {"type": "response_vote", "term": term})

    def _load(self) -> None:
        self.machine.reset()
        stored, first = self.snapshots.load(), self.journal[0]
        if stored is None:
            check_beside_snapshot(self.journal, 1, self.snapshots.path)
            self.members.append(self.journal.held())
            return
        check_beside_snapshot(self.journal, stored.index, self.snapshots.path)
        self.machine.load(stored.state)
        if not self.journal.holds(stored.index, stored.term):
            # Killed between storing a leader's snapshot and resetting the journal.
            assert first.index <= stored.index
            self.journal.reset(Entry(NO_OP, stored.index, stored.term))
        self.members.begin(stored.members, self.journal.held())
        self._begin_at(stored.index)

    def _keep_past(self) -> None:
        """Before a snapshot is replaced: what it and the journal say goes to the archive."""
        if self._archive is not None:
            self.journal.sync()
            self._archive.keep(self._snapshot_index, self.applied_index)

    def _begin_at(self, index: int) -> None:
        self._snapshot_index = index
        self._SyncObj__raftLastApplied = index
        self.advance_commit(index)
        self._compact_at = self.journal.size_bytes + self._snapshot_bytes

    def _start_handovers(self) -> None:
        while self._handovers:
            to, done = self._handovers.popleft()
            try:
                if self.handover is not None:
                    raise ChangeUnderWay("the leadership is being handed over")
                self.handover = Handover(self, to, done)
            except MillError as error:
                done(error)

    def _refuse_proposals(self) -> None:
        while self._inbox:
            self._inbox.popleft()[1](0, None, NotLeader(self.other_leader))

    def _drop_waiting(self, why: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for _, done in waiting.values():
            done(0, None, OutcomeUnknown(why))

    # pysyncobj's own methods, replaced or extended (`pinned.OVERRIDDEN`).

    def _SyncObj__setState(self, newState: int) -> None:
        was_leader = self.is_raft_leader
        super()._SyncObj__setState(newState)
        if was_leader and not self.is_raft_leader:
            if self._SyncObj__raftLeader is self.selfNode:
                self._SyncObj__raftLeader = None
            self._drop_waiting("this node lost its leadership before the commit")
            if self._announced:
                self._announced = False
                self.listener.led(False, self.term)

    def _SyncObj__connectedToAnyone(self) -> bool:
        """Pysyncobj asks this right before it begins an election."""
        return self.elections.may_stand

    def _SyncObj__onBecomeLeader(self) -> None:
        self.match_index.clear()
        for peer in self.members.followers:  # pysyncobj knows of the voters alone
            self.replication.begin(peer)
        super()._SyncObj__onBecomeLeader()
        self.last_response.update({peer: pinned.now() for peer in self.members.followers})
        self.journal.sync()

    def _SyncObj__sendAppendEntries(self) -> None:
        self._SyncObj__newAppendEntriesTime = pinned.now() + self.conf.appendEntriesPeriod
        self.replication.broadcast()

    def _SyncObj__applyLogEntries(self) -> bool:
        """Apply what is committed; False, for pysyncobj need not send what was sent here."""
        start = self.applied_index
        for index in range(start + 1, min(self.commit_index, start + APPLIED_PER_TICK) + 1):
            entry = self.journal.entry(index)
            assert entry is not None, "a committed entry is held until it is applied"
            self._apply(entry)
        if self.applied_index == start:
            return False
        self.listener.moved(self.applied_index)
        if self.applied_index < self.commit_index:
            self.transport.soon()
        if self.is_serving and not self._announced:
            self._announced = True
            self.listener.led(True, self.term)
        # What is queued carries the commit index as well, and leaves in this very tick.
        if self.is_raft_leader and not self._inbox:
            self.replication.announce_commit()
        return False

    def _apply(self, entry: Entry) -> None:
        match entry.command[:1]:
            case b"\0":
                result = self.machine.apply(entry.index, entry.command[1:])
            case b"\1" | b"\2":  # a configuration: in effect since it was appended
                result = None
            case kind:
                raise LogFailed(
                    f"entry {entry.index} is of kind {kind!r}, which this version does not know",
                    hint="run the version of mill that the other nodes run",
                )
        self._SyncObj__raftLastApplied = entry.index
        waiting = self._waiting.pop(entry.index, None)
        if waiting is not None:
            term, done = waiting
            assert term == entry.term, "who waits was told when the leadership was lost"
            done(entry.index, result, None)

    def _checkCommandsToApply(self) -> None:
        """Take what is queued: one message to each follower, then one sync beside theirs."""
        self.listener.flush()
        self.members.start_asked()
        if not self.is_raft_leader:
            self._refuse_proposals()
            return
        if self.handover is not None:
            return  # they wait for its end
        taken = 0
        while self._inbox and taken < TAKEN_PER_TICK_BYTES:
            command, done = self._inbox.popleft()
            index = self.journal.last.index + 1
            self.journal.append(Entry(COMMAND + command, index, self.term))
            self._waiting[index] = (self.term, done)
            taken += len(command)
        if self._inbox or (taken and not self.voters):
            self.transport.soon()
        if taken:
            self._SyncObj__sendAppendEntries()
            self.journal.sync()

    def _SyncObj__tryLogCompaction(self) -> None:
        journal = self.journal
        if journal.size_bytes < self._compact_at or self.applied_index <= journal.first:
            return
        entry = journal.entry(self.applied_index)
        assert entry is not None, "the entry applied last is held"
        members = self.members.as_of(entry.index)
        state = Snapshot(entry.index, entry.term, self.machine.dump(), members)
        self._keep_past()
        self.snapshots.store(snapshot.encode(state))
        self._snapshot_index = entry.index
        self.replication.forget_transfers()
        journal.compact(journal.start_of(entry.index, self._snapshot_bytes // KEPT_FOR_FOLLOWERS))
        self.members.forget_before(entry.index)
        self._compact_at = journal.size_bytes + self._snapshot_bytes

    def _applyCommand(self, *_arguments: object) -> NoReturn:
        raise AssertionError("commands enter by `propose`")

    def _SyncObj__doApplyCommand(self, *_arguments: object) -> NoReturn:
        raise AssertionError("entries are applied by `_apply`")

    def _SyncObj__loadDumpFile(self, *_arguments: object) -> NoReturn:
        raise AssertionError("snapshots are loaded by `_load` and `install`")

    def _SyncObj__parseChangeClusterRequest(self, *_arguments: object) -> NoReturn:
        raise AssertionError("the members change by `members`")
