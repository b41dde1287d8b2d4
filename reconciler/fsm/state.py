"""The state of a cluster at one index, and the questions that everybody asks of it.

A `State` is never changed: `apply` makes the next one, which shares what did not change. So any
thread may hold one for as long as it likes, and two states can be compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from reconciler.fsm.events import Event
from reconciler.fsm.records import (
    ENDED,
    Allocation,
    Deploy,
    Node,
    Request,
    Revision,
    SealedAuthority,
    Secret,
    Service,
    Source,
    Token,
)
from reconciler.language.spec import ServiceSpec

EVENT_CHUNK = 256
"""Events a chunk: appending copies one chunk, not the whole history."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the log has decided so far. The mappings are read-only by agreement."""

    index: int = 0
    time_ms: int = 0
    cluster: str = ""
    nodes: dict[str, Node] = {}
    secrets: dict[str, Secret] = {}
    specs: dict[str, ServiceSpec] = {}
    spec_parts: dict[str, tuple[bytes, ...]] = {}
    services: dict[str, Service] = {}
    allocations: dict[str, Allocation] = {}
    deploys: dict[str, Deploy] = {}
    active_deploy: str = ""
    sources: dict[str, Source] = {}
    tokens: dict[str, Token] = {}
    deploy_events: dict[str, tuple[Event, ...]] = {}
    events: tuple[tuple[Event, ...], ...] = ()
    next_vip: int = 1
    authority: SealedAuthority | None = None
    requests: dict[str, Request] = {}

    def running_deploy(self) -> Deploy | None:
        """The deploy that has no terminal event yet; at most one."""
        return self.deploys.get(self.active_deploy)

    def of_service(self, service: str) -> Iterator[Allocation]:
        """All allocations of a service that have not ended, by id."""
        yield from _by_id(a for a in self.allocations.values()
                          if a.service == service and a.status not in ENDED)

    def of_node(self, node: str) -> Iterator[Allocation]:
        """All allocations on a node that have not ended, by id."""
        yield from _by_id(a for a in self.allocations.values()
                          if a.node == node and a.status not in ENDED)

    def of_deploy(self, deploy: str) -> Iterator[Allocation]:
        """All allocations that a deploy scheduled, ended ones too, by id."""
        yield from _by_id(a for a in self.allocations.values() if a.deploy == deploy)

    def spec_of(self, revision: Revision) -> ServiceSpec:
        """The spec of a kept revision."""
        return self.specs[revision.spec_hash]

    def live_spec(self, service: str) -> ServiceSpec | None:
        """The committed spec of a service, or None where none is."""
        record = self.services.get(service)
        revision = record.revision(record.live) if record else None
        return self.specs.get(revision.spec_hash) if revision else None

    def spec_for(self, alloc: Allocation) -> ServiceSpec | None:
        """The spec with which an allocation was started."""
        record = self.services.get(alloc.service)
        revision = record.revision(alloc.revision) if record else None
        if revision is not None:
            return self.specs.get(revision.spec_hash)
        deploy = self.deploys.get(alloc.deploy)
        change = deploy.change(alloc.service) if deploy else None
        return self.specs.get(change.spec_hash) if change else None

    def events_after(self, index: int) -> Iterator[Event]:
        """Events of all kinds with a greater index, in order."""
        for chunk in self.events:
            if chunk[-1].index > index:
                yield from (event for event in chunk if event.index > index)


def _by_id(some: Iterable[Allocation]) -> list[Allocation]:
    """Sorted after they were chosen: most of a state's allocations have ended long ago."""
    return sorted(some, key=lambda alloc: alloc.id)


def sorted_by_id(allocations: Mapping[str, Allocation]) -> list[Allocation]:
    """Allocations in the order of their ids, so that every node walks them alike."""
    return [allocations[key] for key in sorted(allocations)]
