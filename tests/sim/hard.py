"""Worlds made for mistakes that ordinary trouble brings out too rarely.

Each says which coincidence a mistake needs, and brings it about again and again; what the
log promises must hold in them as everywhere.
"""

from __future__ import annotations

import random
from typing import Protocol

from reconciler.log.settings import Timing
from tests.sim.world import SimNode, World


class Hardship(Protocol):
    """One kind of world, and what happens in it after each step."""

    def __init__(self, world: World) -> None: ...
    @staticmethod
    def world(rng: random.Random) -> World: ...
    def step(self, number: int) -> None: ...


class StaleAcks:
    """An answer of an older term arrives when its sender is leader again, in a later one.

    It does harm where the follower has lost since what it acknowledged then, which takes five
    nodes: a leader with one follower, cut off, writes what three others replace with less; then
    it leads again, with another follower, and the answers of the first come in.
    """

    PERIOD = 300

    def __init__(self, world: World) -> None:
        self._world, self._rng = world, world.rng
        self._leader: SimNode | None = None
        self._friend = ""
        self._hidden = False

    @staticmethod
    def world(rng: random.Random) -> World:
        world = World(rng, 5, wild=True, slow_s=0.0)
        world.network.late_acks = rng.choice((0.3, 0.6))
        return world

    def step(self, number: int) -> None:
        world, phase = self._world, number % self.PERIOD
        leader = max((each for each in world.live if each.leads), key=_term, default=None)
        mine = self._leader
        if phase == 0:
            self._hidden = False
            world.network.cut.clear()
        if phase == 20 and leader is not None:
            mine = self._leader = leader
            self._friend = self._leave_with_one(leader, "", both_ways=True)
        if phase == 140:
            world.network.cut.clear()
        if mine is None:
            return
        if mine.leads and self._rng.random() < 0.5:
            world.propose(mine)
        if phase >= 150 and phase % 10 == 0 and leader is not None and not self._hidden:
            if leader is mine:
                self._hidden = True
                self._leave_with_one(mine, self._friend, both_ways=False)
            else:
                world.hand_over(leader, mine.name)

    def _leave_with_one(self, leader: SimNode, not_with: str, *, both_ways: bool) -> str:
        """Cut it off together with one follower; one way, what is still due arrives."""
        names = [each.name for each in self._world.nodes.values()]
        friend = self._rng.choice([name for name in names if name not in (leader.name, not_with)])
        for name in names:
            if name not in (leader.name, friend):
                for one in (leader.name, friend):
                    self._world.cut(one, name)
                    if both_ways:
                        self._world.cut(name, one)
        return friend


class Rivals:
    """Two candidates in one term, and voters that lose power right after they voted."""

    def __init__(self, world: World) -> None:
        self._world, self._rng = world, world.rng
        self._every = world.rng.choice((100, 150, 250))

    @staticmethod
    def world(rng: random.Random) -> World:
        # All lose patience at once, so that most elections have several candidates.
        timing = Timing(election_min_s=0.6, election_max_s=rng.choice((0.61, 0.63)))
        slow_s = rng.choice((0.05, 0.1))
        world = World(rng, rng.choice((3, 3, 5)), wild=True, slow_s=slow_s, timing=timing)
        world.crash_voters = rng.choice((0.3, 0.7))
        return world

    def step(self, number: int) -> None:
        world = self._world
        for node in world.live:
            if node.leads and self._rng.random() < 0.2:
                world.propose(node)
        if number % self._every == 0:
            world.network.cut.clear()
            for node in world.live:
                if node.leads:
                    node.paused_until_s = world.now_s + 1.0


class LostNames:
    """A received snapshot's name is lost with the power, after a sync of the folder failed.

    The log opens again on what the cache shows; a journal that begins at that snapshot must
    not be durable before the snapshot is.
    """

    def __init__(self, world: World) -> None:
        self._world, self._rng = world, world.rng
        self._away: SimNode | None = None

    @staticmethod
    def world(rng: random.Random) -> World:
        return World(rng, 3, wild=False, slow_s=0.0)

    def step(self, number: int) -> None:
        world, rng = self._world, self._rng
        phase = number % 300
        for node in world.live:
            if node.leads:
                for _ in range(3):
                    world.propose(node)
        followers = [node for node in world.nodes.values() if not node.leads]
        if phase == 20:
            away = self._away = rng.choice(followers)
            world.crash(away)
        elif phase == 180 and self._away is not None:
            world.restart(self._away)
            self._away.disk.nameless = 0.7
        elif phase > 180 and self._away is not None:
            away = self._away
            if away.closed:
                away.disk.nameless = 0.0
            elif away.disk.nameless == 0.0 and away.raft is not None and rng.random() < 0.15:
                # Soon after it is open again: its next snapshot of its own ends the danger.
                world.crash(away)
                world.restart(away)


class StaleReads:
    """A leader that is cut off is asked, until it lets go, while another writes already."""

    PERIOD = 250

    def __init__(self, world: World) -> None:
        self._world, self._rng = world, world.rng
        self._alone: SimNode | None = None

    @staticmethod
    def world(rng: random.Random) -> World:
        return World(rng, rng.choice((3, 5)), wild=rng.random() < 0.5, slow_s=0.0)

    def step(self, number: int) -> None:
        world, phase = self._world, number % self.PERIOD
        for node in world.live:
            if node.leads and self._rng.random() < 0.4:
                world.read(node)
                if node is not self._alone:
                    world.propose(node)
        leader = max((each for each in world.live if each.leads), key=_term, default=None)
        if phase == 50 and leader is not None:
            self._alone = leader
            for each in world.nodes.values():
                if each is not leader:
                    world.cut(leader.name, each.name)
                    world.cut(each.name, leader.name)
        elif phase == 200:
            self._alone = None
            world.network.cut.clear()


def _term(node: SimNode) -> int:
    return node.term


KINDS: dict[str, type[Hardship]] = {
    "stale_acks": StaleAcks,
    "rivals": Rivals,
    "lost_names": LostNames,
    "stale_reads": StaleReads,
}
