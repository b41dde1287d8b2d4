"""A deploy is whole or undone, whoever leads, and tells every step once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from reconciler.fsm import commands as c
from reconciler.fsm.records import Failure
from tests.executor.world import service, world


async def test_a_first_deploy_tells_every_step_and_ends_deployed(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        deploy = await w.deploy(service("web", replicas=2), service("api"))
        ended = await w.ended(deploy)
        assert ended.outcome == "deployed"
        phases = w.phases(deploy)
        assert phases[:2] == ["started", "pulling"]
        assert phases[2:5] == ["scheduled"] * 3
        assert phases[-2:] == ["routed", "done"]
        assert phases.count("healthy") == 3 + 2
        assert len(w.containers()) == 3


async def test_no_two_events_of_a_stream_share_an_id(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        deploy = await w.deploy(service("web", replicas=3))
        await w.ended(deploy)
        ids = [event.index for event in w.ledger.state.deploy_events[deploy]]
        assert ids == sorted(set(ids))


@pytest.mark.parametrize(("tag", "reason"), [
    ("exits", "exited with code 3"), ("oom", "out of memory"), ("sick", "not healthy within"),
    ("denied", "cannot pull"),
])
async def test_a_failing_service_rolls_back_all_services_of_the_deploy(
    tmp_path: Path, tag: str, reason: str
) -> None:
    async with world(tmp_path) as w:
        await w.ended(await w.deploy(service("web", replicas=2), service("api")))
        before = w.containers()
        state = w.ledger.state
        deploy = await w.deploy(service("web", replicas=2, user="7"), service("api", tag))
        ended = await w.ended(deploy)
        assert ended.outcome == "rolled_back"
        assert ended.failure is not None
        assert reason in ended.failure.reason
        assert w.containers() == before
        assert w.ledger.state.services == state.services
        assert "stopped" not in w.phases(deploy)


async def test_an_update_retires_the_old_allocations_after_the_commit(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.ended(await w.deploy(service("web", replicas=2)))
        old = set(w.containers())
        deploy = await w.deploy(service("web", replicas=2, user="7"))
        assert (await w.ended(deploy)).outcome == "deployed"
        assert not old & set(w.containers())
        phases = w.phases(deploy)
        assert phases.index("routed") < phases.index("stopped")
        assert phases.count("stopped") == 2


async def test_a_removed_service_is_gone_with_its_containers(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.ended(await w.deploy(service("web"), service("api")))
        assert (await w.ended(await w.deploy(remove=("api",)))).outcome == "deployed"
        assert set(w.ledger.state.services) == {"web"}
        assert len(w.containers()) == 1


async def test_services_start_after_those_they_depend_on_are_healthy(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        deploy = await w.deploy(service("web", depends_on=("api",)), service("api"))
        await w.ended(deploy)
        wires = [event.wire() for event in w.ledger.state.deploy_events[deploy]]
        starts = [e for e in wires if e.get("phase") == "starting"]
        passed = wires.index(next(e for e in wires if e.get("phase") == "healthy"
                                  and e["service"] == "api" and "alloc" not in e))
        assert [e["service"] for e in starts] == ["api", "web"]
        assert passed < wires.index(starts[1])


async def test_a_cancel_before_the_commit_ends_cancelled(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        deploy = await w.deploy(service("web", "sick"))
        async with asyncio.timeout(30):
            await w.ledger.until(lambda s: any(
                a.status == "running" for a in s.allocations.values()))
        await w.ledger.propose(c.RollBackDeploy(deploy, Failure(reason="cancelled",
                                                                cancelled=True)))
        assert (await w.ended(deploy)).outcome == "cancelled"
        assert w.containers() == {}
        assert w.ledger.state.services == {}


async def test_a_node_fault_is_tried_once_on_another_node(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        deploy = await w.deploy(service("web", "nodefault"))
        ended = await w.ended(deploy)
        assert ended.outcome == "rolled_back"
        tried = [a.node for a in w.ledger.state.of_deploy(deploy)]
        assert len(tried) == 2
        assert len(set(tried)) == 2


async def test_an_exit_in_life_is_restarted_and_counted(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.ended(await w.deploy(service("web")))
        (alloc, node), = w.containers().items()
        w.nodes[node].runtime.kill(alloc)
        async with asyncio.timeout(60):
            state = await w.ledger.until(lambda s: s.allocations[alloc].restarts == 1
                                         and s.allocations[alloc].status == "healthy")
        assert "signal 9" in next(
            str(e.wire()) for e in state.events_after(0) if "restarting" in str(e.wire()))


async def test_an_agent_that_comes_back_restarts_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.ended(await w.deploy(service("web", replicas=3)))
        node = w.nodes["node-2"]
        started = list(node.runtime.started)
        await node.down()
        await node.up()
        async with asyncio.timeout(60):
            assert w.links is not None
            await w.links.until(lambda: w.links is not None and w.links["node-2"].connected)
        deploy = await w.deploy(service("api", replicas=3))
        assert (await w.ended(deploy)).outcome == "deployed"
        assert [a for a in node.runtime.started if a.startswith("web")] == started
