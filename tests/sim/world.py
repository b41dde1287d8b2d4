"""A cluster of the log in one process: the real code, a seeded clock, network and disk."""

from __future__ import annotations

import random
from collections.abc import Callable

import msgspec

from reconciler.errors import MillError
from reconciler.log import acquaintance, pinned, wire
from reconciler.log.configuration import Change
from reconciler.log.core import Peer, PeerTransport
from reconciler.log.errors import DiskFailed
from reconciler.log.hardening import Parts, Raft
from reconciler.log.journal import Journal
from reconciler.log.records import Entry
from reconciler.log.rejoin import is_rejoining, set_aside
from reconciler.log.reopening import reopen
from reconciler.log.settings import Member, Membership, Timing
from reconciler.log.snapshot import Snapshots
from tests.sim.disk import SimDisk
from tests.sim.invariants import Invariants, Violation
from tests.sim.network import Flight, Network

STEP_S = 0.01
REOPEN_STEPS = 30  # between two tries of a closed log; its real pace would only cost worlds
SNAPSHOT_BYTES = 8 << 10  # a snapshot every 150 commands or so

CHUNK_BYTES = (1 << 10, 256 << 10)  # a snapshot in many parts, or in one


class SimTransport(PeerTransport):
    """Hands messages to the simulated network."""

    def __init__(self, node: SimNode) -> None:
        super().__init__()
        self._node = node
        self.reached: frozenset[str] = frozenset()

    def follow(self, members: dict[str, Member]) -> None:
        self.reached = frozenset(members)

    def transmit(self, peer: Peer, message: wire.Message) -> bool:
        self._node.world.invariants.said(self._node, str(peer.id), message)
        if isinstance(message, wire.Vote):
            self._node.world.voted(self._node)
        if isinstance(message, wire.Ack | wire.Vote | wire.RequestVote) and (
            self.raft.journal.unsynced
        ):
            raise Violation(f"{self._node.name} promises before its journal is synced: {message}")
        return self._node.world.send(self._node, str(peer.id), wire.encode(message))

    def has_room(self, peer: Peer) -> bool:
        return peer in self.raft.connected_peers

    def soon(self) -> None:
        """The world's next step comes anyway."""


class NullPoller:
    def poll(self, timeout_s: float) -> None:
        """The world delivers."""


class SimMachine:
    """Remembers each command; every apply is compared with all other nodes'."""

    def __init__(self, name: str, invariants: Invariants) -> None:
        self._name, self._invariants = name, invariants
        self.items: list[tuple[int, bytes]] = []

    def apply(self, index: int, command: bytes) -> object:
        assert not self.items or index > self.items[-1][0], f"{self._name} applies {index} again"
        self._invariants.applied(self._name, index, command)
        self.items.append((index, command))
        return len(self.items)

    def dump(self) -> bytes:
        return msgspec.msgpack.encode(self.items)

    def load(self, snapshot: bytes) -> None:
        self.items = msgspec.msgpack.decode(snapshot, type=list[tuple[int, bytes]])
        self._invariants.loaded(self._name, self.items)

    def reset(self) -> None:
        self.items = []


class SimNode:
    """One machine: its disk outlives its process."""

    def __init__(self, world: World, name: str, founding: tuple[Member, ...]) -> None:
        self.world, self.name, self.founding = world, name, founding
        self.disk = SimDisk(name, world.rng)
        self.epoch = 0  # each life has its own; a connection does not outlive either end
        self.skew_s = 0.0
        self.paused_until_s = 0.0
        self.held: list[Flight] = []  # what the kernel keeps for a paused process
        self.raft: Raft | None = None
        self.journals: list[Journal] = []  # the present one, and that of a lost disk
        self.closed = False  # by its disk: the process lives, and tries to open its log again
        self.machine = SimMachine(name, world.invariants)

    @property
    def journal(self) -> Journal:
        assert self.raft is not None
        return self.raft.journal

    @property
    def term(self) -> int:
        assert self.raft is not None
        return self.raft.term

    @property
    def membership(self) -> Membership:
        assert self.raft is not None
        return self.raft.members.latest

    def membership_at(self, index: int) -> Membership:
        assert self.raft is not None
        return self.raft.members.as_of(index)

    @property
    def commit_index(self) -> int:
        assert self.raft is not None
        return self.raft.commit_index

    @property
    def leads(self) -> bool:
        return self.raft is not None and self.raft.is_raft_leader

    @property
    def applied_index(self) -> int:
        return 0 if self.raft is None else self.raft.applied_index

    @property
    def paused(self) -> bool:
        return self.paused_until_s > self.world.now_s

    def start(self) -> None:
        self.closed = False
        self.machine = SimMachine(self.name, self.world.invariants)
        self._open(reopen(self.disk))

    def reopen(self) -> None:
        """In the same process: the machine is the one from before."""
        self._open(reopen(self.disk))
        self.closed = False

    def _open(self, journal: Journal) -> None:
        self.epoch = self.world.lives = self.world.lives + 1
        self.journals[-1:] = [journal]
        parts = Parts(
            journal, Snapshots(self.disk), self.machine, SimTransport(self), NullPoller(), self,
            self.disk,
        )  # fmt: skip
        self.raft = Raft(self.name, self.founding, parts, self.world.timing, SNAPSHOT_BYTES)
        self.raft.replication.chunk_bytes = self.world.chunk_bytes

    def close(self) -> None:
        self.raft, self.closed = None, True
        self.held.clear()

    def kill(self) -> None:
        """SIGKILL: the kernel's cache stays."""
        self.raft, self.closed = None, False
        self.held.clear()
        self.paused_until_s = 0.0

    def crash(self, rng: random.Random) -> None:
        self.kill()
        self.disk.crash(rng)

    # hardening.Listener

    def moved(self, applied_index: int) -> None: ...

    def led(self, leading: bool, term: int) -> None: ...

    def flush(self) -> None: ...


class World:
    """`members` nodes; everything that happens follows from the seed."""

    def __init__(
        self, rng: random.Random, members: int, *, wild: bool, slow_s: float,
        timing: Timing | None = None,
    ) -> None:
        self.rng = rng
        self.timing = timing or Timing()
        self.now_s = 1000.0
        self._skew_s = 0.0
        pinned.use_time(lambda: self.now_s + self._skew_s, rng)
        self.chunk_bytes = rng.choice(CHUNK_BYTES)
        self.invariants = Invariants()
        self.network = Network(rng, wild=wild, slow_s=slow_s)
        self.nodes: dict[str, SimNode] = {}
        self.lives = 0
        founding = tuple(member(f"n{number}") for number in range(members))
        for each in founding:
            self.nodes[each.name] = SimNode(self, each.name, founding)
        self.links: set[frozenset[str]] = set()
        self.crash_voters = 0.0  # how likely a voter loses power right after it voted
        self._doomed: list[SimNode] = []
        self.buried: dict[str, list[Journal]] = {}  # what scrapped machines held
        self.changes = 0
        self.commands = 0
        self.failed_disks = 0
        self.reopened = 0
        self.steps = 0
        for node in self.nodes.values():
            self._in(node, node.start)

    @property
    def live(self) -> list[SimNode]:
        return [node for node in self.nodes.values() if node.raft is not None]

    def send(self, node: SimNode, target: str, data: bytes) -> bool:
        other = self.nodes.get(target)
        if other is None or other.raft is None or (node.name, target) in self.network.cut:
            return False
        if not _reaches(other, node):
            return False
        self.network.send(self.now_s, node.name, target, (node.epoch, other.epoch), data)
        return True

    def step(self) -> None:
        """10 ms: deliver, tick everybody, check everything."""
        self.now_s += STEP_S
        self._connect()
        for flight in self.network.due(self.now_s):
            self._deliver(flight)
        for node in self.live:
            if not node.paused:
                self._tick(node)
        doomed, self._doomed = self._doomed, []
        for node in doomed:
            self.crash(node)
            self.restart(node)
        self.steps += 1
        if self.steps % REOPEN_STEPS == 0:
            for node in self.nodes.values():
                if node.closed and not node.paused:
                    self._in(node, node.reopen)
                    self.reopened += not node.closed
        self.invariants.check(list(self.live), self._holds)

    def propose(self, node: SimNode) -> None:
        assert node.raft is not None
        self.commands += 1
        command = b"%d" % self.commands + b"." * self.rng.randrange(40)

        def done(index: int, _result: object, error: MillError | None) -> None:
            if error is None:
                self.invariants.acknowledged(node.name, node.term, index, command)

        node.raft.propose(command, done)

    def read(self, node: SimNode) -> None:
        assert node.raft is not None
        asked_at = self.invariants.highest_acked

        def done(index: int, error: MillError | None) -> None:
            if error is None:
                self.invariants.read(node.name, asked_at, index)

        node.raft.reads.ask(done)

    def change(self, node: SimNode, change: Change) -> None:
        """Ask for a change of the members; whether it came about is for the world to see."""
        assert node.raft is not None

        def done(_index: int, _result: object, error: MillError | None) -> None:
            self.changes += error is None

        node.raft.members.ask(change, done)

    def hand_over(self, node: SimNode, to: str | None) -> None:
        assert node.raft is not None
        node.raft.hand_over(to, lambda error: None)

    def join(self, name: str, found: tuple[Member, ...]) -> SimNode:
        """An empty node comes up that knows of these voters."""
        node = self.nodes[name] = SimNode(self, name, found)
        former = self.buried.pop(name, [])
        node.journals = [*former, *former[-1:]]
        self._in(node, node.start)
        return node

    def forget(self, node: SimNode) -> None:
        """A removed machine is scrapped, its disk with it."""
        self.kill(node)
        self.buried[node.name] = node.journals
        del self.nodes[node.name]

    def voted(self, node: SimNode) -> None:
        if self.crash_voters and self.rng.random() < self.crash_voters:
            self._doomed.append(node)

    def crash(self, node: SimNode) -> None:
        node.crash(self.rng)
        self._unlink_all(node)

    def wipe(self, node: SimNode) -> None:
        """Its disk is gone; another one is in its place, and the node rejoins."""
        for each in self.live:  # nobody shrinks the voters while one of them cannot vote
            assert each.raft is not None
            each.raft.members._asked.clear()
        self.crash(node)
        node.journals = [*node.journals[-1:], *node.journals[-1:]]
        known = acquaintance.load(node.disk)
        node.disk = SimDisk(node.name, self.rng)
        if known is not None:  # a person says so; or only its journal was damaged
            acquaintance.store(node.disk, known)
        set_aside(node.disk)
        self.restart(node)

    @property
    def rejoining(self) -> list[SimNode]:
        return [node for node in self.nodes.values() if is_rejoining(node.disk)]

    @property
    def members(self) -> list[SimNode]:
        """Who takes part, as the newest leader has it; nobody where none leads."""
        leaders = [node for node in self.live if node.leads]
        if not leaders:
            return []
        newest = max(leaders, key=lambda each: each.term).membership
        return [self.nodes[each.name] for each in newest.everyone if each.name in self.nodes]

    def kill(self, node: SimNode) -> None:
        node.kill()
        self._unlink_all(node)

    def restart(self, node: SimNode) -> None:
        self._in(node, node.start)

    def cut(self, source: str, target: str) -> None:
        """One way; a tame network then loses the connection, both ways."""
        self.network.cut.add((source, target))
        if not self.network.wild:
            self._unlink(source, target)

    def heal(self) -> None:
        """End every fault; restart everybody."""
        self.network.heal()
        for node in self.nodes.values():
            node.paused_until_s = 0.0
            node.disk.mend()
            if node.raft is None and not node.closed:
                self.restart(node)

    def _holds(self, name: str, entry: Entry) -> bool:
        """Whether the node's log has, or had before its disk was lost, this entry."""
        node = self.nodes.get(name)
        journals = self.buried.get(name, []) if node is None else node.journals
        return any(
            journal.first > entry.index or journal.holds(entry.index, entry.term)
            for journal in journals
        )

    def _connect(self) -> None:
        for pair in sorted(self.links, key=sorted):
            one, other = (self.nodes[name] for name in sorted(pair))
            if not (_reaches(one, other) and _reaches(other, one)):
                self._unlink(one.name, other.name)
        for one in self.live:
            for other in self.live:
                pair = frozenset((one.name, other.name))
                if one.name >= other.name or pair in self.links:
                    continue
                if not (_reaches(one, other) and _reaches(other, one)):
                    continue
                ways = {(one.name, other.name), (other.name, one.name)}
                if self.network.wild or not ways & self.network.cut:
                    self.links.add(pair)
                    self._tell(one, other, "_onNodeConnected")
                    self._tell(other, one, "_onNodeConnected")

    def _unlink_all(self, node: SimNode) -> None:
        for other in self.live:
            self._unlink(node.name, other.name)

    def _unlink(self, one: str, other: str) -> None:
        pair = frozenset((one, other))
        if pair in self.links:
            self.links.discard(pair)
            self._tell(self.nodes[one], self.nodes[other], "_onNodeDisconnected")
            self._tell(self.nodes[other], self.nodes[one], "_onNodeDisconnected")

    def _tell(self, node: SimNode, other: SimNode, event: str) -> None:
        if node.raft is not None:
            getattr(node.raft.transport, event)(Peer(other.name))

    def _deliver(self, flight: Flight) -> None:
        node, source = self.nodes.get(flight.target), self.nodes.get(flight.source)
        if node is None or source is None:
            return
        stale = flight.epochs != (source.epoch, node.epoch)  # of a connection that is gone
        if node.raft is None or (stale and not self.network.wild) or not _reaches(node, source):
            return
        if node.paused:
            node.held.append(flight)
            return
        self.network.seen(flight)
        raft = node.raft
        led, stranger = node.leads, raft.members.latest.get(source.name) is None
        peer = Peer(source.name)
        self._in(node, lambda: raft.transport.receive(peer, wire.decode(flight.data)))
        if led and stranger and node.raft is not None and not node.leads:
            raise Violation(f"{source.name}, no member any more, deposes {node.name}")

    def _tick(self, node: SimNode) -> None:
        held, node.held = node.held, []
        for flight in held:
            self._deliver(flight)
        raft = node.raft
        if raft is not None:
            self._in(node, lambda: raft.doTick(0.0))

    def _in(self, node: SimNode, action: Callable[[], object]) -> None:
        """Run on this node's clock; a failing disk closes its log, and nothing else may."""
        self._skew_s = node.skew_s
        try:
            action()
        except DiskFailed:
            if not node.disk.faulty:
                raise
            self.failed_disks += not node.closed
            node.close()
            self._unlink_all(node)
        finally:
            self._skew_s = 0.0


def member(name: str) -> Member:
    return Member(name, "10.0.0.1", 4401)


def _reaches(node: SimNode, other: SimNode) -> bool:
    transport = None if node.raft is None else node.raft.transport
    return isinstance(transport, SimTransport) and other.name in transport.reached
