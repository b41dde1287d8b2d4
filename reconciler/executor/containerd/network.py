"""The network of a node and of its containers: namespaces, bridges, routes, addresses.

    hub      mTAGbr ──veth mTAGnN── node N: eth0 172.31.77.N, routes 10.77.M.0/24 via 172.31.77.M
    node N   mTAGbr 10.77.N.1/24 ──veth vTAGxxxxxx── container: eth0 10.77.N.K, default 10.77.N.1

Everything lives in namespaces named `mill-TAG-...`. With `mill dev` the host's own network is left
as it was; on a real machine eth0 is a tunnel in place of the veth to the hub, and the machine gets
an uplink (`network_machine`). A node's namespace owns the prefix of the services' virtual addresses
(one local route, AnyIP), so whoever listens on one there is reached from its containers by their
default route. IPv4 only.

Each call is an *ensure*: it may run again after a crash at any point.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import assert_never

import msgspec

from reconciler.executor.containerd import network_machine as machine
from reconciler.executor.containerd import network_namespace as namespace
from reconciler.executor.containerd.network_command import DeviceMissing, delete_link, ip, show
from reconciler.executor.containerd.network_layout import (
    VIP_PREFIX,
    Hub,
    Layout,
    Vxlan,
    check_number,
    mac,
    overlay_address,
)
from reconciler.executor.containerd.network_namespace import NetworkFailed, socket_in

__all__ = [
    "VIP_PREFIX",
    "Hub",
    "Layout",
    "NetworkFailed",
    "Vxlan",
    "ensure_container",
    "ensure_hub",
    "ensure_node",
    "ensure_peers",
    "keep_host_namespace",
    "link_down",
    "link_up",
    "list_containers",
    "remove_container",
    "remove_host_namespace",
    "remove_node",
    "socket_in",
    "sweep",
]


class _Route(msgspec.Struct, frozen=True):
    dst: str = ""
    gateway: str = ""


class _Link(msgspec.Struct, frozen=True):
    ifname: str = "lo"


async def ensure_hub(layout: Layout) -> None:
    """The namespace and bridge that join the nodes of this machine."""
    await asyncio.to_thread(namespace.create, layout.hub_name)
    await ip(
        layout.hub_name,
        "link set lo up",
        f"link add {layout.bridge} address 02:4d:ac:1f:4d:fe type bridge",
        f"link set {layout.bridge} addrgenmode none up",
    )


async def ensure_node(layout: Layout) -> None:
    """The node's namespace with its bridge and its link to the other nodes, up.

    In a hub, `layout.peers` are ensured too; on a machine the peers stay as they are until
    `ensure_peers`, its uplink is made, and IPv4 forwarding is switched on in the caller's
    namespace. Errors: NetworkFailed.
    """
    await asyncio.to_thread(_create_node_namespace, layout)
    await ip(
        layout.node_name,
        "link set lo up",
        f"link add {layout.bridge} address {mac(layout.gateway)} type bridge",
        f"link set {layout.bridge} addrgenmode none up",
        f"addr replace {layout.gateway}/24 dev {layout.bridge}",
        f"route replace local {VIP_PREFIX} dev lo",
    )
    match layout.overlay:
        case Hub():
            await ensure_hub(layout)
            await _ensure_hub_link(layout)
            await ensure_peers(layout, dict.fromkeys(layout.peers, ""))
        case Vxlan():
            await machine.ensure_machine(layout, layout.overlay)
        case _:
            assert_never(layout.overlay)


async def ensure_peers(layout: Layout, peers: Mapping[int, str]) -> None:
    """Reach exactly these nodes: number → the IPv4 address of its machine (unread in a hub).

    The node's own number is passed over. Changes only what differs. Errors: ValueError for a
    number or an address that is none, once all the others are reached; NetworkFailed.
    """
    others = {number: host for number, host in peers.items() if number != layout.number}
    for number in others:
        check_number(number)
    wanted = {f"10.77.{number}.0/24": overlay_address(number) for number in others}
    match layout.overlay:
        case Hub():
            await _ensure_routes(layout, wanted)
        case Vxlan():
            reachable = {number: host for number, host in others.items() if _is_ipv4(host)}
            await machine.ensure_tunnels(layout, reachable)
            await _ensure_routes(layout, wanted | machine.machine_routes(others))
            if wrong := {number: others[number] for number in others.keys() - reachable.keys()}:
                raise ValueError(f"machines of nodes without an IPv4 address: {wrong}")
        case _:
            assert_never(layout.overlay)


async def ensure_container(layout: Layout, alloc: str, address: str) -> str:
    """The allocation's namespace with `address` (of the node's prefix) on eth0; returns its path.

    Errors: ValueError for an address outside the node's prefix; NetworkFailed.
    """
    if ipaddress.ip_address(address) not in ipaddress.ip_network(layout.prefix):
        raise ValueError(f"{address} of {alloc} is not in {layout.prefix} of {layout.node}")
    name, link = layout.container_name(alloc), layout.container_link(alloc)
    await asyncio.to_thread(namespace.create, name)
    mtu = await asyncio.to_thread(machine.link_mtu, layout)
    await _ensure_link(
        name,
        layout.node_name,
        f"link add eth0 mtu {mtu} address {mac(address)} "
        f"type veth peer name {link} mtu {mtu} netns {layout.node_name}",
        link,
        (
            "link set lo up",
            f"addr replace {address}/24 dev eth0",
            "link set eth0 addrgenmode none up",
            f"route replace default via {layout.gateway}",
        ),
    )
    await ip(layout.node_name, f"link set {link} addrgenmode none master {layout.bridge} up")
    return layout.container_path(alloc)


async def remove_container(layout: Layout, alloc: str) -> None:
    """Link and namespace of an allocation; nothing there is fine. Stop its task before."""
    path = Path(layout.container_path(alloc))
    if namespace.is_namespace(Path(layout.node_path)):
        await delete_link(layout.node_name, layout.container_link(alloc))
    await asyncio.to_thread(namespace.remove, path)


async def remove_node(layout: Layout) -> None:
    """The node's namespace, its link and what is left of its containers' namespaces.

    On a machine also its uplink and rules; only `ip_forward` stays on.
    Stop what holds sockets there before (Envoy, DNS): a socket keeps a namespace alive.
    """
    for alloc in await list_containers(layout):
        await remove_container(layout, alloc)
    match layout.overlay:
        case Hub():
            if namespace.is_namespace(namespace.named(layout.hub_name)):
                await delete_link(layout.hub_name, layout.hub_link)
        case Vxlan():
            await machine.remove_machine(layout)
        case _:
            assert_never(layout.overlay)
    await asyncio.to_thread(namespace.remove, Path(layout.node_path))


async def list_containers(layout: Layout) -> list[str]:
    """The allocations that have a namespace on this node, sorted."""
    prefix = layout.container_prefix
    return [name.removeprefix(prefix) for name in _names(prefix)]


async def link_down(layout: Layout) -> None:
    """Cut a node off from its peers, as pulling its cable would; its containers go on."""
    await ip(layout.hub_name, f"link set {layout.hub_link} down")


async def link_up(layout: Layout) -> None:
    """Undo `link_down`; `ensure_node` does so too."""
    await ip(layout.hub_name, f"link set {layout.hub_link} up")


async def sweep(tag: str) -> tuple[str, ...]:
    """Remove every namespace (and kept host namespace) of `tag`, and only those; what was removed.

    What carries the tag in the caller's own namespace (uplink, table) goes too, and is not named.
    Stop the processes inside before: the names and links go at once, but a namespace with a live
    process or socket in it ends with that.
    """
    layout = Layout(tag, "sweep", 1)  # refuses a tag that could match more than itself
    await machine.remove_from_machine(layout)
    names = _names(f"mill-{tag}-")
    for name in names:
        if namespace.is_namespace(namespace.named(name)):
            await _delete_all_links(name)
        await asyncio.to_thread(namespace.remove, namespace.named(name))
    kept = [path for path in _kept_namespaces() if _carries(path, tag)]
    for path in kept:
        await asyncio.to_thread(namespace.remove, path)
    return (*names, *(str(path) for path in kept))


async def keep_host_namespace(path: Path) -> None:
    """Bind mount the caller's own network namespace at `path`, for listeners opened from inside.

    Idempotent. `sweep(tag)` removes it too where a folder or file on the path is named
    `mill-TAG...`.
    """
    await asyncio.to_thread(namespace.keep, path)


async def remove_host_namespace(path: Path) -> None:
    """Undo `keep_host_namespace`; nothing there is fine."""
    await asyncio.to_thread(namespace.remove, path)


def _create_node_namespace(layout: Layout) -> None:
    namespace.create(layout.node_name)
    for setting, value in (
        ("net/ipv4/ip_forward", 1),
        ("net/ipv4/conf/all/route_localnet", 1),
        # On by default here: a container that calls its own node's published port would hang.
        ("net/bridge/bridge-nf-call-iptables", 0),
        ("net/bridge/bridge-nf-call-ip6tables", 0),
    ):
        namespace.write_setting(layout.node_name, setting, value)


async def _ensure_link(
    name: str, far_name: str, add: str, far_link: str, lines: tuple[str, ...]
) -> None:
    """Run `add` and `lines` in `name`; where only the far end is left, take that away and retry.

    The far end outlives the near one's name while a process or socket keeps that namespace alive.
    """
    try:
        await ip(name, add, *lines)
    except DeviceMissing:
        await delete_link(far_name, far_link)
        await ip(name, add, *lines)


async def _ensure_hub_link(layout: Layout) -> None:
    await _ensure_link(
        layout.node_name,
        layout.hub_name,
        f"link add eth0 address {mac(layout.hub_address)} "
        f"type veth peer name {layout.hub_link} netns {layout.hub_name}",
        layout.hub_link,
        (
            "link set eth0 addrgenmode none up",
            f"addr replace {layout.hub_address}/24 dev eth0",
        ),
    )
    await ip(
        layout.hub_name,
        f"link set {layout.hub_link} addrgenmode none master {layout.bridge} up",
    )


async def _ensure_routes(layout: Layout, wanted: Mapping[str, str]) -> None:
    """Routes of our protocol number in the node's namespace: prefix → gateway, and no others."""
    rows = await show(_Route, "ip", layout.node_name, "route", "show", "proto", f"{machine.OURS}")
    there = {row.dst: row.gateway for row in rows}
    await ip(
        layout.node_name,
        *(f"route del {dst} proto {machine.OURS}" for dst in sorted(there.keys() - wanted.keys())),
        *(
            f"route replace {dst} via {gateway} proto {machine.OURS}"
            for dst, gateway in sorted(wanted.items())
            if there.get(dst) != gateway
        ),
    )


async def _delete_all_links(name: str) -> None:
    for link in await show(_Link, "ip", name, "link", "show"):
        if link.ifname != "lo":
            await delete_link(name, link.ifname)


def _is_ipv4(host: str) -> bool:
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        return False
    return True


def _names(prefix: str) -> list[str]:
    try:
        return sorted(path.name for path in namespace.NETNS_FOLDER.glob(f"{prefix}*"))
    except FileNotFoundError:
        return []


def _kept_namespaces() -> list[Path]:
    """Mount points of network namespaces outside `/run/netns`, from proc(5) mountinfo."""
    found = set()
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[3].startswith("net:[") and fields[fields.index("-") + 1] == "nsfs":
            found.add(Path(fields[4].encode().decode("unicode_escape")))
    return sorted(path for path in found if path.parent != namespace.NETNS_FOLDER)


def _carries(path: Path, tag: str) -> bool:
    return any(part == f"mill-{tag}" or part.startswith(f"mill-{tag}-") for part in path.parts)
