"""The whole of mill under a seed: `python -m tests.sim.whole.run --seeds 0..100`.

A failing seed is printed with the command that replays it. Exit status 1 if any failed.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import structlog

from reconciler.errors import MillError
from reconciler.executor.membership import wanted_voters
from reconciler.fsm.records import ENDED
from reconciler.log import pinned
from tests.sim.invariants import Violation
from tests.sim.whole.machines import Machines
from tests.sim.whole.people import People
from tests.sim.whole.promises import endpoints
from tests.sim.whole.trouble import Trouble
from tests.sim.whole.world import WholeWorld

ROUNDS = 3  # of trouble, then quiet
STEPS = 2_000  # of 10 ms, with trouble, in each round
QUIET_STEPS = 30_000  # at most, until all is as it was last wanted

EXPECTED = frozenset({"stop_failed"})
"""Errors that the world brings about, and that the code logs as such."""


@dataclass(frozen=True)
class Report:
    """What one seed did."""

    seed: int
    digest: str
    nodes: int
    changes: int  # of the log's members
    handovers: int
    moves: int  # of what served, by drains
    steps: int
    index: int
    highest_term: int
    outcomes: Counter[str]
    starts: int
    troubles: Counter[str]
    said: Counter[str]


def run(seed: int, steps: int = STEPS) -> Report:
    """One world from beginning to end; raises Violation, or whatever the code raised."""
    rng = random.Random(seed)
    members = rng.choice((1, 3, 3, 3, 5))
    with _quiet() as loud, _uncollected(), tempfile.TemporaryDirectory(dir=_memory()) as folder:
        wild, slow_s = rng.random() < 0.3, rng.choice((0.0, 0.0, 0.2, 1.0))
        world = WholeWorld(rng, members, Path(folder), wild=wild, slow_s=slow_s)
        loud.append(world)
        try:
            people = People(world, every_s=rng.choice((0.5, 2.0, 5.0)))
            trouble = Trouble(world, every_s=rng.choice((1.0, 3.0, 6.0, 15.0)),
                              revive=rng.choice((0.5, 0.8, 1.0)))
            machines = Machines(world, people, every_s=rng.choice((4.0, 8.0, 20.0)))
            for _ in range(ROUNDS):
                world.network.wild, world.network._slow_s = wild, slow_s
                for _ in range(steps):
                    world.step()
                    people.step()
                    machines.step()
                    trouble.step()
                _settle(world, people)
            people.check()
            return _report(seed, world, people, trouble)
        finally:
            world.end()
            pinned.use_time(time.monotonic, random.Random())


def _settle(world: WholeWorld, people: People) -> None:
    """After the last fault: what is live runs, nothing else does, and all say the same."""
    world.heal()
    steps, calm = 0, 0
    while calm < 200:
        if steps > QUIET_STEPS:
            raise Violation(f"not quiet {QUIET_STEPS / 100:.0f} s after the last fault: "
                            f"{_unrest(world, people)}; {dict(people.said)}")
        world.step()
        people.step(more=False)
        steps += 1
        if steps % 10 == 0:
            calm = 0 if _unrest(world, people) else calm + 10


def _unrest(world: WholeWorld, people: People) -> str:
    """Why it is not quiet yet; "" where it is."""
    state = world.promises.newest
    machines = _restless_machines(world)
    if machines:
        return machines
    if state.active_deploy:
        return f"{state.active_deploy} is {state.deploys[state.active_deploy].outcome}"
    if people.wishes:
        return f"somebody still wants {people.wishes[0].what}"
    for alloc in state.allocations.values():
        if alloc.status not in ENDED and not (alloc.live and alloc.status == "healthy"):
            return f"{alloc.id} on {alloc.node} is {alloc.status}, live {alloc.live}"
    for name in state.services:
        spec = state.live_spec(name)
        held = sorted(a.slot for a in state.of_service(name) if a.live)
        if spec is None or held != list(range(spec.replicas)):
            return f"{name} has slots {held} of {spec.replicas if spec else None}"
    for node in world.present:
        wanted = {a.id for a in state.of_node(node.name)}
        there = {a for a, c_ in node.containers.by_alloc.items() if c_.ended is None}
        if wanted != there or there != set(node.containers.by_alloc):
            return f"{node.name} runs {sorted(there)}, not {sorted(wanted)}"
        if node.process is None or node.process.ledger.state.index != state.index:
            return f"{node.name} is behind"
        routed = {ip for _, ip, _ in endpoints(node.edge)}
        if routed != {a.address for a in state.allocations.values() if a.live and a.port}:
            return f"the edge of {node.name} serves {sorted(routed)}"
    return ""


def _restless_machines(world: WholeWorld) -> str:
    """Who takes part, who votes, and who leads is as the nodes of the state say."""
    state, members = world.promises.newest, world.invariants.members
    here = {node.name for node in world.present}
    if state.nodes.keys() != here or not state.cluster:
        return f"{sorted(here)} are here, {sorted(state.nodes)} are nodes"
    away = [n.name for n in state.nodes.values()
            if n.status != ("draining" if n.draining else "ready")]
    if away:
        return f"{away} are not ready"
    leaving = {n.name for n in state.nodes.values() if n.draining}
    full = [a.id for a in state.allocations.values() if a.node in leaving and a.status not in ENDED]
    if full:
        return f"{full} are on {sorted(leaving)}, which drain"
    everyone, voters = world.founding, world.founding
    if members is not None:
        everyone, voters = members.everyone, members.voters
    if {each.name for each in everyone} != here:
        return f"the log's members are {[each.name for each in everyone]}"
    voting = {each.name for each in voters}
    fit = here - leaving
    if len(voting) != wanted_voters(len(here)) or (voting & leaving and fit - voting):
        return f"{sorted(voting)} vote, {sorted(leaving)} drain"
    leaders = {node.name for node in world.present if node.leads}
    if len(leaders) != 1 or (leaders & leaving and fit):
        return f"{sorted(leaders)} lead, {sorted(leaving)} drain, {sorted(voting)} vote"
    return ""


def _report(seed: int, world: WholeWorld, people: People, trouble: Trouble) -> Report:
    world.digest.update(world.network.digest.digest())
    return Report(
        seed, world.digest.hexdigest()[:16], len(world.present), world.changes,
        world.handovers, world.promises.moves, world.steps,
        world.promises.newest.index, max(node.term for node in world.live),
        world.promises.outcomes, world.promises.starts.total(), trouble.counts, people.said,
    )


def _memory() -> str | None:
    """Where files cost nothing."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """When garbage is found depends on what ran before: in a world, at its end."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


@contextlib.contextmanager
def _quiet() -> Iterator[list[WholeWorld]]:
    """Logs are not read here; but what the code itself calls an error is one of the world."""
    worlds: list[WholeWorld] = []

    def loud(_logger: object, _level: str, event: MutableMapping[str, Any]) -> NoReturn:
        if worlds and event.get("event") not in EXPECTED and not _only_ours(sys.exc_info()[1]):
            why = traceback.format_exc() if sys.exc_info()[0] else ""
            worlds[0].fail(f"it logs {event}\n{why}")
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(
        processors=[loud], wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        cache_logger_on_first_use=False,
    )
    try:
        yield worlds
    finally:
        structlog.configure(**before)


def _only_ours(error: BaseException | None) -> bool:
    """Several proposals of one loop failed together: it begins again, as it does after one."""
    return isinstance(error, ExceptionGroup) and error.split(MillError)[1] is None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0..20", help="A..B, B not included; or one seed")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args(arguments)
    first, _, end = options.seeds.partition("..")
    seeds = range(int(first), int(end) if end else int(first) + 1)
    logging.disable(logging.CRITICAL)
    began, reports, failed = time.monotonic(), [], 0
    for seed in seeds:
        try:
            reports.append(run(seed, options.steps))
        except Exception as error:  # noqa: BLE001  # a failing seed is a result
            failed += 1
            print(f"seed {seed} FAILED: {type(error).__name__}: {error}")
            print(f"  replay: python -m tests.sim.whole.run --seeds {seed} --steps {options.steps}")
            if len(seeds) == 1:
                traceback.print_exc()
        else:
            if options.verbose:
                print(reports[-1], flush=True)
    took_s = time.monotonic() - began
    print(f"{len(seeds)} seeds, {failed} failed, "
          f"{sum(r.steps for r in reports) * 0.01:.0f} simulated s in {took_s:.1f} s, "
          f"{sum(r.index for r in reports)} entries, {sum(r.starts for r in reports)} containers, "
          f"deploys {_total(r.outcomes for r in reports)}, "
          f"member changes {sum(r.changes for r in reports)}, "
          f"handovers {sum(r.handovers for r in reports)}, moves {sum(r.moves for r in reports)}, "
          f"troubles {_total(r.troubles for r in reports)}, "
          f"last digest {reports[-1].digest if reports else '-'}")
    return 1 if failed else 0


def _total(counts: Iterator[Counter[str]]) -> str:
    both = sum(counts, Counter[str]())
    return " ".join(f"{name} {both[name]}" for name in sorted(both))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
