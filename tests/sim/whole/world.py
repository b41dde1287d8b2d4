"""The log's world with the rest of mill in it: processes over containers, streams, and people."""

from __future__ import annotations

import hashlib
import random
import shutil
from pathlib import Path

from reconciler.edge.table import EdgeTable
from reconciler.executor.membership import wanted_voters
from reconciler.executor.moves import draining, pairs
from reconciler.log.reopening import reopen
from reconciler.log.settings import Member
from tests.sim.invariants import Violation
from tests.sim.whole.containers import Containers
from tests.sim.whole.kept import KeptTerms
from tests.sim.whole.loop import SimLoop
from tests.sim.whole.process import Process
from tests.sim.whole.promises import LogPromises, Promises
from tests.sim.whole.streams import Streams
from tests.sim.world import SimNode, World

HARM_STEPS = 10


class WholeNode(SimNode):
    """A machine: disk and containers outlive its process, the disk alone a power cut."""

    world: WholeWorld

    def __init__(self, world: WholeWorld, name: str, founding: tuple[Member, ...]) -> None:
        super().__init__(world, name, founding)
        self.folder = world.folder / name
        self.kept = KeptTerms(world.folder / f"{name}.term")  # beside its log, which may be lost
        self.out = False  # it has learnt that it was removed: its process is ending
        self.gone = False  # and its machine is scrapped
        self.containers = Containers(self)
        self.process: Process | None = None
        self.powered = True
        self.frozen_until_s = 0.0  # the whole process; `paused_until_s` is of its raft thread
        self.wall_off_ms = 0
        self.edge = EdgeTable()

    @property
    def here(self) -> bool:
        """A machine of this cluster: it has joined, and does not know of its removal."""
        return not self.gone and self.name in self.world.nodes

    @property
    def frozen(self) -> bool:
        """Its process stands still."""
        return self.frozen_until_s > self.world.now_s

    def freeze(self, for_s: float, log_longer_s: float) -> None:
        """SIGSTOP, then SIGCONT; the raft thread may be the last to run again."""
        self.frozen_until_s = self.world.now_s + for_s
        self.paused_until_s = self.frozen_until_s + log_longer_s

    def start(self) -> None:
        """Power, if it was off, and the process."""
        self.closed, self.powered = False, True
        self.process = Process(self)
        self.world.loops.append(self.process.loop)
        self.machine = self.process.machine  # type: ignore[assignment]  # the real one
        try:
            self._open(reopen(self.disk))
        except BaseException:
            self.process.replica.shut(f"the disk of {self.name} fails")
            raise
        assert self.raft is not None
        self.process.replica.opened(self.raft)

    def reopen(self) -> None:
        """In the same process."""
        super().reopen()
        assert self.raft is not None
        assert self.process is not None
        self.process.replica.opened(self.raft)

    def close(self) -> None:
        """The disk fails: the log of this node closes, and nothing else of it."""
        raft, process = self.raft, self.process
        if raft is not None and process is not None:
            raft.fail_waiting("this node's log stopped")
            if process.replica.announced:
                process.replica.led(False, raft.term)
            process.replica.flush(raft)
        if process is not None:
            process.replica.shut(f"the disk of {self.name} fails")
        super().close()

    def kill(self) -> None:
        """SIGKILL of the process: not a line of it runs any more."""
        process, self.process = self.process, None
        self.frozen_until_s = 0.0
        super().kill()
        if process is not None:
            self.world.streams.gone(process, power=False)

    def crash(self, rng: random.Random) -> None:
        """A power cut: containers, edge and what is on its way are gone."""
        process, self.process = self.process, None
        super().crash(rng)
        self.powered = False
        self.containers.cut_power()
        self.edge = EdgeTable()
        self.kept.cut_power(rng)
        if process is not None:
            self.world.streams.gone(process, power=True)
        if self.folder.exists():
            for path in sorted(self.folder.iterdir()):
                _lose(path, rng)

    # hardening.Listener

    def led(self, leading: bool, term: int) -> None:
        if self.process is not None:
            self.process.replica.led(leading, term)

    def flush(self) -> None:
        if self.process is not None and self.raft is not None:
            self.process.replica.flush(self.raft)


def _lose(path: Path, rng: random.Random) -> None:
    """Of an order that was not synced: nothing, its name alone, or all is left."""
    match rng.randrange(4):
        case 0:
            path.unlink()
        case 1:
            path.write_bytes(path.read_bytes()[: rng.randrange(40)])
        case _:
            pass


class WholeWorld(World):
    """`members` machines found the cluster, all of them voters; others join."""

    invariants: LogPromises

    def __init__(
        self, rng: random.Random, members: int, folder: Path, *, wild: bool, slow_s: float
    ) -> None:
        super().__init__(rng, 0, wild=wild, slow_s=slow_s)
        self.folder = folder
        self.invariants = LogPromises()
        self.promises = Promises(self)
        self.streams = Streams(self)
        self.loops: list[SimLoop] = []
        self.digest = hashlib.sha256()
        self.failure = ""
        self._ids = 0
        self.handovers = 0
        self.whole: dict[str, WholeNode] = {}  # those that will join and those that left too
        self._arriving: list[tuple[WholeNode, tuple[Member, ...]]] = []
        founding = self.founding = tuple(member(number) for number in range(1, members + 1))
        for each in founding:
            self.whole[each.name] = self.nodes[each.name] = WholeNode(self, each.name, founding)
        for node in self.whole.values():
            self._in(node, node.start)

    @property
    def present(self) -> list[WholeNode]:
        """The cluster's machines."""
        return [node for node in self.whole.values() if node.here]

    @property
    def settled(self) -> bool:
        """Members of the log are the nodes of the state, as many vote as should, none without its
        disk. Else a machine that is lost for good may have been one too many."""
        nodes = self.promises.newest.nodes
        known = self.invariants.members
        voters = known.voters if known else self.founding
        everyone = {each.name for each in (known.everyone if known else self.founding)}
        return (everyone == nodes.keys() and len(voters) == wanted_voters(len(nodes))
                and not self.rejoining)

    def new_machine(self) -> WholeNode:
        """One that nobody knows yet; it is off until it `arrive`s."""
        name = f"n{len(self.whole) + 1}"
        node = self.whole[name] = WholeNode(self, name, ())
        node.powered = False
        return node

    def arrive(self, node: WholeNode, found: tuple[Member, ...]) -> None:
        """It has joined: at the end of this step it starts, and knows of these members."""
        self._arriving.append((node, found))

    def new_id(self, service: str) -> str:
        """An allocation's."""
        self._ids += 1
        return f"{service}-{self._ids:06d}"

    def note(self, what: str) -> None:
        """Fold what happened into the run's fingerprint."""
        self.digest.update(f"{self.now_s:.2f} {what}\n".encode())

    def fail(self, what: str) -> None:
        """Something that must not be; raised at the end of the step, out of the loop's reach."""
        self.failure = self.failure or what

    def step(self) -> None:
        """10 ms of the log, then of everything else."""
        super().step()
        self.streams.step()
        for node in self.whole.values():
            node.containers.step()
            if node.process is not None and not node.frozen:
                node.process.loop.pump()
        self._come_and_go()
        if self.steps % HARM_STEPS == 0:
            self._harm()
            self._look_for_the_deaf()
        if self.failure:
            raise Violation(self.failure)

    def heal(self) -> None:
        """End every fault; restart everybody."""
        self.network.heal()
        self.streams.cut.clear()
        for node in self.present:
            node.frozen_until_s = node.paused_until_s = 0.0
            node.containers.recover()
            node.disk.mend()
            if node.process is None:
                self.restart(node)

    def end(self) -> None:
        """Let go of everything."""
        for loop in self.loops:
            loop.end()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _come_and_go(self) -> None:
        """Who has joined starts; who knows that it was removed ends, and is cleaned."""
        arriving, self._arriving = self._arriving, []
        for node, found in arriving:
            if not node.here and not node.gone:
                node.founding = found
                self.nodes[node.name] = node
                self._in(node, node.start)
                self.note(f"{node.name} joins")
        for node in self.present:
            if node.out:
                self.kill(node)
                node.gone, node.powered = True, False
                node.containers.cut_power()
                self.note(f"{node.name} leaves")

    def _look_for_the_deaf(self) -> None:
        for node in self.whole.values():
            if node.process is not None and not node.frozen:
                deaf = node.process.loop.deaf()
                if deaf:
                    self.fail(f"{node.name}: {deaf}")

    def _harm(self) -> None:
        """Whom the world keeps from doing their work at this moment."""
        cut = self.network.cut | self.streams.cut
        self.promises.hit(*(name for way in sorted(cut) for name in way))
        moves = pairs(self.promises.newest)
        self.promises.hit(*(each.id for pair in moves for each in (pair.stays, pair.goes)))
        self.promises.hit(*draining(self.promises.newest))
        for node in self.present:
            if (node.process is None or node.paused or node.closed
                    or node.containers.faulty_until_s > self.now_s):
                self.promises.hit(node.name)



def member(number: int) -> Member:
    """Of the log: each machine has an address of its own."""
    return Member(f"n{number}", f"10.0.0.{number}", 4401)
