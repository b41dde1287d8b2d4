"""State → what an edge should serve. Pure: the same state gives the same table on every node.

Everything is sorted, so two tables are equal exactly where traffic would be the same.
"""

from __future__ import annotations

import msgspec

from reconciler.edge import dns
from reconciler.fsm.records import ENDED, Allocation, Service
from reconciler.fsm.state import State

_STARTED = frozenset({"starting", "running", "healthy", "stopping"})
"""States in which there is a container, or is about to be."""


class Endpoint(msgspec.Struct, frozen=True, order=True):
    """Where one allocation answers. `draining`: what is in flight ends, nothing new begins."""

    ip: str
    port: int
    draining: bool = False


class Cluster(msgspec.Struct, frozen=True, order=True):
    """A service and its endpoints."""

    service: str
    endpoints: tuple[Endpoint, ...] = ()


class VirtualAddress(msgspec.Struct, frozen=True, order=True):
    """The one address of a service, the same on every node."""

    ip: str
    port: int
    service: str


class PathRoute(msgspec.Struct, frozen=True):
    """A path prefix (`/` or one without a slash at its end) and the service behind it."""

    path: str
    service: str
    websocket: bool = False
    strip_prefix: bool = False


class HostRoutes(msgspec.Struct, frozen=True):
    """A host (exact, `*.suffix` or `*`, lower case), its paths longest first."""

    host: str
    paths: tuple[PathRoute, ...]


class EdgeTable(msgspec.Struct, frozen=True):
    """All that a node's edge serves; hosts from the most exact to `*`."""

    clusters: tuple[Cluster, ...] = ()
    addresses: tuple[VirtualAddress, ...] = ()
    hosts: tuple[HostRoutes, ...] = ()


def edge_table(state: State) -> EdgeTable:
    """What the edge should serve at this state.

    A service keeps its cluster, address and routes with nothing healthy (503, not 404); one that
    was removed keeps its cluster, and that alone, until its last request has ended.
    """
    endpoints: dict[str, list[Endpoint]] = {}
    addresses: list[VirtualAddress] = []
    routes: list[tuple[str, PathRoute]] = []
    for service in state.services.values():
        spec = state.specs.get(_spec_hash(state, service))
        if spec is None or spec.port is None:
            continue
        endpoints[service.name] = []
        addresses.append(VirtualAddress(service.vip, spec.port, service.name))
        if service.live:
            for route in spec.routes:
                path = route.path.rstrip("/") or "/"
                routes.append((
                    route.host.lower(),
                    PathRoute(path, service.name, route.websocket, route.strip_prefix),
                ))
    for alloc in state.allocations.values():
        endpoint = _endpoint(state, alloc)
        if endpoint is not None:
            endpoints.setdefault(alloc.service, []).append(endpoint)
    return EdgeTable(
        clusters=tuple(Cluster(name, tuple(sorted(endpoints[name]))) for name in sorted(endpoints)),
        addresses=tuple(sorted(addresses)),
        hosts=_hosts(routes),
    )


def zone(state: State) -> dns.Zone:
    """The names inside `.mill` at this state.

    A new service has its name once one of its allocations has been healthy. An allocation has
    its own from its start, so that it can find itself, to its end.
    """
    allocations = {
        alloc.id: dns.Allocation(alloc.address, alloc.service)
        for alloc in state.allocations.values() if alloc.status in _STARTED
    }
    found = {
        alloc.service for alloc in state.allocations.values()
        if (alloc.status == "healthy" or alloc.routed) and _first(state, alloc)
    }
    services = {}
    for service in state.services.values():
        spec = state.specs.get(_spec_hash(state, service))
        if spec is not None and (service.live or service.name in found):
            services[service.name] = dns.Service(service.vip, spec.port)
    return dns.Zone(services, allocations)


def _spec_hash(state: State, service: Service) -> str:
    """Of the live spec; for a service that is new in the running deploy, of the one to come."""
    live = service.revision(service.live)
    if live is not None:
        return live.spec_hash
    deploy = state.running_deploy()
    change = deploy.change(service.name) if deploy else None
    return change.spec_hash if change else ""


def _endpoint(state: State, alloc: Allocation) -> Endpoint | None:
    """Where traffic for this allocation goes, or None where none may."""
    if alloc.port is None or alloc.status in ENDED:
        return None
    if alloc.status == "stopping":
        return Endpoint(alloc.address, alloc.port, draining=True) if alloc.routed else None
    if alloc.status == "healthy" and (alloc.live or _first(state, alloc)):
        return Endpoint(alloc.address, alloc.port)
    return None


def _first(state: State, alloc: Allocation) -> bool:
    """Of a service's very first deploy, which replaces nothing: its address works at once, so
    that what depends on it in the same deploy can start; its routes wait for the commit."""
    service = state.services.get(alloc.service)
    return (
        service is not None and not service.live
        and alloc.deploy != "" and alloc.deploy == state.active_deploy
    )


def _hosts(routes: list[tuple[str, PathRoute]]) -> tuple[HostRoutes, ...]:
    """Routes by host. Admission refuses a host and path twice; should one come through all the
    same, the first service by name keeps it, since Envoy would refuse every route otherwise."""
    paths: dict[str, dict[str, PathRoute]] = {}
    for host, route in sorted(routes, key=lambda row: row[1].service):
        paths.setdefault(host, {}).setdefault(route.path, route)
    return tuple(
        HostRoutes(host, tuple(sorted(paths[host].values(), key=lambda p: (-len(p.path), p.path))))
        for host in sorted(paths, key=_exactness)
    )


def _exactness(host: str) -> tuple[int, int, str]:
    """Exact hosts first, then wildcards by length, then `*`; as Envoy itself chooses."""
    if host == "*":
        return (2, 0, host)
    if host.startswith("*."):
        return (1, -len(host), host)
    return (0, 0, host)
