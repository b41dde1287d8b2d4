"""Whatever happens in whatever order, an Envoy ends up with what is wanted, and on the way never
routes or listens for a cluster that it does not have."""

from __future__ import annotations

from collections import deque
from typing import Any

from envoy.config.listener.v3 import listener_pb2
from envoy.config.route.v3 import route_pb2
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from envoy.service.discovery.v3 import discovery_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.edge.delta import CDS, EDS, LDS, RDS, DeltaStream, Resources
from reconciler.edge.listeners import Ingress
from reconciler.edge.resources import ResourceBuilder
from reconciler.edge.table import (
    Cluster,
    EdgeTable,
    Endpoint,
    HostRoutes,
    PathRoute,
    VirtualAddress,
)

BUILDER = ResourceBuilder(Ingress("127.0.0.1", 8080))


class ModelEnvoy:
    """Envoy's side as it was seen to behave: a cluster warms until its endpoints come, and the
    ACK of clusters waits for that; objects outlive a stream."""

    def __init__(self) -> None:
        self.held: dict[str, dict[str, tuple[str, Any]]] = {CDS: {}, EDS: {}, LDS: {}, RDS: {}}
        self.names: dict[str, set[str]] = {EDS: set(), RDS: set()}
        self.requests: deque[Any] = deque()
        self.warming: dict[str, set[str]] = {}
        self.started: set[str] = set()

    def connect(self) -> None:
        """A new stream: all that it knew is subscribed to again, with the versions it has."""
        self.requests.clear()
        self.warming.clear()
        known = [kind for kind in (CDS, EDS, LDS, RDS) if kind in self.started] or [CDS]
        self.started = set()
        for kind in known:
            versions = {name: version for name, (version, _) in self.held[kind].items()}
            self._ask(kind, sorted(self.names.get(kind, ())), versions=versions)

    def _ask(self, kind: str, names: Any = (), *, gone: Any = (), **more: Any) -> None:
        versions = more.get("versions") if kind not in self.started else None
        self.started.add(kind)
        self.requests.append(discovery_pb2.DeltaDiscoveryRequest(
            type_url=kind, resource_names_subscribe=names, resource_names_unsubscribe=gone,
            response_nonce=more.get("nonce", ""), initial_resource_versions=versions or {},
        ))

    def take(self, response: Any) -> None:
        kind, held = response.type_url, self.held[response.type_url]
        changed = [resource.name for resource in response.resources]
        for resource in response.resources:
            held[resource.name] = (resource.version, resource.resource)
        for name in response.removed_resources:
            held.pop(name, None)
        if kind == CDS:
            self._clusters(response, changed)
        else:
            self._ask(kind, nonce=response.nonce)
        if kind == EDS:
            self._warmed({*changed, *response.removed_resources})
        if kind == LDS and "http" in held and "ingress" not in self.names[RDS]:
            self.names[RDS].add("ingress")
            self._ask(RDS, ["ingress"])
        self.check()

    def _clusters(self, response: Any, changed: list[str]) -> None:
        new = [name for name in changed if name not in self.names[EDS]]
        gone = [name for name in response.removed_resources if name in self.names[EDS]]
        self.names[EDS].update(new)
        self.names[EDS].difference_update(gone)
        for name in gone:
            self.held[EDS].pop(name, None)
        if new or gone:
            self._ask(EDS, new, gone=gone)
        self.warming[response.nonce] = set(changed)
        self._warmed(set())
        if LDS not in self.started:
            self._ask(LDS)

    def _warmed(self, names: set[str]) -> None:
        for nonce, waiting in list(self.warming.items()):
            waiting.difference_update(names)
            if not waiting:
                del self.warming[nonce]
                self._ask(CDS, nonce=nonce)

    def check(self) -> None:
        clusters = self.held[CDS].keys()
        for _, body in self.held[RDS].values():
            routes = route_pb2.RouteConfiguration.FromString(body.value)
            used = {r.route.cluster for host in routes.virtual_hosts for r in host.routes}
            assert used <= clusters
        for name, (_, body) in self.held[LDS].items():
            if name.startswith("vip/"):
                listener = listener_pb2.Listener.FromString(body.value)
                typed = listener.filter_chains[0].filters[0].typed_config
                assert tcp_proxy_pb2.TcpProxy.FromString(typed.value).cluster in clusters


def table_of(services: dict[str, int]) -> EdgeTable:
    return EdgeTable(
        tuple(Cluster(n, (Endpoint("10.77.1.2", 80 + services[n]),)) for n in sorted(services)),
        tuple(VirtualAddress(f"10.97.0.{ord(n)}", 80, n) for n in sorted(services)),
        tuple(HostRoutes(f"{n}.org", (PathRoute("/", n),)) for n in sorted(services)),
    )


def rebuilt(services: dict[str, int], generation: int) -> Resources:
    """The resources, as a newer program would make them: clusters with other bytes."""
    resources = {k: dict(v) for k, v in BUILDER.build(table_of(services)).items()}
    for name, packed in resources[CDS].items():
        resources[CDS][name] = packed._replace(version=f"{packed.version}-{generation}")
    return resources


WANTS = st.tuples(
    st.just("want"), st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)), st.integers(0, 1)
)
STEPS = st.lists(
    st.one_of(
        WANTS, st.just(("deliver",)), st.just(("deliver",)), st.just(("deliver",)),
        st.just(("hear",)), st.just(("hear",)), st.just(("hear",)), st.just(("reconnect",)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=200)
@given(STEPS)
def test_it_converges_and_never_breaks_before_it_makes(steps: list[tuple[Any, ...]]) -> None:
    wanted: Resources = BUILDER.build(table_of({"a": 0}))
    envoy, stream = ModelEnvoy(), DeltaStream(wanted)
    responses: deque[Any] = deque()
    envoy.connect()

    def hear() -> None:
        if envoy.requests:
            stream.receive(envoy.requests.popleft())
            responses.extend(stream.outgoing())

    def deliver() -> None:
        if responses:
            envoy.take(responses.popleft())

    for step, *details in steps:
        if step == "want":
            wanted = rebuilt(*details)
            stream.want(wanted)
            responses.extend(stream.outgoing())
        elif step == "reconnect":
            stream = DeltaStream(wanted)
            responses.clear()
            envoy.connect()
        elif step == "hear":
            hear()
        else:
            deliver()
    for _ in range(200):
        hear()
        deliver()
    assert stream.settled
    assert not stream.refusals
    for kind in (CDS, EDS, LDS, RDS):
        versions = {name: version for name, (version, _) in envoy.held[kind].items()}
        assert versions == {name: packed.version for name, packed in wanted[kind].items()}, kind
