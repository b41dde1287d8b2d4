"""The leader's own look at an allocation that its node calls healthy.

The leader's word counts, but silence is no verdict: one that cannot reach the node believes the
node. Commands and `running` can be judged on the node alone.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import assert_never

from reconciler.executor.agent.probe import MakeSocket, Target, look
from reconciler.executor.containerd.network_namespace import socket_in
from reconciler.executor.starting import probe_of
from reconciler.fsm.records import Allocation
from reconciler.language.spec import ServiceSpec

Confirm = Callable[[Allocation, ServiceSpec], Awaitable[str]]
"""Why the leader does not see the allocation serve; "" where it does, or cannot tell."""

REACH_S = 2.0
"""An allocation that cannot be connected to for so long is out of reach, not unhealthy."""


async def believe(_alloc: Allocation, _spec: ServiceSpec) -> str:
    """Take the node's word."""
    return ""


def confirm_from(netns_path: str) -> Confirm:
    """Probes that leave from this network namespace, which routes to all nodes' allocations."""

    async def make_socket() -> socket.socket:
        made = await asyncio.to_thread(socket_in, netns_path, socket.AF_INET, socket.SOCK_STREAM)
        made.setblocking(False)
        return made

    async def confirm(alloc: Allocation, spec: ServiceSpec) -> str:
        match spec.health.kind:
            case "command" | "running":
                return ""
            case "http" | "tcp":
                return await _look(alloc, spec, make_socket)
            case _:
                assert_never(spec.health.kind)

    return confirm


async def _look(alloc: Allocation, spec: ServiceSpec, make_socket: MakeSocket) -> str:
    if not await _reachable(alloc, make_socket):
        return ""
    verdict = await look(probe_of(spec), Target(alloc.address, alloc.port, make_socket, _never))
    return "" if verdict.passed else verdict.detail


async def _reachable(alloc: Allocation, make_socket: MakeSocket) -> bool:
    try:
        with await make_socket() as sock:
            async with asyncio.timeout(REACH_S):
                loop = asyncio.get_running_loop()
                await loop.sock_connect(sock, (alloc.address, alloc.port))
    except ConnectionRefusedError:
        return True  # its host answers: what refuses is the allocation
    except (TimeoutError, OSError):
        return False
    return True


async def _never(_argv: tuple[str, ...], _timeout_s: float) -> int:
    raise AssertionError("commands run on the node")
