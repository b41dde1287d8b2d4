"""The whole under a seed; more of them: `python -m tests.sim.whole.run`, or `make soak`."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.sim import soak
from tests.sim.whole import mutants, run
from tests.sim.whole.loop import SimLoop

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _quiet_disks() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", range(1, 9))
def test_every_promise_holds_whatever_befalls_the_machines(seed: int) -> None:
    report = run.run(seed)
    assert report.outcomes.total() > 0, f"seed {seed} proved nothing"
    assert report.troubles.total() > 0, f"seed {seed} proved nothing"


def test_members_change_and_leadership_is_handed_over_in_these_worlds() -> None:
    report = run.run(1)
    assert report.changes > 0
    assert report.handovers > 0
    assert report.moves > 0


def test_a_seed_replays_to_the_same_world_in_another_process() -> None:
    here = run.run(3).digest
    output = subprocess.run(
        [sys.executable, "-m", "tests.sim.whole.run", "--seeds", "3"],
        cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "1"}, capture_output=True, text=True,
        check=True,
    ).stdout
    assert f"last digest {here}" in output


@pytest.mark.parametrize(
    "mutant",
    [
        mutants.commit_without_health,
        mutants.commit_by_halves,
        mutants.route_the_unproven,
        mutants.start_again,
        mutants.report_health_unseen,
        mutants.answer_who_was_cancelled,
        mutants.forget_terms,
        mutants.keep_terms_unsynced,
        mutants.drain_before_it_serves,
    ],
    ids=lambda mutant: mutant.__name__,
)
def test_a_broken_promise_is_noticed(mutant: mutants.Mutant) -> None:
    assert mutants.caught_at(mutant, range(10)) is not None


def test_a_task_that_goes_on_though_cancelled_is_noticed() -> None:
    now_s = 0.0
    loop = SimLoop(lambda: now_s, lambda what: None)

    async def stubborn() -> None:
        while True:
            try:
                await asyncio.sleep(1.0)
            except asyncio.CancelledError:
                if now_s > 100.0:
                    raise

    task = loop.create_task(stubborn())
    loop.pump()
    task.cancel()
    loop.pump()
    assert loop.deaf() == ""
    now_s = 50.0
    loop.pump()
    assert "stubborn" in loop.deaf()
    now_s = 101.0
    loop.end()
    assert task.done()


def test_sleepers_wake_in_the_order_of_their_time() -> None:
    now_s, woken = 0.0, []
    loop = SimLoop(lambda: now_s, lambda what: None)

    async def sleeper(for_s: float) -> None:
        await asyncio.sleep(for_s)
        woken.append(for_s)

    times = [float(n) for n in range(1, 20)]
    random.Random(1).shuffle(times)
    for for_s in times:
        loop.create_task(sleeper(for_s))
    loop.pump()
    now_s = 10.0
    loop.pump()
    assert woken == sorted(t for t in times if t <= 10.0)
    loop.end()


def test_a_soak_goes_on_where_it_stopped_and_tells_the_states_of_the_code_apart(
    tmp_path: Path,
) -> None:
    before = soak.Soak(tmp_path / "seeds.json", "code-1")
    before.add("log", 0, 10, [])
    before.add("log", 10, 20, [13])
    before.add("whole", 0, 10, [])
    now = soak.Soak(tmp_path / "seeds.json", "code-2")
    assert (now.next("log"), now.next("whole"), now.next("log, bad disks")) == (20, 10, 0)
    now.add("log", 20, 30, [])
    assert (now.count(), now.count(present=True), now.count(kind="log")) == (40, 10, 30)
    assert (now.failures(), now.failures(present=True)) == ([("log", 13)], [])
    assert [(r.first, r.end, r.code) for r in now.ranges] == [
        (0, 20, "code-1"), (0, 10, "code-1"), (20, 30, "code-2")]
