"""A node that was taken out of its cluster finds out, also where it was off at the time.

Nobody speaks to a removed node's log or agent, so one that comes back would wait for ever for a
leader. It asks the nodes that it knew instead, and only an answer that a majority stands behind
makes it believe.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from reconciler.api.client import Client
from reconciler.api.local_token import local_token
from reconciler.edge.certificates import write_private
from reconciler.errors import MillError
from reconciler.executor.ledger import Ledger
from reconciler.node_config import NodeConfig
from reconciler.node_following import until_removed

log = structlog.get_logger("mill.node")

ALONE_S = 5.0
"""So often a node without a leader, or that its own state does not know, asks who it is."""
ANYHOW_S = 30.0
"""So often every node asks: who takes no part in elections may not notice that it hears nobody."""
ANSWER_S = 20.0
KNOWN = "nodes.json"
REMOVED = "removed"


def other_apis(config: NodeConfig) -> tuple[str, ...]:
    """Where the other nodes answered when this one last heard of them; the nearest we have."""
    try:
        known = msgspec.json.decode((Path(config.data) / KNOWN).read_bytes(), type=tuple[str, ...])
    except (OSError, msgspec.DecodeError):
        # A node that never heard of others joined by these; every machine has the same ports.
        known = tuple(f"{member.host}:{config.me.api_port}" for member in config.members)
    return tuple(f"https://{api}" for api in known)


def client(config: NodeConfig, *, own: bool) -> Client | None:
    """Asks the cluster as this node's root: this node first where `own`; None for nobody to ask."""
    folder = Path(config.data)
    addresses = ((f"https://{config.me.api}",) if own else ()) + other_apis(config)
    if not addresses:
        return None
    return Client(addresses, local_token((folder / "cluster.key").read_bytes()),
                  ca=(folder / "identity" / "ca.pem").read_bytes())


def is_removed(folder: Path) -> bool:
    """Whether the node of this data folder has learnt that it was removed."""
    return (folder / REMOVED).exists()


async def keep_known(ledger: Ledger, config: NodeConfig) -> None:
    """Write down where the other nodes answer, at each change; until cancelled."""
    path = Path(config.data) / KNOWN
    state = ledger.state
    while True:
        nodes = state.nodes
        apis = tuple(sorted(n.api for n in nodes.values() if n.name != config.name))
        if config.name in nodes and apis != _written(path):
            try:
                await asyncio.to_thread(write_private, path, msgspec.json.encode(apis))
            except OSError as error:  # a full disk: the log says so too
                log.warning("nodes_not_kept", reason=str(error))
        state = await ledger.until(lambda s, nodes=nodes: s.nodes is not nodes)  # type: ignore[misc]  # mypy does not infer a lambda's default


async def until_out(
    ledger: Ledger, config: NodeConfig, leader: Callable[[], str | None]
) -> None:
    """Return once this node is out of its cluster: its own state says so, or the others do."""
    if config.overlay != "vxlan":
        await until_removed(ledger, config.name)
        return
    tasks = [asyncio.ensure_future(until_removed(ledger, config.name)),
             asyncio.ensure_future(_until_disowned(ledger, config, leader))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    write_private(Path(config.data) / REMOVED, b"")


async def _until_disowned(
    ledger: Ledger, config: NodeConfig, leader: Callable[[], str | None]
) -> None:
    """A node that was told of its own removal in one go with all before never saw itself in."""
    quiet_s = 0.0
    while True:
        await asyncio.sleep(ALONE_S)
        quiet_s += ALONE_S
        known = leader() is not None and config.name in ledger.state.nodes
        if known and quiet_s < ANYHOW_S:
            continue
        quiet_s = 0.0
        if await _disowned(config):
            return


async def _disowned(config: NodeConfig) -> bool:
    asking = client(config, own=False)
    if asking is None:
        return False
    async with asking:
        try:
            async with asyncio.timeout(ANSWER_S):
                rows = (await asking.nodes()).nodes
        except (MillError, TimeoutError):
            return False
    # One of that name at another address has taken its place.
    return bool(rows) and not any(
        row.name == config.name and row.address == config.me.api for row in rows)


def _written(path: Path) -> tuple[str, ...] | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=tuple[str, ...])
    except (OSError, msgspec.DecodeError):
        return None
