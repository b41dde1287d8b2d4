"""The cluster as it is: status, services, nodes. Records to rows, and the calls that show them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace
from starlette.responses import Response

from reconciler.api import replies
from reconciler.api.calls import MAX_INDEX, Asked, Call, Query
from reconciler.api.deploys import record
from reconciler.api.services import Backend
from reconciler.api.sources import source_row
from reconciler.api.types import (
    AllocationRow,
    CpuUse,
    MemoryUse,
    NodeList,
    NodeRow,
    Replicas,
    RevisionRow,
    ServiceAnswer,
    ServiceList,
    ServiceRow,
    StatusAnswer,
)
from reconciler.errors import NotFound
from reconciler.fsm.records import ENDED, Allocation, Node, Revision, Service
from reconciler.fsm.state import State, sorted_by_id

MAX_ENDED = 100
"""Allocations that ended, shown with one service: enough to see how it fails."""


async def status(asked: Asked) -> Response:
    """The cluster at a glance, now or at an index that the log still holds."""
    state = await asked.confirmed()
    backend = asked.backend
    index = asked.integer("at", 0)
    if index:
        past = await backend.history.at(index)
        return replies.json(_past_status(past, backend, replies.stale(asked)))
    running = state.running_deploy()
    return replies.json(StatusAnswer(
        index=state.index, cluster=state.cluster, node=backend.node,
        leader=backend.ledger.leader, term=backend.ledger.term,
        nodes=node_rows(state, backend), services=service_rows(state),
        sources=tuple(
            source_row(state.sources[name], backend) for name in sorted(state.sources)
        ),
        deploy=record(running, backend.clock.wall_ms()) if running else None,
        warnings=(*log_warnings(state, backend), *warnings(state, backend.health.edge_error)),
        stale=replies.stale(asked),
    ))


async def list_services(asked: Asked) -> Response:
    """All services by name."""
    state = await asked.confirmed()
    return replies.json(ServiceList(
        index=state.index, services=service_rows(state), stale=replies.stale(asked)
    ))


async def show_service(asked: Asked) -> Response:
    """One service, with what it can go back to and what ended lately."""
    state = await asked.confirmed()
    name = asked.path("name")
    service = state.services.get(name)
    if service is None:
        raise NotFound(f"no service {name}", hint="list them with: mill services")
    allocations = _allocations_by_service(state)
    ended = [
        alloc for alloc in sorted_by_id(state.allocations)
        if alloc.service == name and alloc.status in ENDED
    ]
    ended.sort(key=_ended_ms, reverse=True)
    return replies.json(ServiceAnswer(
        **msgspec.structs.asdict(service_row(state, service, allocations.get(name, []))),
        index=state.index, stale=replies.stale(asked),
        revisions=tuple(_revision_row(state, revision) for revision in service.revisions),
        ended=tuple(allocation_row(alloc) for alloc in ended[:MAX_ENDED]),
    ))


async def list_nodes(asked: Asked) -> Response:
    """All nodes by name."""
    state = await asked.confirmed()
    return replies.json(NodeList(
        index=state.index, nodes=node_rows(state, asked.backend),
        warnings=tuple(log_warnings(state, asked.backend)) or UNSET, stale=replies.stale(asked),
    ))


def service_rows(state: State) -> tuple[ServiceRow, ...]:
    """A row a service, by name; one pass over the allocations, of which there may be thousands."""
    allocations = _allocations_by_service(state)
    return tuple(
        service_row(state, state.services[name], allocations.get(name, []))
        for name in sorted(state.services)
    )


def service_row(state: State, service: Service, allocations: list[Allocation]) -> ServiceRow:
    """A service as it runs; while its first deploy is under way, as that deploy wants it."""
    revision = service.revision(service.live)
    spec = state.live_spec(service.name)
    deploy = state.running_deploy()
    change = deploy.change(service.name) if deploy else None
    digest = revision.digest if revision else ""
    if spec is None and change is not None:
        spec, digest = state.specs.get(change.spec_hash), change.digest
    live = [alloc for alloc in allocations if alloc.live] if revision else allocations
    return ServiceRow(
        name=service.name, image=spec.image if spec else "", digest=digest,
        revision=service.live,
        replicas=Replicas(
            desired=spec.replicas if spec else 0,
            healthy=sum(alloc.status == "healthy" for alloc in live),
        ),
        owner=service.owner, diverged=service.diverged,
        allocations=tuple(allocation_row(alloc) for alloc in allocations),
    )


def allocation_row(alloc: Allocation) -> AllocationRow:
    """An allocation; its address carries the port that it serves on, where it has one."""
    return AllocationRow(
        id=alloc.id, node=alloc.node, status=alloc.status,
        address=f"{alloc.address}:{alloc.port}" if alloc.port is not None else alloc.address,
        cpu=alloc.cpu_milli / 1000, memory=alloc.memory_bytes,
        started_at=replies.rfc3339_or_none(alloc.started_ms),
        restarts=alloc.restarts, revision=alloc.revision, reason=alloc.reason,
    )


def node_rows(state: State, backend: Backend) -> tuple[NodeRow, ...]:
    """A row a node, by name."""
    used: dict[str, list[Allocation]] = {}
    for alloc in state.allocations.values():
        if alloc.status not in ENDED:
            used.setdefault(alloc.node, []).append(alloc)
    return tuple(
        _node_row(state.nodes[name], used.get(name, []), backend) for name in sorted(state.nodes)
    )


def node_row(state: State, name: str, backend: Backend) -> NodeRow:
    """One node, which is there."""
    return _node_row(state.nodes[name], list(state.of_node(name)), backend)


def log_warnings(state: State, backend: Backend) -> Iterable[str]:
    """Whose log is closed, and which disk has to be looked at. A node that has not been able to
    read its log knows of no nodes: then it speaks of itself."""
    for name in sorted({backend.node, *state.nodes}):
        error = backend.health.log_error(name)
        if error:
            yield f"{name}: its log is closed: {error}"


def warnings(state: State, edge_error: Callable[[str], str]) -> Iterable[str]:
    """What is off, in words for a person, in a fixed order. `edge_error`: of a node, or ""."""
    for name in sorted(state.nodes):
        node = state.nodes[name]
        if node.status == "down":
            yield f"{name} is down since {replies.rfc3339(node.since_ms)}"
        error = edge_error(name)
        if error:
            yield f"the edge of {name} does not take the routes: {error}"
    for row in service_rows(state):
        if row.diverged:
            yield f"{row.name} diverged from source {row.owner}"
        if row.revision and row.replicas.healthy < row.replicas.desired:
            yield f"{row.name}: {row.replicas.healthy} of {row.replicas.desired} replicas healthy"
    for name in sorted(state.sources):
        source = state.sources[name]
        if source.status in ("failing", "unreachable", "held"):
            since = replies.rfc3339(source.since_ms)
            yield f"source {name} is {source.status} since {since}: {source.reason}"


def _past_status(state: State, backend: Backend, stale: bool | UnsetType) -> StatusAnswer:
    """As the log tells it alone: nobody led it, beat or polled as they do now."""
    running = state.running_deploy()
    nodes = node_rows(state, backend)
    sources = (source_row(state.sources[name], backend) for name in sorted(state.sources))
    return StatusAnswer(
        index=state.index, cluster=state.cluster, node=backend.node, leader=None, term=0,
        nodes=tuple(replace(node, leader=False, last_seen=None) for node in nodes),
        services=service_rows(state),
        sources=tuple(replace(source, next_poll=None) for source in sources),
        deploy=record(running, state.time_ms) if running else None,
        warnings=tuple(warnings(state, lambda _node: "")),
        at=replies.rfc3339(state.time_ms), stale=stale,
    )


def _allocations_by_service(state: State) -> dict[str, list[Allocation]]:
    found: dict[str, list[Allocation]] = {}
    for alloc in sorted_by_id(state.allocations):
        if alloc.status not in ENDED:
            found.setdefault(alloc.service, []).append(alloc)
    return found


def _revision_row(state: State, revision: Revision) -> RevisionRow:
    spec = state.specs.get(revision.spec_hash)
    return RevisionRow(
        number=revision.number, image=spec.image if spec else "", digest=revision.digest,
        deploy=revision.deploy, at=replies.rfc3339_or_none(revision.at_ms),
    )


def _node_row(node: Node, allocations: list[Allocation], backend: Backend) -> NodeRow:
    return NodeRow(
        id=node.name, name=node.name, status=node.status, voter=backend.health.voter(node.name),
        leader=backend.ledger.leader == node.name, address=node.api,
        cpu=CpuUse(node.cpu_milli / 1000, sum(a.cpu_milli for a in allocations) / 1000),
        memory=MemoryUse(node.memory_bytes, sum(a.memory_bytes for a in allocations)),
        allocations=len(allocations),
        last_seen=replies.rfc3339_or_none(backend.health.last_seen(node.name)),
    )


def _ended_ms(alloc: Allocation) -> int:
    return alloc.ended_ms


CALLS = (
    Call("GET", "/v1/status", status, "The cluster at a glance", role="read", serve="read",
         answer=StatusAnswer,
         query=(Query("at", "as it was after this log index", "integer", low=1, high=MAX_INDEX),)),
    Call("GET", "/v1/services", list_services, "Services by name", role="read", serve="read",
         answer=ServiceList),
    Call("GET", "/v1/services/{name}", show_service,
         "One service, its revisions, and its allocations that ended", role="read", serve="read",
         answer=ServiceAnswer),
    Call("GET", "/v1/nodes", list_nodes, "Nodes by name", role="read", serve="read",
         answer=NodeList),
)
