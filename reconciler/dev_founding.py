"""The founding of a `mill dev` cluster: what its data folder holds before the first start.

A CA, a certificate for each node, the key of the cluster's secrets, the first token; and each
node's own configuration, written anew at every start, because ports may have changed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec

from reconciler.edge.certificates import (
    create_ca,
    issue,
    write_authority,
    write_identity,
    write_private,
)
from reconciler.errors import Conflict
from reconciler.executor.containerd.daemon import daemon_paths
from reconciler.node_config import NodeConfig, Peer

HOST = "127.0.0.1"
STEP = 10
"""Node i has base + 10·i (contracts: Ports)."""


def tag_of(data: Path) -> str:
    """The mark of a data folder on everything it makes: 8 hex digits of its path's hash."""
    return hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:8]


@dataclass(frozen=True)
class Options:
    """What `mill dev` was asked for. `cpu_milli` and `memory_bytes` 0: the host's own."""

    nodes: int = 3
    data: Path = Path(".mill-dev")
    base_port: int = 4400
    cpu_milli: int = 0
    memory_bytes: int = 0
    dns_upstreams: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The data folder, absolute."""
        return self.data.resolve()

    @property
    def tag(self) -> str:
        """What marks everything of this folder."""
        return tag_of(self.data)

    @property
    def run_folder(self) -> Path:
        """Sockets and the kept namespace: short paths, gone after a reboot."""
        return Path("/run") / f"mill-{self.tag}"

    @property
    def names(self) -> list[str]:
        """node-1 … node-N."""
        return [f"node-{number}" for number in range(1, self.nodes + 1)]

    def peer(self, number: int) -> Peer:
        """A node's ports and capacity."""
        base = self.base_port + STEP * (number - 1)
        return Peer(
            name=f"node-{number}", number=number, host=HOST, api_port=base, log_port=base + 1,
            agent_port=base + 2,
            cpu_milli=self.cpu_milli or (os.cpu_count() or 1) * 1000,
            memory_bytes=self.memory_bytes or _host_memory_bytes(),
        )


class Founding(msgspec.Struct, frozen=True):
    """What makes the cluster of a data folder, in `dev.json` (0600)."""

    cluster: str
    token: str
    nodes: int


def prepare(options: Options) -> Founding:
    """The folder's cluster, founded where there is none, with today's ports."""
    options.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    options.run_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = options.folder / "dev.json"
    if path.exists():
        founding = msgspec.json.decode(path.read_bytes(), type=Founding)
        if founding.nodes != options.nodes:
            raise Conflict(
                f"{options.data} holds a cluster of {founding.nodes} nodes",
                hint=f"start it with --nodes {founding.nodes}, or forget it with: "
                     f"mill dev --reset --data {options.data}")
    else:
        founding = _found(options, path)
    _write_configs(options, founding)
    return founding


def _found(options: Options, path: Path) -> Founding:
    founding = Founding(cluster=f"dev-{options.tag}", token=secrets.token_urlsafe(24),
                        nodes=options.nodes)
    authority = create_ca()
    write_authority(options.folder / "ca", authority)
    key = secrets.token_bytes(32)
    for name in options.names:
        folder = options.folder / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_identity(folder / "identity", issue(authority, name, (HOST,)))
        write_private(folder / "cluster.key", key)
    # Last: a folder without it is founded anew.
    write_private(path, msgspec.json.encode(founding))
    return founding


def _write_configs(options: Options, founding: Founding) -> None:
    peers = tuple(options.peer(number) for number in range(1, options.nodes + 1))
    paths = daemon_paths(options.folder / "containerd")
    for peer in peers:
        base = peer.api_port
        run = options.run_folder / str(peer.number)
        config = NodeConfig(
            name=peer.name, tag=options.tag, data=str(options.folder / peer.name), run=str(run),
            peers=peers, cluster=founding.cluster,
            token_id="dev",  # noqa: S106  a name, not a password
            token_sha256=hashlib.sha256(founding.token.encode()).hexdigest(),
            containerd=str(paths.socket), runc_root=str(paths.runc_root),
            namespace=f"mill-{options.tag}-{peer.number}",
            host_netns=str(options.run_folder / "host.netns"), dns_port=base + 3,
            http_port=base + 4, https_port=base + 5, ingress_host=HOST,
            authority=str(options.folder / "ca"), dns_upstreams=options.dns_upstreams,
        )
        run.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(options.folder / peer.name / "node.json", msgspec.json.encode(config))


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
