"""Members come and go, at random: 1 to 3 to 5 voters and back, with learners beside them.

What is asked for may be refused, and the leader that took it may die in the middle: all of
that is the world's business. What is never done is what the log does not promise to survive:
a disk is not wiped under a name that takes part, and no majority is scrapped.
"""

from __future__ import annotations

from reconciler.log.configuration import AddLearner, Demote, Promote, Remove
from reconciler.log.settings import Membership
from tests.sim.world import SimNode, World, member

MAX_MACHINES = 8
GOALS = (1, 3, 3, 5)


class Reshaping:
    """Walks towards a number of voters, and now and then picks another."""

    def __init__(self, world: World) -> None:
        self._world, self._rng = world, world.rng
        self._goal = world.rng.choice(GOALS)
        self._number = len(world.nodes)
        self.every = world.rng.choice((10, 30, 80))

    def step(self) -> None:
        """Ask the leader, or who takes itself for one, for one change; or scrap a machine."""
        world, rng = self._world, self._rng
        leaders = [node for node in world.live if node.leads and not node.paused]
        if not leaders or world.rejoining:
            return
        if rng.random() < 0.1:
            self._goal = rng.choice(GOALS)
        leader = rng.choice(leaders)
        if rng.random() < 0.1:
            self._scrap()
            return
        self._ask(leader, leader.membership)
        if rng.random() < 0.1:  # in the middle of it
            world.crash(leader)
            if rng.random() < 0.5:
                world.restart(leader)

    def end(self) -> None:
        """Who joined, heard of nobody since, and knows only machines that are gone, joins again:
        a person has to see to that."""
        world = self._world
        known = world.invariants.members
        if known is None:
            return
        for node in list(world.nodes.values()):
            silent = node.raft is not None and node.journal.last.index == 1
            if silent and not any(known.get(each.name) for each in node.founding):
                world.forget(node)
                world.join(node.name, known.voters)

    def _ask(self, leader: SimNode, present: Membership) -> None:
        world, rng = self._world, self._rng
        voters = [each.name for each in present.voters]
        learners = [each.name for each in present.learners]
        kind = rng.random()
        if kind < 0.1:
            world.hand_over(leader, rng.choice([None, *voters]))
        elif kind < 0.2 and learners:
            world.change(leader, Remove(rng.choice(learners)))
        elif len(voters) > self._goal or kind < 0.35:
            name = rng.choice(voters)
            if name == leader.name:
                world.hand_over(leader, None)
            elif len(voters) > 1:
                world.change(leader, rng.choice((Demote, Remove))(name))
        elif learners and kind < 0.85:
            world.change(leader, Promote(rng.choice(learners)))
        else:
            self._add(leader, present)

    def _add(self, leader: SimNode, present: Membership) -> None:
        world, rng = self._world, self._rng
        outside = [node.name for node in world.nodes.values() if present.get(node.name) is None]
        if outside and rng.random() < 0.7:  # removed before, and its log still there
            world.change(leader, AddLearner(member(rng.choice(outside))))
        elif len(world.nodes) < MAX_MACHINES:
            scrapped = sorted(world.buried)
            if scrapped and rng.random() < 0.5:
                name = rng.choice(scrapped)  # the same name, an empty disk
            else:
                name, self._number = f"n{self._number}", self._number + 1
            world.join(name, present.voters)
            world.change(leader, AddLearner(member(name)))

    def _scrap(self) -> None:
        """Take a machine away for good whose removal is committed."""
        world = self._world
        known = world.invariants.members
        if known is None:
            return
        outside = [
            node for node in world.nodes.values()
            if all(held.get(node.name) is None for held in (known, *_open(world, known)))
        ]  # fmt: skip
        if outside:
            world.forget(self._rng.choice(outside))


def _open(world: World, known: Membership) -> list[Membership]:
    """Later configurations that some log holds, committed or not."""
    return [node.membership for node in world.live if node.membership.index > known.index]
