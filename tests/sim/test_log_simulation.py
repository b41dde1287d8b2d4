"""The log under a seeded clock, network and disk; more seeds: `python -m tests.sim.run`."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pysyncobj.syncobj import _RAFT_STATE

from reconciler.log import pinned
from reconciler.log.core import Peer
from reconciler.log.wire import Vote
from tests.sim import mutants, run
from tests.sim.world import World

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quiet_disks() -> Iterator[None]:
    """Torn tails are announced as warnings, thousands of them here."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", range(20))
def test_nothing_acknowledged_is_lost_and_nobody_diverges(seed: int) -> None:
    report = run.run(seed)
    assert report.acked > 0, f"seed {seed} proved nothing"


@pytest.mark.parametrize("seed", range(10))
def test_disks_that_fill_up_and_fail_for_a_while_cost_nothing_acknowledged(seed: int) -> None:
    report = run.run(seed, bad_disks=True)
    assert report.failed_disks > 0, f"seed {seed} proved nothing"
    assert report.reopened > 0, f"seed {seed} proved nothing"


@pytest.mark.parametrize("seed", range(10))
def test_disks_lost_one_at_a_time_cost_nothing_acknowledged(seed: int) -> None:
    report = run.run(seed, lost_disks=True)
    assert report.acked > 0, f"seed {seed} proved nothing"


@pytest.mark.parametrize("seed", [*range(20), 64])  # 64: a removed leader that was not let in
def test_members_come_and_go_and_nothing_acknowledged_is_lost(seed: int) -> None:
    report = run.run(seed, membership=True)
    assert report.acked > 0, f"seed {seed} proved nothing"


def test_the_seeds_of_changing_members_change_them() -> None:
    assert sum(run.run(seed, membership=True).changes for seed in range(5)) > 10


@pytest.mark.parametrize("kind", ["stale_acks", "rivals", "lost_names", "stale_reads"])
@pytest.mark.parametrize("seed", range(3))
def test_worlds_made_for_rare_mistakes_find_none(kind: str, seed: int) -> None:
    assert run.run(seed, **{kind: True}).acked > 0


def test_a_seed_replays_to_the_same_messages_in_another_process() -> None:
    here = run.run(7).digest
    for hash_seed in ("1", "2"):
        output = subprocess.run(
            [sys.executable, "-m", "tests.sim.run", "--seeds", "7"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f"last digest {here}" in output


@pytest.mark.parametrize(
    "mutant",
    [
        mutants.skip_sync,
        mutants.acknowledge_early,
        mutants.read_without_majority,
        mutants.apply_twice,
        mutants.truncate_without_conflict,
        mutants.commit_on_chunk,
        mutants.commit_unverified,
        mutants.vote_for_the_short,
        mutants.compact_before_snapshot,
        mutants.seal_nothing,
        mutants.retry_sync,
        mutants.trust_the_cache,
        mutants.keep_the_machine,
        mutants.vote_with_an_empty_log,
        mutants.vote_before_caught_up,
        mutants.forget_vote,
        mutants.take_old_ack,
        mutants.trust_the_name,
        mutants.install_older_snapshot,
        mutants.change_again_at_once,
        mutants.count_learners,
        mutants.stand_without_a_vote,
    ],
    ids=lambda mutant: mutant.__name__,
)
def test_a_broken_promise_is_noticed(mutant: object) -> None:
    assert callable(mutant)
    # Seldom seen: the first seed that shows it is 195.
    seeds = range(190, 200) if mutant is mutants.commit_on_chunk else range(150)
    assert mutants.caught_at(mutant, seeds) is not None


def test_a_vote_that_comes_twice_counts_once_whatever_comes_between() -> None:
    world = World(random.Random(0), 5, wild=False, slow_s=0.0)
    try:
        raft = world.nodes["n0"].raft
        assert raft is not None
        raft.follow_term(6)
        raft._SyncObj__raftState = _RAFT_STATE.CANDIDATE
        raft._SyncObj__votesCount = 1  # its own
        for voter, term in (("n1", 6), ("n2", 5), ("n1", 6)):
            raft.receive(Peer(voter), Vote(term))
        assert not raft.is_raft_leader  # two of five
        raft.receive(Peer("n3"), Vote(6))
        assert raft.is_raft_leader
    finally:
        pinned.use_time(time.monotonic, random.Random())
