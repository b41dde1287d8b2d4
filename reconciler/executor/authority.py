"""The cluster's CA, kept in the log: sealed with the cluster's key, opened to sign.

Every node has the cluster's key and may lead, so every node may have to sign; outside of a
leader's memory the CA's key exists sealed alone. How a certificate is made is the signer's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Protocol

import structlog

from reconciler.errors import MillError, Unavailable
from reconciler.executor.ledger import CommandRefused, Ledger
from reconciler.fsm.commands import SetAuthority
from reconciler.fsm.records import Node, SealedAuthority
from reconciler.fsm.seal import NONCE_BYTES, seal_file, unseal_file
from reconciler.fsm.state import State

log = structlog.get_logger("mill.authority")

ABOUT = b"mill authority 1\n"
"""Authenticated with the sealed key, before the certificate: neither can be put beside another."""


class Signer(Protocol):
    """Reads requests and makes certificates; all in PEM."""

    def key_of(self, csr_pem: bytes) -> str:
        """Hex SHA-256 of the request's public key; refuses (422) what is no genuine request."""
        ...

    def sign(
        self, ca_pem: bytes, ca_key_pem: bytes, csr_pem: bytes, name: str, ips: tuple[str, ...]
    ) -> bytes:
        """The certificate of `name` at `ips`; refuses (422) a request for another name."""
        ...


class NoSuchNode(MillError):
    """Whoever asks has a certificate, and is no node of this cluster: 403."""

    status = 403


async def found_authority(
    ledger: Ledger, ca_pem: bytes, ca_key_pem: bytes, cluster_key: bytes,
    random: Callable[[int], bytes] = os.urandom,
) -> None:
    """Put the founders' CA in the log, where there is none yet. Leader only."""
    if ledger.state.authority is not None:
        return
    nonce = random(NONCE_BYTES)
    sealed = seal_file(cluster_key, nonce, ABOUT + ca_pem, ca_key_pem)
    with contextlib.suppress(CommandRefused):  # another was faster: then that is the cluster's
        await ledger.propose(SetAuthority(SealedAuthority(ca_pem, nonce, sealed)))


def open_authority(state: State, cluster_key: bytes) -> tuple[bytes, bytes]:
    """The CA's certificate and key, PEM. Unavailable before the founding has put it in the log."""
    kept = state.authority
    if kept is None:
        raise Unavailable("the cluster's authority is not in the log yet",
                          hint="the founding leader puts it there; try again in a moment")
    key_pem = unseal_file(cluster_key, kept.nonce, ABOUT + kept.cert_pem, kept.sealed)
    if key_pem is None:
        raise MillError("the cluster's authority does not open with this node's cluster key",
                        hint="is cluster.key of this node another cluster's?")
    return kept.cert_pem, key_pem


def host_of(address: str) -> str:
    """The host of host:port, without the brackets of IPv6."""
    return address.rpartition(":")[0].strip("[]")


class ClusterAuthority:
    """Signs for nodes of the state, and hands them the cluster's key (`Custody`)."""

    def __init__(self, ledger: Ledger, signer: Signer, cluster_key: bytes) -> None:
        self._ledger = ledger
        self._signer = signer
        self._cluster_key = cluster_key

    async def give_key(self, caller: str) -> bytes:
        """The cluster's key, for a node of the cluster."""
        await self._node(caller)
        log.info("cluster_key_given", node=caller)
        return self._cluster_key

    async def renew(self, caller: str, csr_pem: bytes) -> bytes:
        """A certificate for the new key of a node; on the leader alone."""
        if not self._ledger.is_leader:
            raise Unavailable(f"the leader signs: {self._ledger.leader or 'there is none now'}")
        node = await self._node(caller)
        certificate = self.certify(node, csr_pem)
        log.info("certificate_renewed", node=caller)
        return certificate

    def certify(self, node: Node, csr_pem: bytes) -> bytes:
        """Sign for a node of the state; its name and address are the state's, not the request's."""
        ca_pem, key_pem = open_authority(self._ledger.state, self._cluster_key)
        return self._signer.sign(ca_pem, key_pem, csr_pem, node.name, (host_of(node.agent),))

    async def _node(self, name: str) -> Node:
        """The caller's record. Read of the log, not of what was applied here by chance: a node may
        have joined, or been removed, a moment ago."""
        node = (await self._ledger.read()).nodes.get(name)
        if node is None:
            raise NoSuchNode(f"{name or 'the caller'} is no node of this cluster",
                             hint="a node that was removed joins again with a new token")
        return node
