"""What outlives a node's process, found again and ended: companions, containers, processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

from reconciler.edge.dns_feed import DnsProcess
from reconciler.edge.envoy import EnvoyProcess
from reconciler.executor.agent.logs import LogStore
from reconciler.executor.containerd import containers, network
from reconciler.executor.containerd.client import Containerd
from reconciler.executor.containerd.daemon import running_daemon
from reconciler.node_config import NodeConfig


async def end_companions(config: NodeConfig) -> None:
    """Envoy, DNS and the log process of a node."""
    await EnvoyProcess(Path(config.run) / "envoy").stop()
    await DnsProcess(Path(config.run) / "dns", ()).stop()
    await LogStore(Path(config.data) / "logs").stop()


async def end_containers(config: NodeConfig, daemon: Path) -> None:
    """The containers of a node and their network, where the containerd of `daemon` runs."""
    if running_daemon(daemon) is None:
        return
    client = Containerd(Path(config.containerd), config.namespace, runc_root=Path(config.runc_root))
    async with client:
        await client.ensure_namespace()
        states = await containers.list_all(client)
        await asyncio.gather(*(containers.remove(client, state.id) for state in states))
    for alloc in await network.list_containers(config.layout):
        await network.remove_container(config.layout, alloc)


def processes_with(config: str) -> list[int]:
    """Node processes that were started with this configuration."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if b"reconciler.node" in words and config.encode() in words:
                    found.append(int(entry.name))
    return found


async def end_processes(config: str, number: signal.Signals) -> None:
    """Signal the node processes with this configuration, and wait until there are none."""
    for pid in processes_with(config):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    while processes_with(config):  # noqa: ASYNC110  no event tells of others' children
        await asyncio.sleep(0.02)
