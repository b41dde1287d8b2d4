"""What the state is made of. Times are milliseconds since the Unix epoch, from the log."""

from __future__ import annotations

from typing import Literal

import msgspec

NodeStatus = Literal["ready", "draining", "down"]
AllocStatus = Literal[
    "pending", "pulling", "starting", "running", "healthy", "stopping", "stopped", "failed", "lost"
]
Outcome = Literal[
    "running", "rolling_back", "deployed", "rolled_back", "rollback_failed", "cancelled"
]
Action = Literal["create", "update", "remove", "unchanged"]
OriginKind = Literal["git", "manual", "rollback", "scale", "restart"]
SourceStatus = Literal[
    "synced", "deploying", "failing", "unreachable", "waiting", "held", "suspended"
]

ENDED: frozenset[str] = frozenset({"stopped", "failed", "lost"})
"""Allocation states that hold no resources and never change again."""

FINISHED: frozenset[str] = frozenset({"deployed", "rolled_back", "rollback_failed", "cancelled"})
"""Deploy outcomes that are final."""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A machine with an agent. It owns the /24 `10.77.NUMBER.0/24`; addresses are host:port.

    `log` is where its log listens ("" for one that never takes part in it). `draining` is what was
    asked for and outlives its being down; `status` is what is. `key_sha256` is that of the public
    key with which it joined ("" for a founding node), so that its name is never given to another.
    """

    name: str
    number: int
    api: str
    agent: str
    cpu_milli: int
    memory_bytes: int
    voter: bool = True
    status: NodeStatus = "ready"
    since_ms: int = 0
    next_host: int = 2
    log: str = ""
    draining: bool = False
    key_sha256: str = ""


class Request(msgspec.Struct, frozen=True):
    """A request that was carried out: by which entry, when, and which version of a secret it
    made, if it was that."""

    index: int
    at_ms: int
    version: int = 0


class SecretVersion(msgspec.Struct, frozen=True):
    """One sealed value: AES-256-GCM with the cluster's key, the name as associated data."""

    version: int
    nonce: bytes
    sealed: bytes
    at_ms: int


class Secret(msgspec.Struct, frozen=True):
    """A secret's versions, oldest first; the last is what a new revision pins."""

    name: str
    versions: tuple[SecretVersion, ...]


class SecretPin(msgspec.Struct, frozen=True, order=True):
    """The version of a secret that a revision runs with."""

    name: str
    version: int


class Revision(msgspec.Struct, frozen=True, kw_only=True):
    """A service's spec as deployed. `generation` differs where a restart asked for new
    containers of the same spec."""

    number: int
    spec_hash: str
    digest: str
    secrets: tuple[SecretPin, ...] = ()
    generation: int = 0
    deploy: str = ""
    at_ms: int = 0


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """A service and its kept revisions, oldest first. `live` 0: none is committed yet."""

    name: str
    vip: str
    live: int = 0
    revisions: tuple[Revision, ...] = ()
    last_revision: int = 0
    owner: str = "manual"
    diverged: bool = False

    def revision(self, number: int) -> Revision | None:
        """The kept revision of that number."""
        return next((r for r in self.revisions if r.number == number), None)


class Allocation(msgspec.Struct, frozen=True, kw_only=True):
    """One placed instance. `live`: part of the committed set, so routes may point at it.

    `restarts` counts starts after the first; `reason` says why it failed or last restarted.
    """

    id: str
    service: str
    revision: int
    slot: int
    node: str
    address: str
    deploy: str
    image: str
    digest: str
    port: int | None
    cpu_milli: int
    memory_bytes: int
    status: AllocStatus = "pending"
    live: bool = False
    routed: bool = False
    attempt: int = 0
    replaces: str = ""
    scheduled_ms: int = 0
    started_ms: int = 0
    healthy_ms: int = 0
    ended_ms: int = 0
    restarts: int = 0
    exit_code: int | None = None
    reason: str = ""


class Slot(msgspec.Struct, frozen=True):
    """Where one replica goes; `keep` names the allocation that already stands there."""

    node: str
    keep: str = ""


class FieldChange(msgspec.Struct, frozen=True):
    """A field that differs, both sides as a person reads them (secrets by name only)."""

    field: str
    old: str
    new: str


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What a deploy does to one service. Revision numbers are 0 where there is none."""

    service: str
    action: Action
    spec_hash: str = ""
    digest: str = ""
    from_revision: int = 0
    to_revision: int = 0
    generation: int = 0
    secrets: tuple[SecretPin, ...] = ()
    strategy: str = ""
    slots: tuple[Slot, ...] = ()
    owner: str = "manual"
    diverged: bool = False


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Who asked for a deploy: a person's token, or a source's commit."""

    kind: OriginKind = "manual"
    source: str = ""
    commit: str = ""
    author: str = ""
    subject: str = ""
    token: str = ""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a deploy did not go through; `logs` are the last 20 lines of the allocation.

    `outside`: a node or a registry failed it, not the version, so it may be tried again.
    """

    reason: str
    service: str = ""
    alloc: str = ""
    node: str = ""
    logs: tuple[str, ...] = ()
    cancelled: bool = False
    outside: bool = False


class Deploy(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt to take the cluster from one set of revisions to another."""

    id: str
    changes: tuple[Change, ...]
    origin: Origin
    started_ms: int
    deadline_ms: int
    outcome: Outcome = "running"
    key: str = ""
    warnings: tuple[str, ...] = ()
    warned: int = 0
    committed: bool = False
    routed: bool = False
    pulls_begun: bool = False
    pulls_done: bool = False
    pulled: tuple[tuple[str, str], ...] = ()
    healthy: tuple[str, ...] = ()
    ended_ms: int = 0
    failure: Failure | None = None

    @property
    def finished(self) -> bool:
        """True once a terminal event is in the log."""
        return self.outcome in FINISHED

    def change(self, service: str) -> Change | None:
        """What this deploy does to `service`."""
        return next((c for c in self.changes if c.service == service), None)


class Source(msgspec.Struct, frozen=True, kw_only=True):
    """A git repository whose manifests the cluster follows, and how far it has come."""

    name: str
    url: str
    branch: str = "main"
    path: str = "/"
    poll_ms: int = 10_000
    secret_ref: str = ""
    services: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    status: SourceStatus = "waiting"
    reason: str = ""
    since_ms: int = 0
    head: str = ""
    applied: str = ""
    quarantined: tuple[str, ...] = ()


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """An API token, or (role `join`) one with which nodes join; only its SHA-256 is kept.

    services: what a `deploy` token may touch; () for all. uses, joined: how many nodes a join token
    is good for, and the SHA-256 of the public keys that used it. expires_ms: 0 for never.
    """

    id: str
    sha256: str
    role: Literal["admin", "deploy", "read", "join"] = "admin"
    at_ms: int = 0
    services: tuple[str, ...] = ()
    uses: int = 0
    joined: tuple[str, ...] = ()
    expires_ms: int = 0


class SealedAuthority(msgspec.Struct, frozen=True):
    """The cluster's CA: its certificate, and its key sealed with the cluster's key."""

    cert_pem: bytes
    nonce: bytes
    sealed: bytes
