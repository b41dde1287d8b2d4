"""Run the log's simulation over a range of seeds: `python -m tests.sim.run --seeds 0..1000`.

A failing seed is printed with the command that replays it. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import sys
import time
import traceback
from dataclasses import dataclass

from reconciler.log import acquaintance, pinned
from reconciler.log.rejoin import is_rejoining
from reconciler.log.settings import Membership
from tests.sim import hard
from tests.sim.disk import SimDisk
from tests.sim.invariants import Violation
from tests.sim.reshape import Reshaping
from tests.sim.world import SimNode, World

STEPS = 1500  # of 10 ms under faults
QUIET_STEPS = 1500  # at most, to agree again once the faults have ended


@dataclass(frozen=True)
class Report:
    """What one seed did."""

    seed: int
    digest: str
    acked: int
    messages: int
    highest_term: int
    steps: int
    failed_disks: int
    reopened: int
    wiped: int = 0
    changes: int = 0


def run(
    seed: int, steps: int = STEPS, *, bad_disks: bool = False, lost_disks: bool = False,
    membership: bool = False, **hardship: bool,
) -> Report:
    """One world from beginning to end; raises Violation, or whatever the log raised.

    `bad_disks`: in each second trouble a disk fills up or fails, for a while. `lost_disks`:
    one at a time is lost, and its node rejoins. `membership`: members come and go. The rest
    (`hard.KINDS`) are made for one kind of mistake each, and take the place of all this.
    """
    for name, on in hardship.items():
        kind = hard.KINDS[name]
        if on:
            return _run_hard(seed, steps, kind)
    rng = random.Random(seed)
    members = rng.choice((1, 3, 3, 3, 5, 5))
    try:
        slow_s = rng.choice((0.0, 0.0, 0.5, 1.0, 3.0))
        world = World(rng, members, wild=rng.random() < 0.5, slow_s=slow_s)
        reshaping = Reshaping(world) if membership else None
        burst = rng.choice((1, 2, 8))
        fault_every = rng.choice((5, 15, 40, 100))
        revive = rng.choice((0.2, 0.5, 1.0))
        wiped = 0
        for number in range(steps):
            world.step()
            _work(world, burst)
            if reshaping is not None and number % reshaping.every == 0:
                reshaping.step()
            if number % fault_every == 0:
                _trouble(world, revive)
                if bad_disks and rng.random() < 0.5:
                    _spoil(rng, rng.choice(list(world.nodes.values())).disk)
                if lost_disks and rng.random() < 0.3:
                    node = rng.choice(list(world.nodes.values()))
                    if _may_lose(world, node):
                        world.wipe(node)
                        wiped += 1
        if reshaping is not None:
            reshaping.end()
        return dataclasses.replace(_settle(world, seed, steps), wiped=wiped)
    finally:
        pinned.use_time(time.monotonic, random.Random())


def run_seed(seed: int, **kinds: bool) -> None:
    """As `run`, for whoever only wants to know that nothing is broken."""
    run(seed, **kinds)


def _run_hard(seed: int, steps: int, kind: type[hard.Hardship]) -> Report:
    rng = random.Random(seed)
    try:
        world = kind.world(rng)
        hardship = kind(world)
        for number in range(steps):
            world.step()
            hardship.step(number)
        return _settle(world, seed, steps)
    finally:
        pinned.use_time(time.monotonic, random.Random())


def _may_lose(world: World, node: SimNode) -> bool:
    """A disk less is a minority's, in every configuration that may be in effect; and whose it
    is knows somebody who still takes part."""
    if world.rejoining:
        return False
    held = [world.invariants.acted.get(name) for name in world.nodes]
    if not all(each is not None and len(each.voters) > 2 for each in held):
        return False
    known = acquaintance.load(node.disk) or Membership(node.founding)
    now = world.invariants.members or Membership(node.founding)
    return any(now.get(each.name) for each in known.everyone if each.name != node.name)


def _work(world: World, burst: int) -> None:
    rng = world.rng
    if rng.random() < 0.5:
        node = rng.choice(list(world.nodes.values()))
        if node.leads and not node.paused:
            for _ in range(burst):
                world.propose(node)
            if rng.random() < 0.5:
                world.read(node)


def _trouble(world: World, revive: float) -> None:
    """One fault, or the end of some; leaders get more than their share."""
    rng = world.rng
    nodes = list(world.nodes.values())
    leaders = [each for each in nodes if each.leads]
    node, other = rng.choice(leaders or nodes), rng.choice(nodes)
    if rng.random() < 0.6:
        node = rng.choice(nodes)
    match rng.randrange(12):
        case 0 | 1 if node.raft is not None or node.closed:
            world.crash(node)
        case 2 if node is not other:
            world.cut(node.name, other.name)
            world.cut(other.name, node.name)
        case 3 if node is not other:
            world.cut(node.name, other.name)
        case 4:
            for each in nodes:
                if each is not node:
                    world.cut(node.name, each.name)
                    world.cut(each.name, node.name)
        case 5:
            node.paused_until_s = world.now_s + rng.uniform(0.1, 3.0)
        case 6 if rng.random() < 0.3:
            _spoil(rng, node.disk)
        case 7:
            node.skew_s += rng.uniform(0.0, 0.5)
        case 8 if rng.random() < 0.2:
            for each in world.live:
                world.crash(each)
        case 9 if node.raft is not None:
            world.crash(node)  # and back at once: what it said must still bind it
            world.restart(node)
        case 10 if node.raft is not None or node.closed:
            world.kill(node)  # what its last sync failed to write may still look written
            world.restart(node)
        case _:
            world.network.cut.clear()
    for each in nodes:
        if each.disk.faulty and rng.random() < revive:
            each.disk.mend()
        if each.raft is None and not each.closed and rng.random() < revive:
            world.restart(each)


def _spoil(rng: random.Random, disk: SimDisk) -> None:
    """For a while: no room, no sync, or now and then either."""
    match rng.randrange(3):
        case 0:
            disk.full = True
        case 1:
            disk.broken = True
        case _:
            disk.flaky = rng.choice((0.02, 0.2, 0.5))


def _settle(world: World, seed: int, steps: int) -> Report:
    """After the last fault: a leader, the same state everywhere, nothing acknowledged lost."""
    world.heal()
    quiet = 0
    proposed = False
    while not (proposed and _agree(world)):
        quiet += 1
        if quiet > QUIET_STEPS:
            raise Violation(f"no agreement {QUIET_STEPS} steps after the last fault")
        world.step()
        leader = next((node for node in world.live if node.raft and node.raft.is_serving), None)
        if leader is not None and not proposed:
            before = len(world.invariants.acked)
            world.propose(leader)
            for _ in range(100):
                world.step()
            proposed = len(world.invariants.acked) > before
    reference = dict(world.members[0].machine.items)
    for index, command in world.invariants.acked.items():
        if reference.get(index) != command:
            raise Violation(f"acknowledged {command!r} at {index} is lost")
    return Report(
        seed,
        world.network.digest.hexdigest()[:16],
        len(world.invariants.acked),
        world.network.delivered,
        max(node.term for node in world.live),
        steps + quiet,
        world.failed_disks,
        world.reopened,
        changes=world.changes,
    )


def _agree(world: World) -> bool:
    """Every member has applied the same, and none still waits to vote."""
    members = world.members
    if not members or any(is_rejoining(node.disk) for node in members):
        return False
    return all(node.machine.items == members[0].machine.items for node in members)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0..100", help="A..B, B not included; or one seed")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--bad-disks", action="store_true", help="disks fail much more often")
    parser.add_argument("--lost-disks", action="store_true", help="disks are lost for good")
    parser.add_argument("--membership", action="store_true", help="members come and go")
    parser.add_argument("--stale-acks", action="store_true", help="answers out of older terms")
    parser.add_argument("--rivals", action="store_true", help="two candidates, voters that crash")
    parser.add_argument("--stale-reads", action="store_true", help="leaders asked in their sleep")
    parser.add_argument("--lost-names", action="store_true", help="renames that a crash undoes")
    options = parser.parse_args(arguments)
    first, _, end = options.seeds.partition("..")
    seeds = range(int(first), int(end) if end else int(first) + 1)
    logging.disable(logging.CRITICAL)
    kinds = {name: on for name, on in vars(options).items() if name not in ("seeds", "steps")}
    began, reports, failed = time.monotonic(), [], []
    for seed in seeds:
        try:
            reports.append(run(seed, options.steps, **kinds))
        except Exception as error:  # noqa: BLE001  # a failing seed is a result
            failed.append(seed)
            print(f"seed {seed} FAILED: {type(error).__name__}: {error}")
            more = "".join(f" --{name.replace('_', '-')}" for name, on in kinds.items() if on)
            print(
                f"  replay: python -m tests.sim.run --seeds {seed} --steps {options.steps}{more}"
            )
            if len(seeds) == 1:
                traceback.print_exc()
    took_s = time.monotonic() - began
    steps = sum(report.steps for report in reports)
    messages = sum(report.messages for report in reports)
    acked = sum(report.acked for report in reports)
    failed_disks = sum(report.failed_disks for report in reports)
    reopened = sum(report.reopened for report in reports)
    wiped = sum(report.wiped for report in reports)
    changes = sum(report.changes for report in reports)
    digest = reports[-1].digest if reports else "-"
    print(
        f"{len(seeds)} seeds, {len(failed)} failed, {steps * 0.01:.0f} simulated s in"
        f" {took_s:.1f} s ({steps / took_s:.0f} steps/s), {messages} messages, {acked} acked,"
        f" {failed_disks} failed disks, {reopened} logs open again, {wiped} disks lost,"
        f" {changes} changes of members,"
        f" last digest {digest}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
