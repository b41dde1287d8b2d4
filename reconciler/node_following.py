"""What a node follows in the state besides its edge: its peers' networks, its own removal."""

from __future__ import annotations

import asyncio

import structlog

from reconciler.errors import MillError
from reconciler.executor.containerd import network
from reconciler.executor.containerd.network import Layout
from reconciler.executor.ledger import Ledger
from reconciler.fsm.state import State

log = structlog.get_logger("mill.node")

AGAIN_S = 2.0
LOOK_S = 30.0
"""What others took away, such as the rules of a firewall that was flushed, is put back so often."""


class Removed(MillError):
    """This node was taken out of its cluster."""

    status = 409


async def follow_peers(ledger: Ledger, layout: Layout) -> None:
    """Keep this node's routes those of the nodes in the state; until cancelled."""
    state = ledger.state
    while True:
        nodes = state.nodes
        again = False
        if nodes:
            peers = {n.number: n.agent.rpartition(":")[0] for n in nodes.values()}
            try:
                await network.ensure_peers(layout, peers)
            except (MillError, ValueError) as error:
                log.warning("peers_not_reached", reason=str(error))
                again = True
        try:
            async with asyncio.timeout(AGAIN_S if again else LOOK_S):
                state = await ledger.until(lambda s, nodes=nodes: s.nodes is not nodes)  # type: ignore[misc]  # mypy does not infer a lambda's default
        except TimeoutError:
            state = ledger.state


async def until_removed(ledger: Ledger, name: str) -> None:
    """Return once the state had this node, and has it no more."""
    await ledger.until(lambda state: name in state.nodes)
    await ledger.until(lambda state: _without(state, name))


def _without(state: State, name: str) -> bool:
    return bool(state.nodes) and name not in state.nodes
