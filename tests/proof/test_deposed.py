"""Leaders that are leaders no more, and nodes that come back, change nothing."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.machines.lab import Lab
from tests.proof.clients import Crowd, Record
from tests.proof.cluster import Members, ask, leader_among, quiet, until
from tests.proof.member import MUTANT, NO_PRE_VOTE
from tests.proof.nemesis import Arena, Pause, split
from tests.proof.rounds import deploy, judge_orders

pytestmark = [pytest.mark.containers, pytest.mark.timeout(600)]

RETURNS = 3  # a busy machine may stall a leader by itself, but hardly at each of them


@pytest.fixture
async def cluster(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Members]:
    async with Lab(3) as lab:
        members = Members(lab, tmp_path, getattr(request, "param", {}))
        members.found()
        await quiet(members)
        yield members


@pytest.mark.parametrize("moment", ["decided", "told"])
async def test_a_leader_that_slept_through_its_deposition_makes_no_agent_obey(
    cluster: Members, moment: str,
) -> None:
    """It is stopped with a start order in its hands, at the worst moments: see `member.Stops`."""
    leader = await quiet(cluster)
    cluster.stop_file(leader.node).write_text(moment)
    deployed = await deploy(cluster)

    async def held() -> bool | None:
        return True if cluster.is_paused(leader.node) else None

    async def another_orders() -> bool | None:
        ordered = any(d.what == "start" and d.term > leader.term for d in cluster.deeds())
        return True if ordered else None

    async def ended() -> str | None:
        answer = await ask(cluster, leader.node, "GET", f"/v1/deploys/{deployed}")
        outcome = str(answer.body.get("outcome", "")) if answer else ""
        return outcome if outcome not in ("", "running", "rolling_back") else None

    await until(held, "the leader stops itself with an order in its hands")
    others = [name for name in cluster.names if name != leader.node]
    await leader_among(cluster, others, above=leader.term)
    await until(another_orders, "the new leader orders")
    woken = time.monotonic()
    cluster.wake(leader.node)
    assert await until(ended, "the deploy ends") == "deployed"
    deeds = cluster.deeds()
    assert any(d.what == "held" and d.term == leader.term for d in deeds)
    assert {d.node for d in deeds if d.what == "start" and d.term > leader.term} == set(
        cluster.names), "every agent started what the new leader ordered"
    assert not judge_orders(deeds, [Pause(leader.node, leader.term, woken)]), cluster.logs()


async def _returns(cluster: Members, times: int) -> list[bool]:
    """Whether a node that was split off deposed the leader when it came back, each time."""
    record = Record()
    crowd = Crowd({name: cluster.address(name) for name in cluster.names}, ("k",), record, 1)
    arena = Arena(cluster, crowd, record, random.Random(1))
    clients = asyncio.create_task(crowd.run())
    try:
        while len(arena.deposed_by_return) < times and False not in arena.deposed_by_return:
            await split(arena)
    finally:
        clients.cancel()
        await asyncio.gather(clients, return_exceptions=True)
    assert not arena.broken, "while cut off it refused reads and marked stale ones"
    return arena.deposed_by_return


async def test_a_node_that_comes_back_from_a_partition_deposes_nobody(cluster: Members) -> None:
    assert False in await _returns(cluster, RETURNS)


@pytest.mark.parametrize("cluster", [{MUTANT: NO_PRE_VOTE}], indirect=True)
async def test_without_pre_vote_it_would(cluster: Members) -> None:
    assert await _returns(cluster, 1) == [True]
