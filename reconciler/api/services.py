"""What the API needs of the rest of the node, as one value of narrow interfaces.

Methods that change something are called on the leader alone: everywhere else the request is
forwarded first. They raise MillError kinds, whose `status` becomes the answer's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec

from reconciler.clock import Clock
from reconciler.executor.history import History
from reconciler.executor.ledger import Ledger
from reconciler.executor.requests import DeployRequest, DrainStep, JoinAnswer, JoinRequest
from reconciler.fsm.events import Pulling
from reconciler.fsm.records import Allocation, Source


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks for a deploy, and under which Idempotency-Key ("" for none)."""

    token: str = ""
    key: str = ""


class Deploys(Protocol):
    """The executor's front: admits, starts and cancels deploys. Ids are `d-INDEX`."""

    async def plan(self, request: DeployRequest) -> msgspec.Struct:
        """What `start` would do, with the fields of `types.Plan`; refuses what `start` would."""
        ...

    async def start(self, request: DeployRequest) -> str:
        """The deploy's id once StartDeploy is in the log; the same id for a repeated key."""
        ...

    async def cancel(self, deploy_id: str) -> None:
        """Ask the running deploy to roll back; Conflict once it is committed."""
        ...

    async def scale(self, name: str, replicas: int, ask: Ask) -> str:
        """A deploy of the live spec with other replicas."""
        ...

    async def restart(self, name: str, ask: Ask) -> str:
        """A deploy of the live spec in new containers, with the newest secrets."""
        ...

    async def rollback(self, name: str, to: int | None, ask: Ask) -> str:
        """A deploy of an earlier revision; None is the one before the live one."""
        ...

    def progress(self, deploy_id: str) -> AsyncIterator[Pulling]:
        """Pull progress in bytes while the deploy pulls here; may drop, may end at any time."""
        ...


class LogLine(msgspec.Struct, frozen=True):
    """One line of a container. `ts` is RFC 3339 UTC, as it is sent."""

    ts: str
    alloc: str
    stream: str
    line: str


class Logs(Protocol):
    """Reads what containers wrote, wherever they run."""

    def follow(self, alloc: Allocation, tail: int, follow: bool) -> AsyncIterator[LogLine]:
        """The last `tail` lines, oldest first, then with `follow` each new one until it ends."""
        ...


class Sources(Protocol):
    """The git loop's front."""

    async def add(self, source: Source) -> None:
        """Put the source in the log; CommandRefused where the name is taken."""
        ...

    async def sync(self, name: str, allow_empty: bool, retry: bool) -> None:
        """Look now; `allow_empty` lets go of everything, `retry` lifts the quarantine."""
        ...

    async def remove(self, name: str, prune: bool) -> None:
        """Follow it no more; with `prune` its services go too."""
        ...

    def next_poll_ms(self, name: str) -> int | None:
        """When it is looked at next, in ms since the epoch; None where nobody knows."""
        ...


class NodesView(Protocol):
    """What the leader sees of the nodes beyond the log."""

    def last_seen(self, node: str) -> int | None:
        """Its last heartbeat, in ms since the epoch; None where it was never seen here."""
        ...

    def edge_error(self, node: str) -> str:
        """Why its edge does not take the routes; "" where all is well."""
        ...

    def log_error(self, node: str) -> str:
        """Why its log is closed, naming the disk's folder; "" where it is open."""
        ...

    def voter(self, node: str) -> bool:
        """Whether it is a voter of the log."""
        ...


class Nodes(Protocol):
    """Takes nodes out of service, back into it, and out of the cluster."""

    def drain(self, name: str, timeout_ms: int) -> AsyncIterator[DrainStep]:
        """Drain it, and tell how that goes until `done` or `failed`.

        NotFound and Conflict are raised before the first step; DrainNode is in the log before it.
        Who stops listening does not stop the drain.
        """
        ...

    async def undrain(self, name: str) -> None:
        """It takes allocations again; NotFound, or Conflict where it was not draining."""
        ...

    async def remove(self, name: str) -> None:
        """Out of the log's members and of the state; Conflict names what holds it."""
        ...


class Joining(Protocol):
    """Lets machines in."""

    @property
    def ca_pem(self) -> bytes:
        """The cluster's CA certificate."""
        ...

    async def join(self, request: JoinRequest) -> JoinAnswer:
        """UnknownJoinToken, JoinTokenOver; Conflict where the name is another's; Unprocessable
        where the CSR or an address cannot be taken. On the leader alone."""
        ...


@dataclass(frozen=True)
class Backend:
    """Everything an API server is handed. `node` is this node's name.

    ca: PEM with which other nodes' APIs are verified; None where all of them are on loopback.
    """

    node: str
    ledger: Ledger
    history: History
    deploys: Deploys
    logs: Logs
    sources: Sources
    health: NodesView
    cluster_key: bytes
    clock: Clock
    random_bytes: Callable[[int], bytes]
    nodes: Nodes | None = None
    joining: Joining | None = None
    ca: bytes | None = None
