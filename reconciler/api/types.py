"""Every body that goes over the wire, shared with the CLI. This is the contract as types.

`cpu` is in cores, `memory` in bytes, times are RFC 3339 UTC text or null, durations are seconds.
Every answer carries `index`, the log index it holds for, and `stale: true` where the node that
answered could not confirm it with a majority.
"""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from reconciler.fsm.records import (
    Action,
    AllocStatus,
    FieldChange,
    NodeStatus,
    OriginKind,
    Outcome,
    SourceStatus,
)


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What all answers have in common; `stale` is absent unless it is true."""

    index: int
    stale: bool | UnsetType = UNSET


class ManifestError(msgspec.Struct, frozen=True):
    """One mistake in a manifest; line and column count from 1."""

    file: str
    line: int
    column: int
    message: str
    hint: str = ""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """`application/problem+json` (RFC 9457). `errors` is there for manifests alone."""

    type: str
    title: str
    status: int
    detail: str
    hint: str = ""
    at: str | UnsetType = UNSET
    errors: tuple[ManifestError, ...] | UnsetType = UNSET


class Files(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The JSON body of plan and deploy: manifest texts by file name."""

    files: dict[str, str]


class Detached(Answer, frozen=True, kw_only=True):
    """A deploy that nobody waits for, and where its stream is."""

    id: str
    events: str


class Placement(msgspec.Struct, frozen=True):
    """Where one replica goes; `kept` where it stands there already."""

    node: str
    kept: bool


class ServicePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a deploy would do to one service; `image` is with its digest."""

    name: str
    action: Action
    changes: tuple[FieldChange, ...]
    strategy: str
    reason: str
    image: str
    placements: tuple[Placement, ...]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a deploy would do."""

    services: tuple[ServicePlan, ...]
    warnings: tuple[str, ...] = ()


class PlanAnswer(Answer, frozen=True, kw_only=True):
    """`POST /v1/plan`."""

    services: tuple[ServicePlan, ...]
    warnings: tuple[str, ...]


class DeployService(msgspec.Struct, frozen=True, rename={"from_": "from"}):
    """One service of a deploy; revisions are 0 where there is none."""

    name: str
    action: Action
    from_: int
    to: int


class DeployOrigin(msgspec.Struct, frozen=True, kw_only=True):
    """Who asked for a deploy."""

    kind: OriginKind
    source: str
    commit: str
    author: str
    subject: str
    token: str


class DeployRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A deploy as it is remembered. `elapsed` in seconds, so far where it runs."""

    id: str
    outcome: Outcome
    started_at: str
    elapsed: float
    reason: str
    services: tuple[DeployService, ...]
    origin: DeployOrigin


class DeployAnswer(DeployRecord, frozen=True, kw_only=True):
    """`GET /v1/deploys/{id}`."""

    index: int
    stale: bool | UnsetType = UNSET


class DeployList(Answer, frozen=True, kw_only=True):
    """`GET /v1/deploys`, newest first."""

    deploys: tuple[DeployRecord, ...]


class AllocationRow(msgspec.Struct, frozen=True, kw_only=True):
    """One placed instance. `address` is what other containers dial."""

    id: str
    node: str
    status: AllocStatus
    address: str
    cpu: float
    memory: int
    started_at: str | None
    restarts: int
    revision: int
    reason: str = ""


class Replicas(msgspec.Struct, frozen=True):
    """How many should run and how many pass their checks."""

    desired: int
    healthy: int


class ServiceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A service as it runs; `revision` 0 while its first deploy is under way."""

    name: str
    image: str
    digest: str
    revision: int
    replicas: Replicas
    owner: str
    diverged: bool
    allocations: tuple[AllocationRow, ...]


class RevisionRow(msgspec.Struct, frozen=True, kw_only=True):
    """A revision that can be gone back to."""

    number: int
    image: str
    digest: str
    deploy: str
    at: str | None


class ServiceAnswer(ServiceRow, frozen=True, kw_only=True):
    """`GET /v1/services/{name}`; `ended` are allocations that run no more but are remembered."""

    index: int
    stale: bool | UnsetType = UNSET
    revisions: tuple[RevisionRow, ...]
    ended: tuple[AllocationRow, ...]


class ServiceList(Answer, frozen=True, kw_only=True):
    """`GET /v1/services`, by name."""

    services: tuple[ServiceRow, ...]


class CpuUse(msgspec.Struct, frozen=True):
    """Cores: what the node has, and what is reserved of it."""

    total: float
    used: float


class MemoryUse(msgspec.Struct, frozen=True):
    """Bytes: what the node has, and what is reserved of it."""

    total: int
    used: int


class NodeRow(msgspec.Struct, frozen=True, kw_only=True):
    """A machine. `allocations` counts those that have not ended."""

    id: str
    name: str
    status: NodeStatus
    voter: bool
    leader: bool
    address: str
    cpu: CpuUse
    memory: MemoryUse
    allocations: int
    last_seen: str | None


class NodeList(Answer, frozen=True, kw_only=True):
    """`GET /v1/nodes`, by name. `warnings` name the nodes whose log is closed, and the disk."""

    nodes: tuple[NodeRow, ...]
    warnings: tuple[str, ...] | UnsetType = UNSET


class NodeAnswer(NodeRow, frozen=True, kw_only=True):
    """One node."""

    index: int
    stale: bool | UnsetType = UNSET


class TokenBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/tokens`: a role, or `join` with how many machines may use it (null: 1).

    `services`: what a deploy token is bound to. `expires`: a duration such as `1h`; "" is never,
    for join tokens an hour.
    """

    role: Literal["admin", "deploy", "read"] | None = None
    services: tuple[str, ...] = ()
    join: bool = False
    uses: int | None = None
    expires: str = ""


class TokenMade(Answer, frozen=True, kw_only=True):
    """The one answer with a token's text. `uses`: of join tokens alone."""

    id: str
    token: str
    role: Literal["admin", "deploy", "read", "join"]
    services: tuple[str, ...]
    uses: int | UnsetType = UNSET
    expires_at: str | None = None

    def __repr__(self) -> str:
        return f"TokenMade(id={self.id!r}, token=***)"


class TokenRow(msgspec.Struct, frozen=True, kw_only=True):
    """A token that is good, or was until it expired. `uses` and `used`: of join tokens."""

    id: str
    role: Literal["admin", "deploy", "read", "join"]
    services: tuple[str, ...]
    created_at: str | None
    uses: int
    used: int
    expires_at: str | None


class TokenList(Answer, frozen=True, kw_only=True):
    """`GET /v1/tokens`, oldest first."""

    tokens: tuple[TokenRow, ...]


class SourceBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`POST /v1/sources`. `poll` is a duration such as `10s`."""

    name: str
    url: str
    branch: str = "main"
    path: str = "/"
    poll: str = "10s"
    secret_ref: str = ""
    services: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    variables: dict[str, str] = {}


class SourceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A source, and how far the cluster has come with it. Commits are full."""

    name: str
    url: str
    branch: str
    path: str
    poll: str
    secret_ref: str
    services: tuple[str, ...]
    hosts: tuple[str, ...]
    variables: dict[str, str]
    status: SourceStatus
    reason: str
    since: str | None
    head: str
    applied: str
    next_poll: str | None


class SourceAnswer(SourceRow, frozen=True, kw_only=True):
    """One source."""

    index: int
    stale: bool | UnsetType = UNSET


class SourceList(Answer, frozen=True, kw_only=True):
    """`GET /v1/sources`, by name."""

    sources: tuple[SourceRow, ...]


class StatusAnswer(Answer, frozen=True, kw_only=True):
    """`GET /v1/status`: the cluster at a glance. `deploy` is the one that runs now.

    With `?at=INDEX` it is the cluster as it was, `at` the logged time of that index; what the
    log does not tell (leader, term, heartbeats, polls) is null or 0 then.
    """

    at: str | UnsetType = UNSET
    cluster: str
    node: str
    leader: str | None
    term: int
    nodes: tuple[NodeRow, ...]
    services: tuple[ServiceRow, ...]
    sources: tuple[SourceRow, ...]
    deploy: DeployRecord | None
    warnings: tuple[str, ...]


class SecretBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`PUT /v1/secrets/{name}`."""

    value: str

    def __repr__(self) -> str:
        return "SecretBody(value=***)"


class SecretName(msgspec.Struct, frozen=True):
    """A row of the list: the name alone."""

    name: str


class SecretList(Answer, frozen=True, kw_only=True):
    """`GET /v1/secrets`, by name."""

    secrets: tuple[SecretName, ...]


class SecretSet(Answer, frozen=True, kw_only=True):
    """A secret was stored."""

    name: str
    version: int


class SecretAnswer(Answer, frozen=True, kw_only=True):
    """`GET /v1/secrets/{name}`, in clear."""

    name: str
    value: str
    version: int

    def __repr__(self) -> str:
        return f"SecretAnswer(name={self.name!r}, value=***)"


class Removed(Answer, frozen=True, kw_only=True):
    """The named thing is gone."""

    name: str


class RollbackBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST …/rollback`; null is the revision before the live one."""

    to: int | None = None


class ScaleBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST …/scale`."""

    replicas: int


class Restored(Answer, frozen=True, kw_only=True):
    """`POST /v1/restore`: names of what was taken over, from which cluster and when."""

    cluster: str
    backup_index: int
    taken_at: str
    services: tuple[str, ...]
    secrets: tuple[str, ...]
    sources: tuple[str, ...]


class EventRow(msgspec.Struct, frozen=True, kw_only=True):
    """A fact: `data` is what the deploy's stream shows of it."""

    index: int
    at: str
    event: Literal["progress", "done", "failed"]
    deploy: str
    data: dict[str, object]


class EventList(Answer, frozen=True, kw_only=True):
    """`GET /v1/events`, oldest first."""

    events: tuple[EventRow, ...]


class LogRow(msgspec.Struct, frozen=True):
    """One line of a container, as `GET /v1/logs/{name}` streams it; `stream` `mill` is a remark
    of the cluster's own, such as a node that cannot be asked."""

    ts: str
    alloc: str
    stream: str
    line: str


class Health(msgspec.Struct, frozen=True):
    """`GET /healthz`: the process lives."""

    status: str
    node: str


class Ready(msgspec.Struct, frozen=True):
    """`GET /readyz`: it can serve, and this is who leads."""

    status: str
    node: str
    leader: str
