"""The executor's part of a deploy that a command has started, in the order of the real one."""

from __future__ import annotations

import asyncio

from reconciler.fsm import commands as c
from reconciler.fsm.records import Failure
from tests.api.cluster import WAIT_S, Cluster, Node


async def begun(cluster: Cluster, known: int = 0) -> str:
    """The deploy that begins next, after `known` earlier ones."""
    ledger = cluster.nodes[0].ledger
    async with asyncio.timeout(WAIT_S):
        state = ledger.state
        while len(state.deploys) == known:
            state = await ledger.changed(state)
    return max(state.deploys, key=lambda name: int(name[2:]))


async def to_the_end(node: Node, deploy_id: str) -> None:
    """Everything, with the old instances stopped before the end."""
    propose, state = node.ledger.propose, node.ledger.state
    old = [a.id for a in state.allocations.values() if a.deploy != deploy_id and a.live]
    await node.deploys.schedule(deploy_id)
    for alloc in node.ledger.state.of_deploy(deploy_id):
        await propose(c.RecordPull(deploy_id, alloc.image, alloc.node, cached=False))
    await propose(c.FinishPulls(deploy_id))
    for alloc in node.ledger.state.of_deploy(deploy_id):
        await propose(c.SetAllocStatus(alloc=alloc.id, status="starting", was="pending"))
        await propose(c.SetAllocStatus(alloc=alloc.id, status="running", was="starting"))
        await propose(c.SetAllocStatus(alloc=alloc.id, status="healthy", was="running",
                                       elapsed_ms=1200))
        await propose(c.PassService(deploy_id, alloc.service, 1200))
    await propose(c.CommitDeploy(deploy_id))
    await propose(c.RouteDeploy(deploy_id))
    for alloc_id in old:
        if node.ledger.state.allocations[alloc_id].status == "stopping":
            await propose(c.SetAllocStatus(alloc=alloc_id, status="stopped", was="stopping"))
    await propose(c.FinishDeploy(deploy_id))


async def to_a_failure(node: Node, deploy_id: str, failure: Failure) -> None:
    """One allocation falls, and everything new stops."""
    propose = node.ledger.propose
    await node.deploys.schedule(deploy_id)
    await propose(c.RollBackDeploy(deploy_id, failure))
    await stopped(node, deploy_id, "rolled_back")


async def stopped(node: Node, deploy_id: str, outcome: str) -> None:
    """What a deploy that rolls back had started has ended."""
    propose = node.ledger.propose
    for alloc in node.ledger.state.of_deploy(deploy_id):
        await propose(c.SetAllocStatus(alloc=alloc.id, status="stopped", was=alloc.status))
    await propose(c.EndRollback(deploy_id, outcome))  # type: ignore[arg-type]  # a finished one
