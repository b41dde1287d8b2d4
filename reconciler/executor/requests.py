"""What a person, a token, a source or a machine may ask of the executor, and what it answers."""

from __future__ import annotations

from typing import Literal

import msgspec

from reconciler.errors import MillError
from reconciler.fsm.records import Origin
from reconciler.language.spec import Strategy

DEFAULT_PULL_BUDGET_MS = 300_000
"""The time for pulls where a deploy names none (contracts: `--timeout 5m`)."""


class DeployRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest to bring about. `strategy` "" leaves each service's own.

    `owner` is "manual" or the source; with `prune` the owner's services that the manifest does
    not name are removed. `key` is the caller's Idempotency-Key.
    """

    files: dict[str, bytes]
    variables: dict[str, str] = {}
    prune: bool = False
    strategy: Strategy | None = None
    pull_budget_ms: int = DEFAULT_PULL_BUDGET_MS
    owner: str = "manual"
    origin: Origin = Origin()
    key: str = ""


class DrainStep(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a drain has come to; the stream ends after the one `done` or `failed`.

    `draining`: it is in the log, `left` allocations are to move. `leader`: the leadership went to
    `node`. `moving`: the allocation's replacement starts on `node`. `moved`: the replacement (on
    `node`) serves, `alloc` has ended, `left` are still there. `warning`: `reason`, and it goes on.
    `done`: the node is empty. `failed`: it is not (`left`), and `reason` says why; it stays
    draining. elapsed: seconds since the drain began.
    """

    phase: Literal["draining", "leader", "moving", "moved", "warning", "done", "failed"]
    service: str = ""
    alloc: str = ""
    node: str = ""
    reason: str = ""
    left: int = -1
    elapsed: float = -1.0


class JoinRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/join`: a machine with the secret (`token`) of the join token `id` wants a
    certificate. api, agent, log: host:port at which the others reach it. csr: PEM (PKCS #10)."""

    token: str
    id: str
    name: str
    csr: str
    api: str
    agent: str
    log: str
    cpu_milli: int
    memory_bytes: int

    def __repr__(self) -> str:
        return f"JoinRequest(id={self.id!r}, name={self.name!r}, token=***)"


class JoinedNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node of the cluster, as a new one needs to know it: addresses are host:port."""

    name: str
    number: int
    api: str
    agent: str
    log: str


class JoinedMember(msgspec.Struct, frozen=True, kw_only=True):
    """A member of the log."""

    name: str
    host: str
    port: int
    voter: bool


class JoinAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine gets that joined: its number, its certificate, whom to trust and to dial."""

    cluster: str
    number: int
    certificate: str
    ca: str
    nodes: tuple[JoinedNode, ...]
    members: tuple[JoinedMember, ...]


class UnknownJoinToken(MillError):
    """No such join token, or another secret: it was revoked, or mistyped. 401."""

    status = 401


class JoinTokenOver(MillError):
    """The join token was one, but is expired or spent: 403."""

    status = 403
