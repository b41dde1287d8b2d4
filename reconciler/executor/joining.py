"""A machine joins: its token is counted in the log, then its certificate is signed.

In that order: a certificate without a record would be a stranger's. A lost answer is asked for
again with the same key, and is the same join.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Callable
from typing import Protocol

import structlog

from reconciler.errors import Unprocessable
from reconciler.executor.authority import ClusterAuthority, Signer, host_of
from reconciler.executor.ledger import CommandRefused, Ledger
from reconciler.executor.requests import (
    JoinAnswer,
    JoinedMember,
    JoinedNode,
    JoinRequest,
    JoinTokenOver,
    UnknownJoinToken,
)
from reconciler.fsm.commands import CreateToken, JoinNode
from reconciler.fsm.records import Node, Token
from reconciler.fsm.state import State

log = structlog.get_logger("mill.joining")

JOIN_TOKEN_MS = 3_600_000
"""A join token is good for an hour (the issue: the door)."""
MAX_CPU_MILLI = 1_000_000
MAX_MEMORY_BYTES = 1 << 46
_HINT = "make one with: mill token create --join"


class LogMember(Protocol):
    """A member of the log: `reconciler.log.settings.Member`."""

    @property
    def name(self) -> str:
        """The node's."""
        ...

    @property
    def host(self) -> str:
        """Where its log listens."""
        ...

    @property
    def port(self) -> int:
        """Likewise."""
        ...


Members = Callable[[], tuple[tuple[LogMember, bool], ...]]
"""The members of the log as they are now, and whether each votes."""


class Joining:
    """Lets machines in. `join` on the leader alone."""

    def __init__(
        self, ledger: Ledger, authority: ClusterAuthority, signer: Signer, members: Members,
        ca_pem: bytes,
    ) -> None:
        self._ledger = ledger
        self._authority = authority
        self._signer = signer
        self._members = members
        self.ca_pem = ca_pem

    async def join(self, request: JoinRequest) -> JoinAnswer:
        """UnknownJoinToken, JoinTokenOver; Conflict where the name is another's; Unprocessable
        where the request cannot be taken. Nothing is spent by a refusal."""
        state = await self._ledger.read()
        csr_pem = request.csr.encode()
        # The token first: whoever has none learns nothing about names and addresses.
        _check_secret(state, request)
        key_sha256 = self._signer.key_of(csr_pem)
        check_request(request)
        self._check_open(state, request, key_sha256)
        # Signed once before anything is spent, so that a request for another name costs no use.
        self._authority.certify(_wanted(request), csr_pem)
        try:
            await self._ledger.propose(JoinNode(
                token=request.id, key_sha256=key_sha256, name=request.name, api=request.api,
                agent=request.agent, log=request.log, cpu_milli=request.cpu_milli,
                memory_bytes=request.memory_bytes))
        except CommandRefused:
            # The last use may have gone to another machine since.
            self._check_open(self._ledger.state, request, key_sha256)
            raise
        state = self._ledger.state
        node = state.nodes[request.name]
        certificate = self._authority.certify(node, csr_pem)
        log.info("node_joined", node=node.name, number=node.number, token=request.id)
        return JoinAnswer(
            cluster=state.cluster, number=node.number, certificate=certificate.decode(),
            ca=self.ca_pem.decode(), nodes=_nodes(state), members=_told(self._members()))


    def _check_open(self, state: State, request: JoinRequest, key_sha256: str) -> None:
        """JoinTokenOver where the token is expired, or spent by others."""
        token = state.tokens.get(request.id)
        if token is None:
            raise UnknownJoinToken("the join token was revoked", hint=_HINT)
        if token.expires_ms <= self._ledger.clock.wall_ms():
            raise JoinTokenOver("the join token has expired: one is good for an hour", hint=_HINT)
        again = request.name in state.nodes and key_sha256 in token.joined
        if len(token.joined) >= token.uses and not again:
            raise JoinTokenOver(
                f"the join token is spent: {len(token.joined)} of {token.uses} uses",
                hint="make one for several machines with: mill token create --join --uses N")


async def create_join_token(
    ledger: Ledger, uses: int = 1, lasts_ms: int = JOIN_TOKEN_MS
) -> tuple[str, str]:
    """A new join token in the log, which keeps its secret's SHA-256 alone: (id, secret)."""
    token_id, secret = f"join-{secrets.token_hex(4)}", secrets.token_urlsafe(32)
    await ledger.propose(CreateToken(Token(
        id=token_id, sha256=_digest(secret), role="join", uses=uses,
        expires_ms=ledger.clock.wall_ms() + lasts_ms)))
    return token_id, secret


def check_request(request: JoinRequest) -> None:
    """Unprocessable where a node cannot be reached, or weighed, as the request says."""
    if request.name == "localhost":
        raise Unprocessable("a node cannot be called localhost", hint="give another with --name")
    hosts = {_checked_host(what, address) for what, address in (
        ("api", request.api), ("agent", request.agent), ("log", request.log))}
    if len(hosts) != 1:
        raise Unprocessable("a node has one address for its API, its agent and its log",
                            hint="name it with --advertise IP")
    if not 0 < request.cpu_milli <= MAX_CPU_MILLI:
        raise Unprocessable(f"{request.cpu_milli} is not a machine's CPU in thousandths of a core")
    if not 0 < request.memory_bytes <= MAX_MEMORY_BYTES:
        raise Unprocessable(f"{request.memory_bytes} is not a machine's memory in bytes")


def _checked_host(what: str, address: str) -> str:
    host, port = host_of(address), address.rpartition(":")[2]
    try:
        ip = ipaddress.ip_address(host)
        usable = not (ip.is_unspecified or ip.is_multicast)
    except ValueError:
        usable = False
    if not usable or not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65_536):
        raise Unprocessable(f"{what}: {address[:80]!r} is no IP:PORT that other nodes can dial",
                            hint="name this machine's address with --advertise IP")
    return host


def _check_secret(state: State, request: JoinRequest) -> None:
    """One answer for unknown, revoked and wrong."""
    token = state.tokens.get(request.id)
    kept = token.sha256 if token is not None and token.role == "join" else "0" * 64
    # Compared even where there is none, so that time does not tell which ids exist.
    if not hmac.compare_digest(kept, _digest(request.token)) or token is None:
        raise UnknownJoinToken("there is no such join token: it was revoked, or never was",
                               hint=_HINT)


def _wanted(request: JoinRequest) -> Node:
    return Node(name=request.name, number=0, api=request.api, agent=request.agent,
                cpu_milli=request.cpu_milli, memory_bytes=request.memory_bytes)


def _nodes(state: State) -> tuple[JoinedNode, ...]:
    return tuple(
        JoinedNode(name=n.name, number=n.number, api=n.api, agent=n.agent, log=n.log)
        for n in sorted(state.nodes.values(), key=lambda node: node.number))


def _told(members: tuple[tuple[LogMember, bool], ...]) -> tuple[JoinedMember, ...]:
    return tuple(JoinedMember(name=m.name, host=m.host, port=m.port, voter=votes)
                 for m, votes in members)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
