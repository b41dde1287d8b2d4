"""`mill leave`: allocations move away, the cluster forgets the machine, nothing is left on it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable

from reconciler.api.client import Client
from reconciler.api.connection import NoAnswer, Refused
from reconciler.errors import Conflict, MillError, Unavailable
from reconciler.machine import Place, agent_pid, forget
from reconciler.node_config import NodeConfig
from reconciler.node_removal import client, is_removed

Say = Callable[[str], None]
Confirm = Callable[[str], None]

END_S = 60.0
"""How long an agent may take to see that it was removed, and end."""


async def leave(
    place: Place, config: NodeConfig, timeout: str, force: bool, say: Say, confirm: Confirm
) -> None:
    """Drain, remove, end the agent, clean. `force` leaves out what needs the cluster."""
    if force:
        confirm(f"This forgets {config.name} and all that runs on this machine. If "
                f"{config.cluster} still lives: mill remove {config.name} there.")
    elif is_removed(place.folder):
        say(f"{config.cluster} has removed {config.name} before")
    elif (names := await _names(config)) == {config.name}:
        confirm(f"{config.name} is the last node of {config.cluster}: with it all of its services, "
                "secrets and history are gone.")
    elif config.name in names:
        await _out_of_the_cluster(config, timeout, say)
    await _end_agent(place)
    say("cleaning this machine ...")
    await forget(place, config)


async def _names(config: NodeConfig) -> set[str]:
    """The nodes of the cluster."""
    async with _client(config) as asking:
        try:
            return {node.name for node in (await asking.nodes()).nodes}
        except Unavailable as error:
            raise Unavailable(
                f"the cluster does not answer: {error.what}",
                hint="start this node's agent; where the cluster is gone for good: "
                     "mill leave --force") from error


async def _out_of_the_cluster(config: NodeConfig, timeout: str, say: Say) -> None:
    async with _client(config) as asking:
        try:
            async with contextlib.aclosing(asking.drain(config.name, timeout)) as steps:
                async for step in steps:
                    if step.phase == "moved":
                        say(f"{step.service}: {step.alloc} moved to {step.node}")
                    elif step.phase == "failed":
                        raise Conflict(
                            f"{config.name} is not empty: {step.reason}",
                            hint="make room elsewhere and try again; mill undrain "
                                 f"{config.name} takes it back")
            await asking.remove_node(config.name)
        except (NoAnswer, Refused):
            # Whoever was asked may be this node, which ends once it is removed; or an attempt
            # before this one has removed it since.
            if config.name in await _names(config):
                raise
    say(f"{config.cluster} has removed {config.name}")


def _client(config: NodeConfig) -> Client:
    """Asks this node first, as its root; then those that it knew."""
    found = client(config, own=True)
    assert found is not None
    return found


async def _end_agent(place: Place) -> None:
    """The agent ends by itself once it sees that it was removed; else it is told to."""
    pid = agent_pid(place)
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(END_S):
            while agent_pid(place) is not None:  # noqa: ASYNC110  no event tells of others' processes
                await asyncio.sleep(0.05)
    except TimeoutError as error:
        raise MillError(f"the agent (process {pid}) does not end",
                        hint=f"kill -9 {pid}, then: mill leave --force") from error
