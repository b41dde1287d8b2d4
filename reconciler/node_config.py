"""What one node is told about itself, in `node.json` of its data folder (0600)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from reconciler.errors import MillError
from reconciler.executor.containerd.network import Hub, Layout, Vxlan
from reconciler.fsm.records import Node


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the cluster: where it answers, and what it has to give."""

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

    @property
    def log(self) -> str:
        """Where its log listens, host:port."""
        return f"{self.host}:{self.log_port}"

    def is_as(self, node: Node | None) -> bool:
        """The log has this member as it is configured."""
        return node is not None and (
            (node.api, node.agent, node.log) == (self.api, self.agent, self.log)
            and (node.cpu_milli, node.memory_bytes) == (self.cpu_milli, self.memory_bytes)
        )


class LogMember(msgspec.Struct, frozen=True):
    """A member of the log, as one that joins is told of it."""

    name: str
    host: str
    port: int


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One node. `tag` marks everything it makes on the host; `run` is its folder for sockets.

    peers: this node, and those that found the cluster with it: they vote from the start. members:
    of a node that joined, whom its log may hear until it has learnt who is there; else empty.
    authority: the folder with the cluster's CA, until that is in the log ("" for one that joined).
    overlay: how nodes reach each other's containers: over the `hub` of one machine, or by `vxlan`.
    The cluster's id and first token (its SHA-256) are put in the log by whoever leads first.
    """

    name: str
    tag: str
    data: str
    run: str
    peers: tuple[Peer, ...]
    cluster: str
    containerd: str
    runc_root: str
    namespace: str
    host_netns: str
    http_port: int
    https_port: int
    ingress_host: str
    members: tuple[LogMember, ...] = ()
    token_id: str = ""
    token_sha256: str = ""
    authority: str = ""
    overlay: Literal["hub", "vxlan"] = "hub"
    dns_port: int = 0
    dns_upstreams: tuple[str, ...] = ()

    @property
    def me(self) -> Peer:
        """This node among its peers."""
        return next(peer for peer in self.peers if peer.name == self.name)

    @property
    def layout(self) -> Layout:
        """The names and addresses of its network."""
        others = tuple(peer.number for peer in self.peers if peer.name != self.name)
        overlay = Hub() if self.overlay == "hub" else Vxlan(self.me.host)
        return Layout(self.tag, self.name, self.me.number, others, overlay)


def load(path: Path) -> NodeConfig:
    """Read a node's configuration; MillError says what is wrong with it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=NodeConfig)
    except (OSError, msgspec.DecodeError) as error:
        raise MillError(f"the node's configuration cannot be read: {error}", at=str(path),
                        hint="mill init, mill join or mill dev write it") from error
