"""What may enter the log. Each command carries its decision whole: ids, times, choices.

A command is written by its number, which is never used again for anything else; an entry with
an unknown number is refused by `apply`, never guessed.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from reconciler.fsm.records import (
    AllocStatus,
    Change,
    Failure,
    NodeStatus,
    Origin,
    SealedAuthority,
    Source,
    SourceStatus,
    Token,
)


class Command(msgspec.Struct, frozen=True, tag_field="c", omit_defaults=True, kw_only=True):
    """The base of all commands; `c` is the number.

    request: who asked for what, and that caller's own name for it ("" for none). What was applied
    under it is not applied again, whoever leads by then.
    """

    request: str = ""


class InitCluster(Command, frozen=True, tag=1):
    """The cluster begins: its id, and the first admin token's SHA-256."""

    cluster: str
    token_id: str
    token_sha256: str


class RegisterNode(Command, frozen=True, tag=2, kw_only=True):
    """A node joins or tells its addresses and capacity anew."""

    name: str
    number: int
    api: str
    agent: str
    cpu_milli: int
    memory_bytes: int
    voter: bool = True
    log: str = ""


class SetNodeStatus(Command, frozen=True, tag=3):
    """The leader has seen a node go or come back."""

    name: str
    status: NodeStatus
    reason: str = ""


class SetSecret(Command, frozen=True, tag=4):
    """A new version of a secret, sealed with the cluster's key."""

    name: str
    nonce: bytes
    sealed: bytes


class DeleteSecret(Command, frozen=True, tag=5):
    """Refused while a live or kept revision needs the secret."""

    name: str


class StoreSpec(Command, frozen=True, tag=6):
    """A piece of a spec's canonical encoding; kept once all `parts` are there."""

    spec_hash: str
    part: int
    parts: int
    data: bytes


class StartDeploy(Command, frozen=True, tag=7, kw_only=True):
    """A deploy is admitted. Refused while another runs, or where a `from_revision` moved on."""

    changes: tuple[Change, ...]
    origin: Origin
    budget_ms: int
    key: str = ""
    warnings: tuple[str, ...] = ()


class BeginPulls(Command, frozen=True, tag=8):
    """The deploy's images are being fetched."""

    deploy: str


class ScheduleAlloc(Command, frozen=True, tag=9, kw_only=True):
    """One allocation is placed: for a deploy's slot, or (deploy "") to heal a live service.

    `revision` is the one that healing looked at: refused where a commit has come since, which may
    have taken the slot away. Without a deploy, `replaces` names an allocation that stays in the
    same slot until a RetireAlloc: its node is draining.
    """

    alloc: str
    service: str
    node: str
    slot: int
    deploy: str = ""
    attempt: int = 0
    replaces: str = ""
    revision: int = 0


class RecordPull(Command, frozen=True, tag=10):
    """An image stands on a node."""

    deploy: str
    image: str
    node: str
    cached: bool


class FinishPulls(Command, frozen=True, tag=11):
    """All images of the deploy stand where they are needed."""

    deploy: str


class SetAllocStatus(Command, frozen=True, tag=12, kw_only=True):
    """An allocation moved on. Refused where the state it assumes (`was`) no longer holds."""

    alloc: str
    status: AllocStatus
    was: AllocStatus
    elapsed_ms: int = 0
    reason: str = ""
    exit_code: int | None = None
    restarts: int | None = None


class PassService(Command, frozen=True, tag=13):
    """The service's last replica of this deploy is healthy."""

    deploy: str
    service: str
    elapsed_ms: int


class CommitDeploy(Command, frozen=True, tag=14):
    """The flip: revisions, internal DNS and routes, in one entry."""

    deploy: str


class RouteDeploy(Command, frozen=True, tag=15):
    """Every live edge has confirmed the commit, or was given up with a warning."""

    deploy: str


class FinishDeploy(Command, frozen=True, tag=16):
    """Terminal for a deploy that was committed and routed."""

    deploy: str


class RollBackDeploy(Command, frozen=True, tag=17):
    """The deploy failed or was cancelled before its commit; its new allocations stop."""

    deploy: str
    failure: Failure


class EndRollback(Command, frozen=True, tag=18):
    """Terminal for a deploy that was rolled back; `outcome` says how well."""

    deploy: str
    outcome: Literal["rolled_back", "rollback_failed", "cancelled"]


class WarnDeploy(Command, frozen=True, tag=19):
    """A warning in a deploy's stream."""

    deploy: str
    message: str


class PutSource(Command, frozen=True, tag=20):
    """A source is added (refused where the name is taken)."""

    source: Source


class ObserveSource(Command, frozen=True, tag=21, kw_only=True):
    """What the leader found when it looked at a source."""

    name: str
    status: SourceStatus
    reason: str = ""
    head: str = ""
    applied: str = ""
    quarantine: str = ""


class RemoveSource(Command, frozen=True, tag=22):
    """The source is followed no more; its services become manual."""

    name: str


class Trim(Command, frozen=True, tag=23):
    """Forget ended allocations, finished deploys and events from before `before_ms`."""

    before_ms: int


class RestoreState(Command, frozen=True, tag=24):
    """A piece of a backup's contents, secrets sealed with this cluster's key; the last of all
    `parts` takes them over. Refused unless the cluster is empty."""

    sha256: str
    part: int
    parts: int
    data: bytes


class JoinNode(Command, frozen=True, tag=25, kw_only=True):
    """A new node, by a join token: refused where that is none, spent, over or revoked, or where
    the name is another key's. The same key again, for the same name, is the same join: nothing is
    spent. The node gets the smallest free number, and is down until it is heard.

    `token`: its id; that the secret is known was checked by who proposes this.
    `key_sha256`: hex SHA-256 of its public key (DER, SubjectPublicKeyInfo).
    """

    token: str
    key_sha256: str
    name: str
    api: str
    agent: str
    log: str
    cpu_milli: int
    memory_bytes: int


class RemoveNode(Command, frozen=True, tag=26):
    """The node is forgotten. Refused while it has allocations, or is the last."""

    name: str


class DrainNode(Command, frozen=True, tag=27):
    """Nothing new is placed on the node, and what is there moves away."""

    name: str


class UndrainNode(Command, frozen=True, tag=28):
    """The node takes allocations again."""

    name: str


class CreateToken(Command, frozen=True, tag=29):
    """A token is good from now on. Refused where its id is taken."""

    token: Token


class RevokeToken(Command, frozen=True, tag=30):
    """The token is good no more. Refused for the last admin token that does not expire."""

    id: str


class SetAuthority(Command, frozen=True, tag=31):
    """The CA that signs what joins. Refused where there is one already."""

    authority: SealedAuthority


class RetireAlloc(Command, frozen=True, tag=32):
    """One of two live allocations in a slot stops, as `successor` fills it. Refused unless that one
    is healthy (or neither is), and where the running deploy keeps `alloc`; `was` as elsewhere."""

    alloc: str
    successor: str
    was: AllocStatus


AnyCommand = (
    InitCluster | RegisterNode | SetNodeStatus | SetSecret | DeleteSecret | StoreSpec
    | StartDeploy | BeginPulls | ScheduleAlloc | RecordPull | FinishPulls | SetAllocStatus
    | PassService | CommitDeploy | RouteDeploy | FinishDeploy | RollBackDeploy | EndRollback
    | WarnDeploy | PutSource | ObserveSource | RemoveSource | Trim
    | RestoreState | JoinNode | RemoveNode | DrainNode | UndrainNode | CreateToken | RevokeToken
    | SetAuthority | RetireAlloc
)
