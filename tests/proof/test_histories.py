"""Five rounds against real processes: what clients saw while nodes were hurt is linearizable."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proof.history import save
from tests.proof.member import MUTANT, SKIP_READ_INDEX
from tests.proof.rounds import Outcome, Plan, run_alone

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]

ROUNDS = (
    Plan(1, "kill-all", 3),
    Plan(2, "pause-leader", 3, stubborn=True),
    Plan(3, "isolate-leader", 3, stubborn=True),
    Plan(4, "bridge", 3),
    Plan(5, "storm", 3, stubborn=True),
)


def report(outcome: Outcome, folder: Path) -> str:
    path = folder / "history.jsonl"
    save(path, outcome.record.operations)
    return "\n".join([str(outcome), *outcome.broken, *outcome.said,
                      f"check it again: python -m tests.proof.rounds --check {path}"])


@pytest.mark.parametrize("plan", ROUNDS, ids=lambda plan: plan.fault)
async def test_what_clients_saw_has_one_order(plan: Plan, tmp_path: Path) -> None:
    outcome = await run_alone(plan)
    assert not outcome.broken, report(outcome, tmp_path)
    count = outcome.record.outcomes
    assert min(count["write ok"], count["read ok"]) >= 40, report(outcome, tmp_path)
    assert outcome.orders, "agents had something to obey"
    if plan.fault == "pause-leader":
        assert outcome.woken_reads, "the leader that woke answered reads"


async def test_a_leader_that_does_not_ask_before_it_answers_is_caught(tmp_path: Path) -> None:
    told = []
    for seed in range(2, 10):  # real processes: now and then nobody asks the wrong one in time
        outcome = await run_alone(
            Plan(seed, "pause-leader", 3, stubborn=True), {MUTANT: SKIP_READ_INDEX})
        if any("not linearizable" in each for each in outcome.broken):
            return
        told.append(report(outcome, tmp_path))
    pytest.fail("\n".join(told))
