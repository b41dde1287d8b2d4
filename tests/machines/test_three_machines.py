"""Three machines form a cluster: the seed's deploy, and what becomes of it when one dies."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.end_to_end.seed import SEED
from tests.machines.cluster import Machines

pytestmark = [pytest.mark.containers, pytest.mark.timeout(400)]
Form = Callable[[int], Machines]


def three(form: Form) -> Machines:
    here = form(3)
    here.init(1)
    here.join(2)
    here.join(3)
    here.until(lambda: here.ready({1, 2, 3}, voters=3))
    return here


def test_the_seed_is_deployed_and_answers_on_each_of_three_machines(form: Form) -> None:
    here = three(form)
    here.mill(2, "secret", "set", "db.url", "postgres://db")
    done = here.deploy(3, SEED)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = [line.split(" on ")[0].split(" (")[0].strip() for line in done.stdout.splitlines()]
    assert kinds[0] == "pulling images..."
    assert sorted(kinds[1:4]) == ["api: scheduled", "web: scheduled", "web: scheduled"]
    assert kinds[-1] == "deployed"
    allocs = here.allocations()
    assert len({a["node"] for a in allocs.values() if a["service"] == "web"}) == 2
    for number in (1, 2, 3):
        assert len(here.answering(number)) == 2
    _names_resolve_and_answer_on_every_node(here)


def _names_resolve_and_answer_on_every_node(here: Machines) -> None:
    vips = set()
    for alloc, row in here.allocations().items():
        number = int(row["node"].removeprefix("node-"))
        vip = here.inside(number, alloc, ["dig", "+short", f"@10.77.{number}.1", "web.mill"])
        vips.add(vip)
        seen = {
            here.inside(number, alloc, ["curl", "-s", "-m", "10", f"http://{vip}:3000/"])
            for _ in range(20)
        }
        assert len({w for body in seen for w in body.split() if w.startswith("alloc=")}) == 2
    assert len(vips) == 1


def test_a_killed_agent_leaves_its_containers_and_a_new_one_takes_them_up(form: Form) -> None:
    here = three(form)
    text = SEED.replace("${secret(db.url)}", "x")
    assert here.deploy(1, text).returncode == 0
    before = here.allocations()
    leader = here.leader()
    other = leader % 3 + 1
    here.kill(leader)
    assert len(here.answering(leader)) == 2
    here.until(lambda: here.leader(other) not in (0, leader))
    here.agent(leader)
    here.until(lambda: here.ready({1, 2, 3}, voters=3, asked=other))
    assert here.allocations(other).keys() == before.keys()
    assert all(a["restarts"] == 0 for a in here.allocations(other).values())


def test_a_machine_that_is_cut_off_loses_its_allocations_to_the_others(form: Form) -> None:
    here = three(form)
    assert here.deploy(1, SEED.replace("${secret(db.url)}", "x")).returncode == 0
    victim = here.leader()
    asked = victim % 3 + 1
    here.lab.isolate(victim)
    here.until(lambda: here.leader(asked) not in (0, victim))
    here.until(
        lambda: all(
            row["node"] != f"node-{victim}" and row["status"] == "healthy"
            for row in here.allocations(asked).values()
            if row["status"] not in ("lost", "stopped")
        )
    )
    assert len(here.answering(asked)) == 2
    refused = here.call(victim, "secret", "set", "lost", "x")
    assert refused.returncode == 3  # no leader: nothing is written on the wrong side
    term = here.json(asked, "status")["term"]
    here.lab.heal()
    here.until(lambda: here.ready({1, 2, 3}, voters=3, asked=asked))
    assert here.json(asked, "status")["term"] == term  # it came back, and deposed nobody


def test_a_stopped_agent_hands_leadership_over(form: Form) -> None:
    here = three(form)
    leader = here.leader()
    other = leader % 3 + 1
    here.signal(leader, signal.SIGTERM)
    assert here.agents.pop(leader).wait(60) == 0
    here.until(lambda: here.leader(other) not in (0, leader))
