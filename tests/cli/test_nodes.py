"""`mill drain`, `undrain`, `remove`, as a person and a program call them."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from reconciler.api.client import Step
from reconciler.cli.nodes import drain_lines
from reconciler.fsm import commands as c
from tests.api.cluster import WAIT_S, Cluster, deployed
from tests.api.test_nodes import moved
from tests.cli.conftest import Mill


@pytest.fixture
def both(offline: Mill, pair: Cluster) -> Mill:
    """With a cluster of two nodes."""
    offline.address = ",".join(node.url for node in pair.nodes)
    return offline


async def emptied(cluster: Cluster, name: str) -> None:
    """The executor's part, once the drain is in the log."""
    async with asyncio.timeout(WAIT_S):
        state = await cluster.nodes[0].ledger.until(lambda s: s.nodes[name].draining)
    for alloc in list(state.of_node(name)):
        await moved(cluster, alloc.id, "node-2" if name == "node-1" else "node-1")
    cluster.log.leader = "node-2" if name == "node-1" else "node-1"


async def test_drained_node_is_told_like_a_deploy(both: Mill, pair: Cluster) -> None:
    await deployed(pair)
    result, _ = await asyncio.gather(both.beside("drain", "node-1"), emptied(pair, "node-1"))
    assert (result.code, result.err) == (0, "")
    assert result.lines[0] == "  draining node-1 (1 allocation)..."
    assert re.fullmatch(r"  drained \(\d+\.\ds\)", result.lines[-1])
    assert "  web: moved to node-2" in result.lines
    rows = (await both.beside("nodes")).lines
    assert "draining" in rows[1]
    assert (await both.beside("remove", "node-1")).out == "  node-1: removed\n"
    assert [row.split()[0] for row in (await both.beside("nodes")).lines[1:]] == ["node-2"]


async def test_json_is_one_object_a_line(both: Mill, pair: Cluster) -> None:
    await deployed(pair)
    result, _ = await asyncio.gather(
        both.beside("drain", "node-1", "--json"), emptied(pair, "node-1"))
    told = [json.loads(line) for line in result.lines]
    assert told[0] == {"event": "progress", "phase": "draining", "node": "node-1", "left": 1}
    assert told[-1]["event"] == "done"
    assert told[-1]["success"] is True
    assert {"event", "success", "elapsed"} <= set(told[-1]) <= {"event", "success", "elapsed",
                                                               "left", "node"}


async def test_drain_out_of_time_is_exit_code_1_and_says_why(both: Mill, pair: Cluster) -> None:
    await deployed(pair)

    async def late() -> None:
        async with asyncio.timeout(WAIT_S):
            await pair.nodes[0].ledger.until(lambda s: s.nodes["node-1"].draining)
        while not done.is_set():  # the stream's own clock begins a moment after
            pair.clock.advance(600)
            await asyncio.sleep(0.01)

    done = asyncio.Event()
    waiting = asyncio.create_task(late())
    try:
        result = await both.beside("drain", "node-1", "--timeout", "1m", "-q")
    finally:
        done.set()
        await waiting
    assert (result.code, result.err) == (1, "")
    (line,) = result.lines
    assert re.match(r"  not drained \(\d+\.\ds\): \S", line)
    back = await both.beside("undrain", "node-1")
    assert (back.code, back.out) == (0, "  node-1: takes allocations again\n")
    assert json.loads((await both.beside("nodes", "--json")).out)["nodes"][0]["status"] == "ready"


async def test_refusals_have_their_exit_codes(both: Mill, pair: Cluster) -> None:
    await deployed(pair)
    for code, arguments, said in (
        (6, ("remove", "node-1"), "still has web-"), (6, ("undrain", "node-1"), "not draining"),
        (5, ("drain", "node-9"), "no node node-9"), (5, ("remove", "node-9"), "no node node-9"),
        (2, ("drain", "node-1", "--timeout", "long"), "timeout cannot be"),
    ):
        result = await both.beside(*arguments)
        assert (result.code, result.out) == (code, "")
        assert said in result.err
        if code == 6:
            assert "error: " in result.err
    await pair.nodes[0].ledger.propose(c.DrainNode("node-2"))
    answer = await both.beside("undrain", "node-2", "--json")
    assert json.loads(answer.out)["name"] == "node-2"


@pytest.mark.parametrize(("step", "line"), [
    (Step(phase="draining", node="n", left=0), "  draining n (0 allocations)..."),
    (Step(phase="leader", node="m"), "  leadership moved to m"),
    (Step(phase="moving", service="web", alloc="web-a", node="m"), "  web: moving to m"),
    (Step(phase="moved", service="web", alloc="web-a", node="m"), "  web: moved to m"),
    (Step(phase="moved", service="web", alloc="web-a"), "  web: moved"),
    (Step(phase="warning", reason="no\x1broom"), "  warning: no?room"),
    (Step(phase="done", elapsed=4.84), "  drained (4.8s)"),
    (Step(phase="failed", elapsed=600.0, reason="late"), "  not drained (600.0s): late"),
])
def test_each_step_has_its_line(step: Step, line: str) -> None:
    (told,) = drain_lines(step)
    assert re.fullmatch(re.escape(line).replace(r"\?", ".+").replace("?", ".+"), told)
    assert "\x1b" not in told


def test_step_of_a_newer_version_is_passed_over() -> None:
    assert drain_lines(Step(phase="dancing")) == []
