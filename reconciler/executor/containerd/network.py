"""The network of a node and of its containers: namespaces, bridges, routes, addresses.

    hub      mTAGbr ──veth mTAGnN── node N: eth0 172.31.77.N, routes 10.77.M.0/24 via 172.31.77.M
    node N   mTAGbr 10.77.N.1/24 ──veth vTAGxxxxxx── container: eth0 10.77.N.K, default 10.77.N.1

Everything lives in namespaces named `mill-TAG-...`; the host's own network is left as it was.
A node's namespace owns the prefix of the services' virtual addresses (one local route, AnyIP), so
whoever listens on one there is reached from its containers by their default route.

Each call is an *ensure*: it may run again after a crash at any point. No nftables rules are made:
a dev node has no outside to masquerade for. A real machine's uplink, and masquerading from its
containers to it, come with joining machines.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ipaddress
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from reconciler.executor.containerd import network_namespace as namespace
from reconciler.executor.containerd.network_namespace import NetworkFailed, socket_in

__all__ = [
    "VIP_PREFIX",
    "Layout",
    "NetworkFailed",
    "ensure_container",
    "ensure_hub",
    "ensure_node",
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

VIP_PREFIX = "10.97.0.0/16"
COMMAND_DEADLINE_S = 20.0  # `ip` takes milliseconds; only a wedged kernel lock reaches this
_ROUTES_OF_OURS = 77  # rtm_protocol of the routes to peers: those are ours to take away again

_TAG = re.compile(r"[0-9a-z]{1,8}")
_ALLOCATION = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")


@dataclass(frozen=True)
class Layout:
    """The names and addresses of one node's network; all of them carry the tag.

    tag: 8 hex characters, the hash of a dev data folder; on a real machine `mill`.
    node: the node's name, for errors. number: 1 to 253. peers: the numbers of the other nodes.
    """

    tag: str
    node: str
    number: int
    peers: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not _TAG.fullmatch(self.tag):
            raise ValueError(f"tag {self.tag!r}: 1 to 8 of 0-9 a-z, it is part of interface names")
        for number in (self.number, *self.peers):
            if not 1 <= number <= 253:
                raise ValueError(f"node number {number}: 1 to 253, it becomes part of an address")

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
    def prefix(self) -> str:
        """The node's /24, from which its allocations get addresses."""
        return f"10.77.{self.number}.0/24"

    @property
    def gateway(self) -> str:
        """The bridge's address: the containers' default route and name server."""
        return f"10.77.{self.number}.1"

    @property
    def hub_address(self) -> str:
        """The node's address in the hub, by which its peers route to it."""
        return f"172.31.77.{self.number}"

    def container_name(self, alloc: str) -> str:
        """The namespace of an allocation."""
        if not _ALLOCATION.fullmatch(alloc):
            raise ValueError(f"allocation {alloc!r}: not a name for a namespace")
        return f"{self._container_prefix}{alloc}"

    def container_path(self, alloc: str) -> str:
        """The namespace of an allocation, as the path that a container's spec takes."""
        return str(namespace.named(self.container_name(alloc)))

    def container_link(self, alloc: str) -> str:
        """The node's end of an allocation's link: at most 15 characters, hence a hash."""
        digest = base64.b32encode(hashlib.blake2b(alloc.encode()).digest()).decode()
        return f"v{self.tag}{digest[:6].lower()}"

    @property
    def _container_prefix(self) -> str:
        return f"mill-{self.tag}-c{self.number}-"


async def ensure_hub(layout: Layout) -> None:
    """The namespace and bridge that join the nodes of this machine."""
    await asyncio.to_thread(namespace.create, layout.hub_name)
    await _ip(
        layout.hub_name,
        "link set lo up",
        f"link add {layout.bridge} address 02:4d:ac:1f:4d:fe type bridge",
        f"link set {layout.bridge} addrgenmode none up",
    )


async def ensure_node(layout: Layout) -> None:
    """The node's namespace with its bridge, its link to the hub (up) and routes to its peers."""
    await ensure_hub(layout)
    await asyncio.to_thread(_create_node_namespace, layout)
    await _ensure_link(
        layout.node_name,
        layout.hub_name,
        f"link add eth0 address {_mac(layout.hub_address)} "
        f"type veth peer name {layout.hub_link} netns {layout.hub_name}",
        layout.hub_link,
        (
            "link set lo up",
            "link set eth0 addrgenmode none up",
            f"addr replace {layout.hub_address}/24 dev eth0",
            f"link add {layout.bridge} address {_mac(layout.gateway)} type bridge",
            f"link set {layout.bridge} addrgenmode none up",
            f"addr replace {layout.gateway}/24 dev {layout.bridge}",
            f"route replace local {VIP_PREFIX} dev lo",
            *(
                f"route replace 10.77.{peer}.0/24 via 172.31.77.{peer} proto {_ROUTES_OF_OURS}"
                for peer in layout.peers
                if peer != layout.number
            ),
        ),
    )
    await _ip(
        layout.hub_name,
        f"link set {layout.hub_link} addrgenmode none master {layout.bridge} up",
    )
    await _forget_old_peers(layout)


async def ensure_container(layout: Layout, alloc: str, address: str) -> str:
    """The allocation's namespace with `address` (of the node's prefix) on eth0; returns its path.

    Errors: ValueError for an address outside the node's prefix; NetworkFailed.
    """
    if ipaddress.ip_address(address) not in ipaddress.ip_network(layout.prefix):
        raise ValueError(f"{address} of {alloc} is not in {layout.prefix} of {layout.node}")
    name, link = layout.container_name(alloc), layout.container_link(alloc)
    await asyncio.to_thread(namespace.create, name)
    await _ensure_link(
        name,
        layout.node_name,
        f"link add eth0 address {_mac(address)} "
        f"type veth peer name {link} netns {layout.node_name}",
        link,
        (
            "link set lo up",
            f"addr replace {address}/24 dev eth0",
            "link set eth0 addrgenmode none up",
            f"route replace default via {layout.gateway}",
        ),
    )
    await _ip(layout.node_name, f"link set {link} addrgenmode none master {layout.bridge} up")
    return layout.container_path(alloc)


async def remove_container(layout: Layout, alloc: str) -> None:
    """Link and namespace of an allocation; nothing there is fine. Stop its task before."""
    path = Path(layout.container_path(alloc))
    if namespace.is_namespace(Path(layout.node_path)):
        await _delete_link(layout.node_name, layout.container_link(alloc))
    await asyncio.to_thread(namespace.remove, path)


async def remove_node(layout: Layout) -> None:
    """The node's namespace, its link and what is left of its containers' namespaces.

    Stop what holds sockets there before (Envoy, DNS): a socket keeps a namespace alive.
    """
    for alloc in await list_containers(layout):
        await remove_container(layout, alloc)
    if namespace.is_namespace(namespace.named(layout.hub_name)):
        await _delete_link(layout.hub_name, layout.hub_link)
    await asyncio.to_thread(namespace.remove, Path(layout.node_path))


async def list_containers(layout: Layout) -> list[str]:
    """The allocations that have a namespace on this node, sorted."""
    prefix = layout._container_prefix
    return [name.removeprefix(prefix) for name in _names(prefix)]


async def link_down(layout: Layout) -> None:
    """Cut a node off from its peers, as pulling its cable would; its containers go on."""
    await _ip(layout.hub_name, f"link set {layout.hub_link} down")


async def link_up(layout: Layout) -> None:
    """Undo `link_down`; `ensure_node` does so too."""
    await _ip(layout.hub_name, f"link set {layout.hub_link} up")


async def sweep(tag: str) -> tuple[str, ...]:
    """Remove every namespace (and kept host namespace) of `tag`, and only those; what was removed.

    Stop the processes inside before: the names and links go at once, but a namespace with a live
    process or socket in it ends with that.
    """
    Layout(tag, "sweep", 1)  # refuses a tag that could match more than itself
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
        await _ip(name, add, *lines)
    except _DeviceMissing:
        await _delete_link(far_name, far_link)
        await _ip(name, add, *lines)


async def _forget_old_peers(layout: Layout) -> None:
    shown = await _run("ip", "-n", layout.node_name, "-json", "route", "show", "proto", "77")
    wanted = {f"10.77.{peer}.0/24" for peer in layout.peers}
    stale = [row["dst"] for row in json.loads(shown or "[]") if row["dst"] not in wanted]
    if stale:
        await _ip(layout.node_name, *(f"route del {dst} proto 77" for dst in stale))


async def _delete_link(name: str, link: str) -> None:
    try:
        await _ip(name, f"link del {link}")
    except _DeviceMissing:
        return


async def _delete_all_links(name: str) -> None:
    shown = json.loads(await _run("ip", "-n", name, "-json", "link", "show") or "[]")
    for link in (row["ifname"] for row in shown if row["ifname"] != "lo"):
        await _delete_link(name, link)


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


def _mac(address: str) -> str:
    """A fixed local MAC from the IPv4 address: an address that comes back, comes back the same.

    Otherwise neighbours would talk to the old one until their ARP entry expires, and a bridge
    would change its own with every port.
    """
    return "02:4d:" + ":".join(f"{octet:02x}" for octet in ipaddress.ip_address(address).packed)


class _DeviceMissing(NetworkFailed):
    """`ip` named a device that is not there."""


async def _ip(name: str, *lines: str) -> None:
    """Run lines of `ip` in the namespace `name` as one batch; a link that exists already is fine.

    Errors: _DeviceMissing, NetworkFailed.
    """
    await _run("ip", "-n", name, "-force", "-batch", "-", lines=lines)


async def _run(*command: str, lines: tuple[str, ...] = ()) -> str:
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(COMMAND_DEADLINE_S):
            out, err = await process.communicate("".join(f"{line}\n" for line in lines).encode())
    except TimeoutError as error:
        process.kill()
        await process.wait()
        raise NetworkFailed("ip did not answer", at=" ".join(command)) from error
    if process.returncode:
        _raise_unless_it_exists(err.decode(errors="replace"), command, lines)
    return out.decode()


def _raise_unless_it_exists(err: str, command: tuple[str, ...], lines: tuple[str, ...]) -> None:
    """`ip -force -batch` tells each failure as reason lines and then `Command failed -:N`."""
    reasons: list[str] = []
    for told in err.splitlines():
        failed = re.match(r"Command failed -:(\d+)", told)
        if not failed:
            reasons.append(told)
            continue
        line = lines[int(failed[1]) - 1]
        if not (line.startswith("link add ") and any("File exists" in why for why in reasons)):
            why = "; ".join(reasons) or told
            kind = _DeviceMissing if "Cannot find device" in why else NetworkFailed
            raise kind(f"ip {line!r}: {why}", at=command[2])
        reasons = []
    if reasons:
        raise NetworkFailed("; ".join(reasons), at=" ".join(command))
