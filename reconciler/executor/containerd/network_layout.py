"""Names and addresses of a node's network, of its containers and of its way to the other nodes.

10.77.K.0/24    node K's bridge (.1) and its containers
10.97.0.0/16    virtual addresses of services, local to every node
172.31.77.K     node K's namespace, as its peers route to it
172.31.78.K     node K's machine, as every node routes to it (real machines only)
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from dataclasses import dataclass, field

from reconciler.executor.containerd import network_namespace as namespace

NODES_PREFIX = "10.77.0.0/16"
VIP_PREFIX = "10.97.0.0/16"
OVERLAY_PREFIX = "172.31.77.0/24"
MACHINES_PREFIX = "172.31.78.0/24"

_TAG = re.compile(r"[0-9a-z]{1,8}")
_ALLOCATION = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")


@dataclass(frozen=True)
class Hub:
    """All nodes on one machine, joined by a bridge in a namespace (`mill dev`); no way outside."""


@dataclass(frozen=True)
class Vxlan:
    """A machine for each node, joined by VXLAN (RFC 7348) between their own addresses.

    address: IPv4, one of this machine's links has it and peers send to it. IPv6 underlays are not
    built. Frames between machines are neither encrypted nor signed.
    """

    address: str

    def __post_init__(self) -> None:
        ipaddress.IPv4Address(self.address)


@dataclass(frozen=True)
class Layout:
    """The names and addresses of one node's network; all of them carry the tag.

    tag: 8 hex characters, the hash of a data folder; `mill` for a machine's default one.
    node: the node's name, for errors. number: 1 to 253.
    peers: numbers of the other nodes, where they are known beforehand (`mill dev`).
    """

    tag: str
    node: str
    number: int
    peers: tuple[int, ...] = field(default=())
    overlay: Hub | Vxlan = field(default=Hub())

    def __post_init__(self) -> None:
        if not _TAG.fullmatch(self.tag):
            raise ValueError(f"tag {self.tag!r}: 1 to 8 of 0-9 a-z, it is part of interface names")
        for number in (self.number, *self.peers):
            check_number(number)

    @property
    def hub_name(self) -> str:
        """The namespace that joins the nodes of one machine."""
        return f"mill-{self.tag}-hub"

    @property
    def node_name(self) -> str:
        """The node's namespace, by name as `ip -n` takes it."""
        return f"mill-{self.tag}-n{self.number}"

    @property
    def node_path(self) -> str:
        """The node's namespace, as a path."""
        return str(namespace.named(self.node_name))

    @property
    def bridge(self) -> str:
        """The name of the bridge in the hub and in each node's namespace."""
        return f"m{self.tag}br"

    @property
    def hub_link(self) -> str:
        """The hub's end of the node's link."""
        return f"m{self.tag}n{self.number}"

    @property
    def uplink(self) -> str:
        """The machine's end of its link to the node's namespace; the other end is `uplink`."""
        return f"m{self.tag}up"

    @property
    def table(self) -> str:
        """The nftables table in the machine's own network namespace, family ip."""
        return f"mill-{self.tag}"

    @property
    def prefix(self) -> str:
        """The node's /24, from which its allocations get addresses."""
        return f"10.77.{self.number}.0/24"

    @property
    def gateway(self) -> str:
        """The bridge's address: the containers' default route and name server."""
        return f"10.77.{self.number}.1"

    @property
    def hub_address(self) -> str:
        """The node's address in the hub or overlay, by which its peers route to it."""
        return overlay_address(self.number)

    @property
    def machine_address(self) -> str:
        """The source of what the machine itself sends to containers, on whichever node."""
        return machine_address(self.number)

    @property
    def container_prefix(self) -> str:
        """How the names of its containers' namespaces begin."""
        return f"mill-{self.tag}-c{self.number}-"

    def container_name(self, alloc: str) -> str:
        """The namespace of an allocation."""
        if not _ALLOCATION.fullmatch(alloc):
            raise ValueError(f"allocation {alloc!r}: not a name for a namespace")
        return f"{self.container_prefix}{alloc}"

    def container_path(self, alloc: str) -> str:
        """The namespace of an allocation, as the path that a container's spec takes."""
        return str(namespace.named(self.container_name(alloc)))

    def container_link(self, alloc: str) -> str:
        """The node's end of an allocation's link: at most 15 characters, hence a hash."""
        digest = base64.b32encode(hashlib.blake2b(alloc.encode()).digest()).decode()
        return f"v{self.tag}{digest[:6].lower()}"


def check_number(number: int) -> None:
    """Refuse a node number that cannot become part of an address: ValueError."""
    if not 1 <= number <= 253:
        raise ValueError(f"node number {number}: 1 to 253, it becomes part of an address")


def overlay_address(number: int) -> str:
    """The address of node `number` among the nodes."""
    return f"172.31.77.{number}"


def machine_address(number: int) -> str:
    """The address of the machine below node `number`, among the nodes."""
    return f"172.31.78.{number}"


def mac(address: str) -> str:
    """A fixed local MAC from the IPv4 address: an address that comes back, comes back the same.

    Otherwise neighbours would talk to the old one until their ARP entry expires, and a bridge
    would change its own with every port.
    """
    return "02:4d:" + ":".join(f"{octet:02x}" for octet in ipaddress.ip_address(address).packed)
