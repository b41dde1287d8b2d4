"""A real machine's node: founded, joined, run, and taken away again without a trace.

One data folder (`/var/lib/mill`) holds all of its state, one folder below `/run` its sockets. On a
machine that stands for several (as in tests), each node has its own folder, and a tag made of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from reconciler.dev_founding import tag_of
from reconciler.edge.certificates import (
    create_ca,
    issue,
    write_authority,
    write_identity,
    write_private,
)
from reconciler.errors import Conflict, Malformed, MillError, NotFound
from reconciler.executor.containerd import network
from reconciler.executor.containerd.cgroups import remove_cgroup
from reconciler.executor.containerd.daemon import daemon_paths, purge_daemon
from reconciler.node_config import NodeConfig, Peer, load
from reconciler.node_remains import end_companions

DATA = Path("/var/lib/mill")
API_PORT, LOG_PORT, AGENT_PORT, HTTP_PORT, HTTPS_PORT = 4400, 4401, 4402, 80, 443
"""What a machine's node listens on (contracts: Ports and files)."""
LOOK_S = 10.0
"""For a look at the machine's links, which takes milliseconds."""
PROGRAMS = {"containerd": "containerd", "runc": "runc", "ip": "iproute2", "nft": "nftables",
            "nsenter": "util-linux"}


class Missing(MillError):
    """This machine lacks something that a node needs."""


@dataclass(frozen=True)
class Place:
    """Where a node's things are on its machine."""

    data: Path = DATA

    @property
    def folder(self) -> Path:
        """The data folder, absolute."""
        return self.data.resolve()

    @property
    def tag(self) -> str:
        """What marks everything of it on the machine: `mill`, or a hash of another folder."""
        return "mill" if self.folder == DATA else tag_of(self.data)

    @property
    def run(self) -> Path:
        """Sockets and the kept namespace; gone after a reboot."""
        return Path("/run") / f"mill-{self.tag}"

    @property
    def config_path(self) -> Path:
        """The node's configuration; whoever has one is a node."""
        return self.folder / "node.json"

    @property
    def containerd(self) -> Path:
        """The node's own containerd."""
        return self.folder / "containerd"

    def config(self) -> NodeConfig:
        """The node that this machine is; NotFound where it is none."""
        if not self.config_path.exists():
            raise NotFound("this machine is no node yet", at=str(self.folder),
                           hint="found a cluster with mill init, or join one with mill join")
        return load(self.config_path)

    def must_be_empty(self) -> None:
        """Refuse to make a second node of it."""
        if self.config_path.exists():
            config = load(self.config_path)
            raise Conflict(f"this machine is node {config.name} of {config.cluster} already",
                           at=str(self.folder), hint="run it with mill agent, or take it out of "
                           "its cluster with mill leave")


class Founded(msgspec.Struct, frozen=True):
    """A cluster that has just begun: what its first context holds."""

    cluster: str
    node: str
    address: str
    token: str
    ca_pem: bytes


def check_machine() -> None:
    """Refuse in one line what cannot work here."""
    if os.geteuid() != 0:
        raise Missing("a node needs root: it runs containers and makes network namespaces",
                      hint="run it with sudo")
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise Missing(f"{program} is not installed", hint=f"apt-get install {package}")


def advertised(asked: str) -> str:
    """The address that the other nodes reach this one at: as asked, or that of the default route.

    Malformed for anything but an IPv4 address of this machine.
    """
    if not asked:
        return _default_address()
    try:
        socket.inet_pton(socket.AF_INET, asked)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind((asked, 0))
    except OSError as error:
        raise Malformed(f"--advertise {asked[:60]} is not an IPv4 address of this machine",
                        hint="ip -4 address shows them") from error
    return asked


def me(name: str, number: int, host: str) -> Peer:
    """This machine as a node: its ports and what it has to give."""
    return Peer(
        name=name, number=number, host=host, api_port=API_PORT, log_port=LOG_PORT,
        agent_port=AGENT_PORT, cpu_milli=(os.cpu_count() or 1) * 1000,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    )


def configure(place: Place, node: Peer, cluster: str, **more: object) -> NodeConfig:
    """Write the node's configuration: last of all, for it makes a node of the machine."""
    paths = daemon_paths(place.containerd)
    config = NodeConfig(
        name=node.name, tag=place.tag, data=str(place.folder), run=str(place.run), peers=(node,),
        cluster=cluster, containerd=str(paths.socket), runc_root=str(paths.runc_root),
        namespace=f"mill-{place.tag}", host_netns=str(place.run / "host.netns"),
        http_port=HTTP_PORT, https_port=HTTPS_PORT, ingress_host="0.0.0.0",  # noqa: S104  an ingress
        overlay="vxlan", **more,  # type: ignore[arg-type]  # fields of NodeConfig
    )
    write_private(place.config_path, msgspec.json.encode(config))
    return config


def found(
    place: Place, name: str, host: str, remember: Callable[[Founded], None]
) -> Founded:
    """Make this machine the first node of a new cluster. It serves once its agent runs.

    `remember` keeps the token, which nobody else has, before the machine is a node for good.
    """
    place.must_be_empty()
    authority = create_ca()
    cluster = f"mill-{secrets.token_hex(3)}"
    token = secrets.token_urlsafe(24)
    folder = place.folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    write_authority(folder / "founding", authority)
    write_identity(folder / "identity", issue(authority, name, identity_ips(host),
                                              names=("localhost",)))
    write_private(folder / "cluster.key", secrets.token_bytes(32))
    node = me(name, 1, host)
    founded = Founded(cluster, name, f"https://{node.api}", token, authority.cert_pem)
    remember(founded)
    configure(place, node, cluster, authority=str(folder / "founding"),
              token_id="init",  # noqa: S106  a name, not a password
              token_sha256=hashlib.sha256(token.encode()).hexdigest())
    return founded


def identity_ips(host: str) -> tuple[str, ...]:
    """The addresses that a node's certificate is good for."""
    return (host, "127.0.0.1")


@contextlib.contextmanager
def only_agent(place: Place) -> Iterator[None]:
    """One agent a folder: Conflict where another runs. Its pid is in the file."""
    with open(place.folder / "lock", "a+", opener=_private) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(f"an agent runs on {place.folder} already",
                           hint="one machine runs one; systemctl status mill") from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def agent_pid(place: Place) -> int | None:
    """The agent that runs on the folder, or None."""
    try:
        with open(place.folder / "lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = lock.read().strip()
                return int(text) if text.isdigit() else None
    except FileNotFoundError:
        return None
    return None


async def forget(place: Place, config: NodeConfig) -> None:
    """End and remove everything that the node made on this machine, its state too.

    Its agent must have ended before. May run again after a crash at any point: what names the node
    goes last.
    """
    await end_companions(config)
    purge_daemon(place.containerd)
    remove_cgroup(f"/mill-{config.tag}")
    await network.remove_node(config.layout)
    await network.sweep(config.tag)
    shutil.rmtree(config.run, ignore_errors=True)
    for entry in place.folder.iterdir():
        if entry != place.config_path:
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink()
    place.config_path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        place.folder.rmdir()


def _default_address() -> str:
    """The address from which this machine reaches others; connecting UDP sends nothing.

    Without a default route it is the machine's only address, where it has no more than one.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1, RFC 5737: only a route is looked up
            return str(probe.getsockname()[0])
    except OSError as error:
        found = _global_addresses()
        if len(found) == 1:
            return found[0]
        told = ", ".join(found) or "none"
        raise Malformed("this machine has no default route to tell its address from",
                        hint=f"name it with --advertise IP; it has {told}") from error


def _global_addresses() -> tuple[str, ...]:
    """This machine's IPv4 addresses that others may reach."""
    done = subprocess.run(["ip", "-4", "-o", "address", "show", "scope", "global"],
                          capture_output=True, text=True, check=False, timeout=LOOK_S)
    return tuple(sorted({line.split()[3].partition("/")[0] for line in done.stdout.splitlines()}))


def _private(path: str, flags: int) -> int:
    """An opener of files for root alone."""
    return os.open(path, flags, 0o600)
