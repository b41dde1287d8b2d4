"""The log's members follow the state's nodes: real logs over TLS, with whoever leads dying."""

from __future__ import annotations

import asyncio
from pathlib import Path

from reconciler.executor.drains import Nodes
from reconciler.fsm import commands as c
from tests.executor.log_world import log_world

NAMES = [f"node-{n}" for n in range(1, 7)]


async def test_a_cluster_grows_from_one_to_five_voters_and_the_sixth_follows(
    tmp_path: Path
) -> None:
    async with log_world(tmp_path, 6) as w:
        for number in (2, 3, 4, 5, 6):
            await w.start(f"node-{number}")
            await w.register(number)
            voters = 1 if number < 3 else 3 if number < 5 else 5
            await w.until_members(NAMES[:voters], NAMES[voters:number])
        await w.until_members(NAMES[:5], NAMES[5:])
        await w.propose(c.SetSecret("s", b"0" * 12, b"x"))
        await w.until(lambda: all("s" in n.ledger.state.secrets for n in w.nodes.values()),
                      "the learner follows")
        assert not w.nodes["node-6"].replica.membership.votes("node-6")


async def test_leaders_that_die_while_it_grows_and_shrinks_are_followed_by_ones_that_go_on(
    tmp_path: Path
) -> None:
    async with log_world(tmp_path, 5, founders=3) as w:
        for number in (4, 5):
            await w.start(f"node-{number}")
        growing = asyncio.create_task(_register_all(w))
        for _ in range(3):
            leader = (await w.leader()).replica.leader or ""
            await w.stop(leader)
            await w.leader()
            await w.start(leader)
        await growing
        await w.until_members(NAMES[:5], [])
        leader = await w.leader()
        name = leader.replica.leader or ""
        await Nodes(leader.ledger, leader.members.out).remove(name)
        gone = w.nodes.pop(name)
        try:
            await w.until(lambda: len(w.voters()) == 3 and len(w.learners()) == 1, "3 voters")
            assert name not in {*w.voters(), *w.learners()}
        finally:
            await gone.down()


async def _register_all(w: object) -> None:
    for number in (4, 5):
        await w.register(number)  # type: ignore[attr-defined]  # a LogWorld


async def test_a_founding_that_stops_in_the_middle_costs_no_voter(tmp_path: Path) -> None:
    """Its nodes come into the state one after the other; who is not there yet is not gone."""
    async with log_world(tmp_path, 3, founders=3) as w:
        await w.until_members(NAMES[:3], [])
        assert all(n.replica.membership.index == 0 for n in w.nodes.values())


async def test_a_draining_voter_is_exchanged_for_a_node_that_follows(tmp_path: Path) -> None:
    async with log_world(tmp_path, 4, founders=3) as w:
        await w.start("node-4")
        await w.register(4)
        await w.until_members(NAMES[:3], ["node-4"])
        leader = (await w.leader()).replica.leader or ""
        await w.propose(c.DrainNode(leader))
        others = sorted({*NAMES[:4]} - {leader})
        await w.until_members(others, [leader])
        assert (await w.leader()).replica.leader in others


async def test_a_node_that_is_removed_is_out_of_the_log(tmp_path: Path) -> None:
    async with log_world(tmp_path, 3, founders=3) as w:
        leader = await w.leader()
        name = next(n for n in NAMES[:3] if n != leader.replica.leader)
        removed = w.nodes.pop(name)
        try:
            await Nodes(leader.ledger, leader.members.out).remove(name)
            assert leader.replica.membership.get(name) is None
            await w.until(lambda: len(w.voters()) == 1, "one voter of two nodes")
        finally:
            await removed.down()
