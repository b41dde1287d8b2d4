"""SIGKILL at many points of what forms a cluster and what takes it apart: done again, it is whole,
and nothing was spent, doubled or left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from tests.machines.cluster import Machines
from tests.machines.test_by_hand import PLAIN

pytestmark = [pytest.mark.containers, pytest.mark.timeout(400)]
Form = Callable[[int], Machines]
STARTED_S = 0.15
"""What Python takes to come to the point at all."""


def killed_until_done(here: Machines, number: int, step_s: float, *words: str) -> int:
    """`mill WORDS`, killed that much later each time, until it comes to its end; how many kills.

    One that says that this machine is a node, or is none, found that the one before was through.
    """
    log = here.folder / f"killed-{number}.log"
    for kills in count():
        process = here.lab.spawn(number, [*here.env(number), *here.argv(*words)], log)
        try:
            code = process.wait(STARTED_S + kills * step_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)
            continue
        last = log.read_text()
        assert code == 0 or (kills and any(
            why in last for why in ("already\n", "is no node yet"))), last
        return kills
    raise AssertionError


def test_join_agent_and_leave_are_killed_again_and_again(form: Form) -> None:
    here = form(2)
    here.init(1)
    token = here.json(1, "token", "create", "--join", "--uses", "1")
    here.made.add(2)
    data = ("--data", str(here.data(2)))
    assert killed_until_done(
        here, 2, 0.02, "join", here.lab.machine(1).address, "--token", token["token"], *data,
        "--name", "node-2") > 1
    assert here.call(2, "status").returncode == 0  # the context is there
    rows = {row["id"]: row for row in here.json(1, "token", "list")["tokens"]}
    assert (rows[token["id"]]["used"], rows[token["id"]]["uses"]) == (1, 1)
    assert here.place(2).config().me.number == 2
    assert set(here.nodes(1)) == {"node-1", "node-2"}
    _agent_is_killed_while_it_starts(here, 2)
    here.until(lambda: here.ready({1, 2}, voters=1))
    assert here.deploy(2, PLAIN).returncode == 0
    assert len(here.answering(2)) == 2
    tag = here.place(2).tag
    assert killed_until_done(here, 2, 0.3, "leave", *data) > 1
    here.agents.pop(2).wait(60)
    here.until(lambda: here.ready({1}, voters=1))
    assert not here.data(2).exists()
    assert not Path(f"/run/mill-{tag}").exists()
    assert not list(Path("/run/netns").glob(f"mill-{tag}-*"))
    assert here.processes(2) == []
    here.until(lambda: {a["node"] for a in here.allocations(1).values()
                        if a["status"] == "healthy"} == {"node-1"})


def _agent_is_killed_while_it_starts(here: Machines, number: int) -> None:
    for kill in range(12):
        here.agent(number)
        time.sleep(STARTED_S + kill * 0.12)  # the point of the kill, not a wait for a fact
        process = here.agents.pop(number)
        assert process.poll() is None, here.said(number)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    here.agent(number)


def test_every_agent_dies_while_one_becomes_three(form: Form) -> None:
    """Each step of the membership is cut short by SIGKILL of whoever takes it, and goes on."""
    here = form(3)
    here.init(1)
    token = here.json(1, "token", "create", "--join", "--uses", "2")["token"]
    here.join(2, token=token)
    here.join(3, token=token)
    for pause_s in (0.6, 0.9, 1.2, 1.6):
        time.sleep(pause_s)  # the point of the kill
        for number in (1, 2, 3):
            if here.agents[number].poll() is None:
                here.agents[number].send_signal(signal.SIGKILL)
            here.agents.pop(number).wait(30)
            here.agent(number)
    here.until(lambda: here.ready({1, 2, 3}, voters=3))
    assert here.deploy(3, PLAIN).returncode == 0
    assert sorted(here.nodes(3)) == ["node-1", "node-2", "node-3"]
