"""What one node is told about itself, in `node.json` of its data folder (0600)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from reconciler.errors import MillError


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A founding member: where it answers, and what it has to give."""

    name: str
    number: int
    host: str
    api_port: int
    log_port: int
    agent_port: int
    cpu_milli: int
    memory_bytes: int


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One node. `tag` marks everything it makes on the host; `run` is its folder for sockets.

    The cluster's id and first token (its SHA-256) are put in the log by whoever leads first.
    """

    name: str
    tag: str
    data: str
    run: str
    peers: tuple[Peer, ...]
    cluster: str
    token_id: str
    token_sha256: str
    containerd: str
    runc_root: str
    namespace: str
    host_netns: str
    dns_port: int
    http_port: int
    https_port: int
    dns_upstreams: tuple[str, ...] = ()

    @property
    def me(self) -> Peer:
        """This node among its peers."""
        return next(peer for peer in self.peers if peer.name == self.name)


def load(path: Path) -> NodeConfig:
    """Read a node's configuration; MillError says what is wrong with it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=NodeConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise MillError(f"the node's configuration cannot be read: {error}", at=str(path),
                        hint="start the node with: mill dev") from error
