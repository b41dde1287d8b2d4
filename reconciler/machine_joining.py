"""A machine joins: its certificate and number by a token, the cluster's key by that certificate.

What is half done is done again with the same key, so that a lost answer costs no use of the token.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reconciler.api.join_token import JoinToken, parse_join_token
from reconciler.api.joining_client import ask_to_join, fetch_ca
from reconciler.api.local_token import local_token
from reconciler.edge.certificates import (
    Identity,
    create_key_and_csr,
    csr_for,
    write_identity,
    write_private,
)
from reconciler.errors import MillError, Unavailable
from reconciler.executor.agent.authority import fetch_cluster_key
from reconciler.executor.containerd import network
from reconciler.executor.links import Credentials
from reconciler.executor.requests import JoinAnswer, JoinRequest
from reconciler.machine import API_PORT, Place, configure, identity_ips, me
from reconciler.node_config import LogMember

Say = Callable[[str], None]


@dataclass(frozen=True)
class Joined:
    """What the context of a machine that joined holds; its own address comes first."""

    cluster: str
    node: str
    number: int
    addresses: tuple[str, ...]
    token: str
    ca_pem: bytes


async def join(
    place: Place, address: str, token: str, name: str, host: str, say: Say,
    remember: Callable[[Joined], None],
) -> Joined:
    """Make this machine a node of the cluster at `address` (host or host:port).

    `remember` keeps what the node's context is made of, before the machine is a node for good.
    """
    parsed = parse_join_token(token)
    at = address if ":" in address else f"{address}:{API_PORT}"
    at = at.removeprefix("https://").rstrip("/")
    say(f"asking {at} ...")
    ca_pem = await fetch_ca(at, parsed.fingerprint)
    key_pem = _key(place, name, host)
    answer = await ask_to_join(at, ca_pem, _request(parsed, name, host, key_pem))
    identity = Identity(answer.certificate.encode(), key_pem, answer.ca.encode())
    cluster_key = await _cluster_key(answer, identity, name)
    say(f"{answer.cluster} knows this machine as {name}, number {answer.number}")
    write_identity(place.folder / "identity", identity)
    write_private(place.folder / "cluster.key", cluster_key)
    # What an earlier node on this machine left would carry another number.
    await network.sweep(place.tag)
    node = me(name, answer.number, host)
    others = tuple(f"https://{n.api}" for n in answer.nodes if n.name != name)
    joined = Joined(answer.cluster, name, answer.number, (f"https://{node.api}", *others),
                    local_token(cluster_key), identity.ca_pem)
    remember(joined)
    configure(place, node, answer.cluster, members=tuple(
        LogMember(m.name, m.host, m.port) for m in answer.members if m.name != name))
    (place.folder / "joining.key").unlink(missing_ok=True)
    return joined


def _key(place: Place, name: str, host: str) -> bytes:
    """This machine's private key, the same in every attempt."""
    path: Path = place.folder / "joining.key"
    if not path.exists():
        key_pem, _ = create_key_and_csr(name, identity_ips(host))
        write_private(path, key_pem)
    return path.read_bytes()


def _request(token: JoinToken, name: str, host: str, key_pem: bytes) -> JoinRequest:
    node = me(name, 1, host)
    return JoinRequest(
        token=token.secret, id=token.id, name=name,
        csr=csr_for(key_pem, name, identity_ips(host)).decode(),
        api=node.api, agent=node.agent, log=node.log, cpu_milli=node.cpu_milli,
        memory_bytes=node.memory_bytes,
    )


async def _cluster_key(answer: JoinAnswer, identity: Identity, name: str) -> bytes:
    """The cluster's key, from whichever node gives it first: one that is down is asked in vain for
    half a minute. It crosses mutual TLS alone."""
    credentials = Credentials(identity.ca_pem, identity.cert_pem, identity.key_pem)
    last: MillError = Unavailable("no node of the cluster gave its key",
                                  hint="is port 4402 of its nodes reachable from here?")
    asked = [asyncio.ensure_future(fetch_cluster_key(node.agent, node.name, credentials))
             for node in answer.nodes if node.name != name]
    try:
        for first in asyncio.as_completed(asked):
            try:
                return await first
            except MillError as error:
                last = error
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    raise last
