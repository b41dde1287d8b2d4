"""What one node is told about itself, in `node.json` of its data folder (0600)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from reconciler.errors import MillError
from reconciler.executor.containerd.network import Layout
from reconciler.fsm.records import Node


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

    @property
    def api(self) -> str:
        """Where its API answers, host:port."""
        return f"{self.host}:{self.api_port}"

    @property
    def agent(self) -> str:
        """Where its agent answers, host:port."""
        return f"{self.host}:{self.agent_port}"

    def is_as(self, node: Node | None) -> bool:
        """The log has this member as it is configured."""
        return node is not None and (
            (node.api, node.agent) == (self.api, self.agent)
            and (node.cpu_milli, node.memory_bytes) == (self.cpu_milli, self.memory_bytes)
        )


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

    @property
    def layout(self) -> Layout:
        """The names and addresses of its network."""
        others = tuple(peer.number for peer in self.peers if peer.name != self.name)
        return Layout(self.tag, self.name, self.me.number, others)


def load(path: Path) -> NodeConfig:
    """Read a node's configuration; MillError says what is wrong with it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=NodeConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise MillError(f"the node's configuration cannot be read: {error}", at=str(path),
                        hint="start the node with: mill dev") from error
