"""Before a node goes on alone: whether that is what the cluster's state calls for."""

from __future__ import annotations

import asyncio
from pathlib import Path

from reconciler.errors import Conflict, MillError
from reconciler.log import recover
from reconciler.machine import Place, agent_pid
from reconciler.node_config import NodeConfig
from reconciler.node_removal import client

ANSWER_S = 15.0


def last_held(config: NodeConfig) -> str:
    """Where this node's log ends, in words; raises as `log.recover.held`."""
    held = recover.held(Path(config.data) / "log")
    return f"the log of {config.name} ends at index {held.index} of term {held.term}"


async def refuse_while_it_lives(place: Place, config: NodeConfig) -> None:
    """Conflict where the node's agent runs, or where the others have a leader and a majority:
    a second cluster of the same name would begin beside the first. May take some seconds."""
    if agent_pid(place) is not None:
        raise Conflict(f"an agent runs on {place.folder}",
                       hint="stop it first: systemctl stop mill")
    asking = client(config, own=False)
    if asking is None:
        return
    async with asking:
        try:
            async with asyncio.timeout(ANSWER_S):
                names = ", ".join(node.name for node in (await asking.nodes()).nodes)
        except (MillError, TimeoutError):
            return
    raise Conflict(
        f"{config.cluster} has its majority: it answers as {names}",
        hint="run mill agent; if this node's log is damaged, mill agent --rejoin")
