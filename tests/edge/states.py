"""States to try the edge on, built from the real records."""

from __future__ import annotations

import asyncio

import msgspec

from reconciler.fsm.records import (
    Allocation,
    AllocStatus,
    Change,
    Deploy,
    Origin,
    Revision,
    Service,
)
from reconciler.fsm.state import State
from reconciler.language.spec import Health, Route, ServiceSpec, spec_hash


def spec(name: str, port: int | None = 80, *routes: Route, replicas: int = 1) -> ServiceSpec:
    return ServiceSpec(
        name=name, image=f"registry/{name}:v1", health=Health(kind="tcp"), port=port,
        routes=routes, replicas=replicas,
    )


def with_live(state: State, service: ServiceSpec, vip: str) -> State:
    digest = spec_hash(service)
    record = Service(
        name=service.name, vip=vip, live=1, last_revision=1,
        revisions=(Revision(number=1, spec_hash=digest, digest="sha256:0"),),
    )
    return msgspec.structs.replace(
        state, index=state.index + 1, specs={**state.specs, digest: service},
        services={**state.services, service.name: record},
    )


def with_new(state: State, service: ServiceSpec, vip: str, deploy: str) -> State:
    """The service is new in a running deploy: no revision is live yet."""
    digest = spec_hash(service)
    running = Deploy(
        id=deploy, changes=(Change(service=service.name, action="create", spec_hash=digest),),
        origin=Origin(), started_ms=0, deadline_ms=0,
    )
    return msgspec.structs.replace(
        state, index=state.index + 1, specs={**state.specs, digest: service},
        services={**state.services, service.name: Service(name=service.name, vip=vip)},
        deploys={**state.deploys, deploy: running}, active_deploy=deploy,
    )


def without(state: State, service: str) -> State:
    services = {name: record for name, record in state.services.items() if name != service}
    return msgspec.structs.replace(state, index=state.index + 1, services=services)


def with_alloc(
    state: State,
    alloc: str,
    service: str,
    address: str,
    port: int | None = 80,
    status: AllocStatus = "healthy",
    *,
    live: bool = True,
    routed: bool = True,
    deploy: str = "",
) -> State:
    record = Allocation(
        id=alloc, service=service, revision=1, slot=0, node="n1", address=address, deploy=deploy,
        image="i", digest="d", port=port, cpu_milli=1, memory_bytes=1, status=status, live=live,
        routed=routed,
    )
    return msgspec.structs.replace(
        state, index=state.index + 1, allocations={**state.allocations, alloc: record}
    )


def tick(state: State) -> State:
    """The same state at the next index."""
    return msgspec.structs.replace(state, index=state.index + 1)


class Log:
    """Where a test writes states and an edge follows them."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._moved = asyncio.Event()

    def write(self, state: State) -> State:
        assert state.index > self.state.index
        self.state = state
        self._moved.set()
        self._moved = asyncio.Event()
        return state

    async def changed(self, seen: State) -> State:
        while self.state is seen:
            await self._moved.wait()
        return self.state
