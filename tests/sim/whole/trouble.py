"""What befalls the machines: one fault at a time, or the end of some."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from reconciler.executor.agent.supervise import Exit
from tests.sim.whole.world import WholeNode, WholeWorld


@dataclass
class Trouble:
    """`every_s` between two faults, `revive`: how likely each that is down comes back then."""

    world: WholeWorld
    every_s: float
    revive: float
    counts: Counter[str] = field(default_factory=Counter)
    _next_s: float = 1_005.0  # the cluster is founded first

    def step(self) -> None:
        """Now and then."""
        if self.world.now_s < self._next_s:
            return
        rng = self.world.rng
        self._next_s = self.world.now_s + rng.uniform(0.2, 1.8) * self.every_s
        nodes = self.world.present
        leading = [n for n in nodes if n.leads]
        kind = rng.choices(
            ("power", "kill", "bounce", "part", "one_way", "alone", "pause", "stall", "disk",
             "wipe", "clock", "blackout", "exits", "ill", "faulty", "mend"),
            (3, 3, 4, 2, 3, 2, 5, 3, 1, 1, 2, 0.5, 4, 2, 3, 6))[0]
        of_leaders = 0.8 if kind == "stall" else 0.4
        node = rng.choice(leading if leading and rng.random() < of_leaders else nodes)
        self.counts[kind] += 1
        self.world.note(f"{kind} {node.name}")
        getattr(self, f"_{kind}")(node)
        self._bring_back(nodes)

    def _bring_back(self, nodes: list[WholeNode]) -> None:
        rng = self.world.rng
        if rng.random() < 0.5 * self.revive:
            self._mend(nodes[0])
        for node in nodes:
            if node.disk.faulty and rng.random() < self.revive:
                node.disk.mend()
            if node.process is None and rng.random() < self.revive:
                self.world.restart(node)

    def _power(self, node: WholeNode) -> None:
        self.world.promises.hit(node.name)
        self.world.crash(node)

    def _kill(self, node: WholeNode) -> None:
        self.world.promises.hit(node.name)
        self.world.kill(node)

    def _bounce(self, node: WholeNode) -> None:
        """Killed, and back at once, before anybody notices."""
        self._kill(node)
        self.world.restart(node)

    def _part(self, node: WholeNode) -> None:
        other = self.world.rng.choice(self.world.present)
        self._cut([(node.name, other.name), (other.name, node.name)])

    def _one_way(self, node: WholeNode) -> None:
        other = self.world.rng.choice(self.world.present)
        ways = [(node.name, other.name), (other.name, node.name)]
        self._cut([self.world.rng.choice(ways)])

    def _alone(self, node: WholeNode) -> None:
        others = [each.name for each in self.world.present if each is not node]
        self._cut([way for name in others for way in ((node.name, name), (name, node.name))])

    def _cut(self, ways: list[tuple[str, str]]) -> None:
        """For all, or (a port that is filtered) for the log or for the agents alone."""
        whom = self.world.rng.choices(("all", "log", "agents"), (4, 1, 1))[0]
        for source, target in ways:
            if source != target and whom != "agents":
                self.world.cut(source, target)
            if source != target and whom != "log":
                self.world.streams.cut.add((source, target))

    def _pause(self, node: WholeNode) -> None:
        """It stands still, then wakes with the orders that it held; its log perhaps last."""
        self.world.promises.hit(node.name)
        rng = self.world.rng
        long_s = rng.choice((0.5, 3.0, 3.0, 20.0))
        node.freeze(rng.uniform(0.1, long_s), rng.choice((0.0, 0.0, 0.05, 1.0, 8.0)))

    def _stall(self, node: WholeNode) -> None:
        """Its log stands still in a slow sync, while everything else of it goes on."""
        self.world.promises.hit(node.name)
        node.paused_until_s = self.world.now_s + self.world.rng.uniform(0.5, 12.0)

    def _disk(self, node: WholeNode) -> None:
        match self.world.rng.randrange(3):
            case 0:
                node.disk.full = True
            case 1:
                node.disk.broken = True
            case _:
                node.disk.flaky = self.world.rng.choice((0.02, 0.2))

    def _wipe(self, node: WholeNode) -> None:
        """Its disk is lost and another in its place: one at a time, of three or five voters."""
        known = self.world.invariants.members
        voters = known.voters if known else self.world.founding
        found = {each.name for each in node.founding} - {node.name}
        there = {each.name for each in self.world.present}
        # With its log it loses all names but those that it was set up with.
        if len(voters) > 2 and self.world.settled and found & there:
            self.world.promises.hit(node.name)
            self.world.wipe(node)

    def _clock(self, node: WholeNode) -> None:
        node.wall_off_ms += round(self.world.rng.choice((200, 2_000, 30_000))
                                  * self.world.rng.uniform(-1.0, 1.0))

    def _blackout(self, _node: WholeNode) -> None:
        for node in self.world.present:
            self._power(node)

    def _exits(self, node: WholeNode) -> None:
        running = [a for a, c in sorted(node.containers.by_alloc.items()) if c.ended is None]
        if running:
            alloc = self.world.rng.choice(running)
            self.world.promises.hit(alloc)
            node.containers.by_alloc[alloc].end(Exit(137, oom=self.world.rng.random() < 0.3))

    def _ill(self, node: WholeNode) -> None:
        for alloc, container in sorted(node.containers.by_alloc.items()):
            if self.world.rng.random() < 0.5:
                self.world.promises.hit(alloc)
                container.ill_until_s = self.world.now_s + self.world.rng.uniform(0.5, 8.0)

    def _faulty(self, node: WholeNode) -> None:
        """Its containerd fails most of what it is asked, for a while."""
        self.world.promises.hit(node.name)
        node.containers.faulty_until_s = self.world.now_s + self.world.rng.uniform(0.5, 8.0)

    def _mend(self, _node: WholeNode) -> None:
        """A moment of peace."""
        self.world.network.cut.clear()
        self.world.streams.cut.clear()
