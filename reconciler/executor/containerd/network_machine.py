"""The network of a real machine: its tunnel to the other machines and its way to the outside.

    node's namespace                                   the machine's own (the caller's)
    eth0 172.31.77.K ── VXLAN 77 ─────── UDP 4789 ───── the machine's address, to its peers
    uplink (default route) ── veth ─────────── mTAGup 172.31.78.K, routes 10.77/16 and 10.97/16

The tunnel's device is made from the machine's namespace inside the node's: its UDP socket stays
with its maker. No frame is flooded or learned: MAC addresses follow from node numbers, and each
peer has a permanent neighbour and a forwarding entry. The way back to a machine needs no address
translation, because 172.31.78.K is routed by every node; what leaves for the outside is masqueraded
by the machine's table `mill-TAG`, which also refuses what comes from outside for a container, and
tunnel packets that are not from a peer.

The machine's `net.ipv4.ip_forward` is switched on, and left on: others may rely on it by then. A
firewall of the machine that drops what it forwards by default (Docker's does) must let `mTAGup`
pass in both directions, and UDP 4789 from the peers.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import msgspec

from reconciler.executor.containerd import network_namespace as namespace
from reconciler.executor.containerd.network_command import (
    DeviceMissing,
    batch,
    delete_link,
    ip,
    run,
    show,
)
from reconciler.executor.containerd.network_layout import (
    MACHINES_PREFIX,
    NODES_PREFIX,
    OVERLAY_PREFIX,
    VIP_PREFIX,
    Layout,
    Vxlan,
    mac,
    machine_address,
    overlay_address,
)
from reconciler.executor.containerd.network_namespace import NetworkFailed

VXLAN_ID = 77
VXLAN_PORT = 4789  # RFC 7348, IANA
VXLAN_BYTES = 50  # Ethernet 14, IPv4 20, UDP 8, VXLAN 8: what a frame grows by on the underlay
OURS = 77  # rtm_protocol of the routes that come and go with the peers

_TAKEN = tuple(
    ipaddress.IPv4Network(prefix)
    for prefix in (NODES_PREFIX, VIP_PREFIX, OVERLAY_PREFIX, MACHINES_PREFIX)
)
_MACS = mac("172.31.77.0")[:-2]  # how the MAC addresses of all nodes begin
_SIOCGIFMTU = 0x8921


async def ensure_machine(layout: Layout, vxlan: Vxlan) -> None:
    """Uplink, table and tunnel of a node whose namespace and bridge are there; peers as they were.

    Errors: NetworkFailed, where the machine lacks the address, or uses the cluster's addresses or
    VXLAN 77 on UDP 4789 for something else.
    """
    underlay = await _underlay(vxlan)
    await _refuse_taken_prefixes(layout)
    await _ensure_uplink(layout, underlay.mtu - VXLAN_BYTES)
    await _ensure_tunnel(layout, vxlan, underlay.mtu - VXLAN_BYTES)
    await _load_table(layout)
    await asyncio.to_thread(Path("/proc/sys/net/ipv4/ip_forward").write_text, "1")


async def ensure_tunnels(layout: Layout, peers: Mapping[int, str]) -> None:
    """The tunnel's ends: exactly these peers, by number, with their machines' IPv4 addresses.

    Reads what the kernel has and changes only what differs, so flowing traffic is not touched.
    """
    wanted = {mac(overlay_address(number)): host for number, host in peers.items()}
    entries, neighbours = await asyncio.gather(
        show(_Entry, "bridge", layout.node_name, "fdb", "show", "dev", "eth0"),
        show(
            _Neighbour, "ip", layout.node_name, "neigh", "show", "dev", "eth0", "nud", "permanent"
        ),
    )
    there = {entry.mac: entry.dst for entry in entries if entry.mac.startswith(_MACS)}
    known = {neighbour.dst: neighbour.lladdr for neighbour in neighbours}
    addresses = {overlay_address(number): mac(overlay_address(number)) for number in peers}
    await batch(
        "bridge",
        layout.node_name,
        *(f"fdb del {gone} dev eth0 self" for gone in sorted(there.keys() - wanted.keys())),
        *(
            f"fdb replace {address} dev eth0 self permanent dst {host}"
            for address, host in sorted(wanted.items())
            if there.get(address) != host
        ),
    )
    await ip(
        layout.node_name,
        *(f"neigh del {gone} dev eth0" for gone in sorted(known.keys() - addresses.keys())),
        *(
            f"neigh replace {address} lladdr {at} dev eth0 nud permanent"
            for address, at in sorted(addresses.items())
            if known.get(address) != at
        ),
    )
    await _load_table(layout, peers.values())


def machine_routes(peers: Iterable[int]) -> dict[str, str]:
    """Routes of the node's namespace to its peers' machines: prefix → gateway."""
    return {machine_address(number): overlay_address(number) for number in peers}


async def remove_machine(layout: Layout) -> None:
    """Table, uplink and tunnel; nothing there is fine. `ip_forward` stays on."""
    await remove_from_machine(layout)
    if namespace.is_namespace(Path(layout.node_path)):
        # Not left to the namespace's end, which a socket can put off: VXLAN 77 would stay taken.
        await delete_link(layout.node_name, "eth0")


async def remove_from_machine(layout: Layout) -> None:
    """What carries the tag in the machine's own namespace: uplink and table."""
    await delete_link(None, layout.uplink)
    try:
        await run("nft", "delete", "table", "ip", layout.table)
    except NetworkFailed as error:
        if not any(why in error.what for why in ("No such file", "not supported", "no program")):
            raise


def link_mtu(layout: Layout) -> int:
    """The MTU of the node's bridge, in bytes: that of its containers' links."""
    with namespace.socket_in(layout.node_path, socket.AF_INET, socket.SOCK_DGRAM) as asking:
        request = struct.pack("16si12x", layout.bridge.encode(), 0)
        try:
            answer = fcntl.ioctl(asking, _SIOCGIFMTU, request)
        except OSError as error:
            raise NetworkFailed(
                f"no bridge {layout.bridge}: {error.strerror}", at=layout.node_name
            ) from error
    return int(struct.unpack("16si12x", answer)[1])


class _Data(msgspec.Struct, frozen=True):
    id: int = 0
    local: str = ""
    port: int = 0


class _Info(msgspec.Struct, frozen=True):
    info_kind: str = ""
    info_data: _Data = _Data()


class _Address(msgspec.Struct, frozen=True):
    local: str = ""


class _Link(msgspec.Struct, frozen=True):
    ifname: str = ""
    linkinfo: _Info = _Info()


class _Device(msgspec.Struct, frozen=True):
    ifname: str = ""
    mtu: int = 0
    addr_info: tuple[_Address, ...] = ()


class _Route(msgspec.Struct, frozen=True):
    dst: str = "default"
    dev: str = ""


class _Entry(msgspec.Struct, frozen=True):
    mac: str = ""
    dst: str = ""


class _Neighbour(msgspec.Struct, frozen=True):
    dst: str = ""
    lladdr: str = ""


async def _underlay(vxlan: Vxlan) -> _Device:
    for link in await show(_Device, "ip", None, "-4", "addr", "show"):
        if any(address.local == vxlan.address for address in link.addr_info):
            return link
    raise NetworkFailed(
        f"no link of this machine has the address {vxlan.address}",
        at=vxlan.address,
        hint="advertise one of the machine's own IPv4 addresses, which the other machines reach",
    )


async def _refuse_taken_prefixes(layout: Layout) -> None:
    for route in await show(_Route, "ip", None, "-4", "route", "show"):
        if route.dst == "default" or route.dev == layout.uplink:
            continue
        taken = ipaddress.IPv4Network(route.dst)
        for prefix in _TAKEN:
            if taken.subnet_of(prefix):
                raise NetworkFailed(
                    f"this machine routes {taken} of the cluster's {prefix} to {route.dev}",
                    at=route.dst,
                    hint="one cluster a machine: `mill leave` the other one, or move that network",
                )


async def _ensure_uplink(layout: Layout, mtu: int) -> None:
    """The veth between machine and node; where one end is another pair's, both are made anew.

    That is so after a change of the node's number, or of the namespace that the node runs in; a
    tunnel then belongs to the namespace before, and goes too.
    """
    machine, node = layout.machine_address, layout.hub_address
    add = f"link add {layout.uplink} type veth peer name uplink netns {layout.node_name}"
    in_machine = (
        f"link set {layout.uplink} mtu {mtu} addrgenmode none up",
        f"addr replace {machine} peer {node}/32 dev {layout.uplink}",
    )
    in_node = (
        f"link set uplink mtu {mtu} addrgenmode none up",
        f"addr replace {node} peer {machine}/32 dev uplink",
        f"route replace default via {machine} dev uplink src {node}",
        # A packet to a node that is not there would go round between machine and node otherwise.
        f"route replace unreachable {NODES_PREFIX}",
        f"route replace unreachable {MACHINES_PREFIX}",
    )
    try:
        await ip(None, add, *in_machine)
        await ip(layout.node_name, *in_node)
    except DeviceMissing:
        await delete_link(None, layout.uplink)
        await delete_link(layout.node_name, "uplink")
        await delete_link(layout.node_name, "eth0")
        await ip(None, add, *in_machine)
        await ip(layout.node_name, *in_node)
    await ip(
        None,
        *(
            f"route replace {prefix} via {node} dev {layout.uplink} src {machine}"
            for prefix in (NODES_PREFIX, VIP_PREFIX)
        ),
    )


async def _ensure_tunnel(layout: Layout, vxlan: Vxlan, mtu: int) -> None:
    links = await show(_Link, "ip", layout.node_name, "link", "show")
    made = next((link.linkinfo for link in links if link.ifname == "eth0"), None)
    data = _Data(VXLAN_ID, vxlan.address, VXLAN_PORT)
    if made is not None and (made.info_kind, made.info_data) != ("vxlan", data):
        await delete_link(layout.node_name, "eth0")
    try:
        await ip(
            None,
            f"link add eth0 netns {layout.node_name} mtu {mtu} address {mac(layout.hub_address)} "
            f"type vxlan id {VXLAN_ID} local {vxlan.address} dstport {VXLAN_PORT} nolearning",
        )
    except NetworkFailed as error:
        if "already exists" not in error.what:
            raise
        raise NetworkFailed(
            f"VXLAN {VXLAN_ID} on UDP {VXLAN_PORT} is taken on this machine",
            at=vxlan.address,
            hint="`mill leave` removes an older node's network; other users: `ip -d link`",
        ) from error
    await ip(
        layout.node_name,
        f"link set eth0 mtu {mtu} addrgenmode none up",
        f"link set {layout.bridge} mtu {mtu}",
        f"addr replace {layout.hub_address}/24 dev eth0",
    )


async def _load_table(layout: Layout, hosts: Collection[str] | None = None) -> None:
    """The machine's rules as one transaction, with the peers' addresses where they are given.

    Loaded whole each time: a reload of the machine's firewall flushes every table there is.
    """
    add, table, uplink = "add rule ip", layout.table, f'"{layout.uplink}"'
    inside = f"{{ {layout.prefix}, {layout.hub_address} }}"
    elsewhere = f"{{ {NODES_PREFIX}, {VIP_PREFIX} }}"
    lines = [
        f"add table ip {table}",
        f"add set ip {table} peers {{ type ipv4_addr; }}",
        f"add chain ip {table} outward {{ type nat hook postrouting priority srcnat; }}",
        f"add chain ip {table} inward {{ type filter hook forward priority filter; }}",
        f"add chain ip {table} tunnel {{ type filter hook input priority filter; }}",
        f"flush table ip {table}",
        f"{add} {table} outward ip saddr {inside} ip daddr != {elsewhere} oifname != {uplink} "
        "masquerade",
        f"{add} {table} inward oifname {uplink} ct state != {{ established, related }} drop",
        # The VXLAN id, after 8 bytes of UDP header and 4 of flags.
        f"{add} {table} tunnel udp dport {VXLAN_PORT} @th,96,24 {VXLAN_ID} ip saddr != @peers drop",
    ]
    if hosts is not None:
        lines.append(f"flush set ip {table} peers")
    if hosts:
        lines.append(f"add element ip {table} peers {{ {', '.join(sorted(set(hosts)))} }}")
    await run("nft", "-f", "-", lines=tuple(lines))
