"""The delta protocol without I/O: order, acknowledgements, refusals, reconnects."""

from __future__ import annotations

from typing import Any

from envoy.service.discovery.v3 import discovery_pb2

from reconciler.edge.delta import CDS, EDS, LDS, RDS, DeltaStream
from reconciler.edge.listeners import Ingress
from reconciler.edge.resources import ResourceBuilder
from reconciler.edge.table import Cluster, EdgeTable, Endpoint, HostRoutes, PathRoute

ONE = EdgeTable(
    (Cluster("web", (Endpoint("10.77.1.2", 80),)),), (),
    (HostRoutes("a.org", (PathRoute("/", "web"),)),),
)
TWO = EdgeTable(
    (Cluster("api", (Endpoint("10.77.1.3", 80),)), *ONE.clusters), (),
    (HostRoutes("a.org", (PathRoute("/api", "api"), PathRoute("/", "web"))),),
)


def builder() -> ResourceBuilder:
    return ResourceBuilder(Ingress("127.0.0.1", 8080))


def request(kind: str, *names: str, nonce: str = "", error: str = "", **more: Any) -> Any:
    message = discovery_pb2.DeltaDiscoveryRequest(
        type_url=kind, response_nonce=nonce, resource_names_subscribe=names, **more
    )
    if error:
        message.error_detail.code = 13
        message.error_detail.message = error
    return message


def shown(responses: list[Any]) -> list[tuple[str, list[str], list[str]]]:
    return [
        (r.type_url, [x.name for x in r.resources], list(r.removed_resources)) for r in responses
    ]


def ack(stream: DeltaStream, responses: list[Any], error: str = "") -> list[Any]:
    """Answer all responses, as Envoy does; what comes next."""
    for response in responses:
        stream.receive(request(response.type_url, nonce=response.nonce, error=error))
    return stream.outgoing()


def settled_on(table: EdgeTable, build: ResourceBuilder) -> DeltaStream:
    """A stream over which an Envoy has come up with this table."""
    stream = DeltaStream(build.build(table))
    stream.receive(request(CDS))
    clusters = stream.outgoing()
    names = [cluster.service for cluster in table.clusters]
    stream.receive(request(EDS, *names))
    ack(stream, [*stream.outgoing(), *clusters])
    stream.receive(request(LDS))
    listeners = stream.outgoing()
    stream.receive(request(RDS, "ingress"))
    ack(stream, [*stream.outgoing(), *listeners])
    assert stream.settled
    return stream


def test_additions_go_clusters_endpoints_listeners_routes_each_after_its_ack() -> None:
    build = builder()
    stream = settled_on(ONE, build)
    stream.want(build.build(TWO))
    clusters = stream.outgoing()
    assert shown(clusters) == [(CDS, ["api"], [])]
    stream.receive(request(EDS, "api"))
    endpoints = stream.outgoing()
    assert shown(endpoints) == [(EDS, ["api"], [])]
    assert ack(stream, endpoints) == []
    routes = ack(stream, clusters)
    assert shown(routes) == [(RDS, ["ingress"], [])]
    assert not stream.settled
    assert ack(stream, routes) == []
    assert stream.settled


def test_a_removed_service_leaves_the_routes_before_its_cluster_goes() -> None:
    build = builder()
    stream = settled_on(TWO, build)
    stream.want(build.build(ONE))
    routes = stream.outgoing()
    assert shown(routes) == [(RDS, ["ingress"], [])]
    removal = ack(stream, routes)
    assert shown(removal) == [(CDS, [], ["api"])]
    assert not stream.settled
    ack(stream, removal)
    assert stream.settled


def test_a_drain_and_its_replacement_are_one_push() -> None:
    build = builder()
    stream = settled_on(ONE, build)
    endpoints = (Endpoint("10.77.1.2", 80, draining=True), Endpoint("10.77.2.2", 80))
    stream.want(build.build(EdgeTable((Cluster("web", endpoints),), (), ONE.hosts)))
    assert shown(stream.outgoing()) == [(EDS, ["web"], [])]


def test_a_changed_cluster_goes_out_with_its_endpoints_and_not_after_its_ack() -> None:
    build = builder()
    stream = settled_on(ONE, build)
    resources = {kind: dict(objects) for kind, objects in build.build(ONE).items()}
    resources[CDS]["web"] = resources[CDS]["web"]._replace(version="another")
    stream.want(resources)
    assert shown(stream.outgoing()) == [(CDS, ["web"], []), (EDS, ["web"], [])]


def test_a_changed_cluster_on_a_new_stream_gets_its_endpoints_once_they_are_subscribed() -> None:
    resources = builder().build(ONE)
    stream = DeltaStream(resources)
    stream.receive(request(CDS, initial_resource_versions={"web": "older"}))
    assert shown(stream.outgoing()) == [(CDS, ["web"], [])]
    known = {"web": resources[EDS]["web"].version}
    stream.receive(request(EDS, "web", initial_resource_versions=known))
    assert shown(stream.outgoing()) == [(EDS, ["web"], [])]


def test_an_envoy_that_comes_back_gets_only_what_changed_meanwhile() -> None:
    build = builder()
    held = build.build(ONE)
    stream = DeltaStream(build.build(TWO))
    for kind, names in ((CDS, ()), (EDS, ("web",)), (LDS, ()), (RDS, ("ingress",))):
        versions = {name: packed.version for name, packed in held[kind].items()}
        stream.receive(request(kind, *names, initial_resource_versions=versions))
    clusters = stream.outgoing()
    assert shown(clusters) == [(CDS, ["api"], [])]
    stream.receive(request(EDS, "api"))
    assert shown(ack(stream, [*stream.outgoing(), *clusters])) == [(RDS, ["ingress"], [])]


def test_names_that_do_not_exist_are_told_as_removed_or_the_object_would_wait() -> None:
    stream = settled_on(ONE, builder())
    stream.receive(request(EDS, "nobody"))
    assert shown(stream.outgoing()) == [(EDS, [], ["nobody"])]


def test_an_empty_envoy_is_answered_even_with_nothing() -> None:
    stream = DeltaStream({})
    stream.receive(request(CDS))
    assert shown(stream.outgoing()) == [(CDS, [], [])]


def test_a_refusal_settles_with_its_reason_and_is_not_sent_again_until_wanted_anew() -> None:
    build = builder()
    stream = settled_on(ONE, build)
    resources = {kind: dict(objects) for kind, objects in build.build(ONE).items()}
    resources[LDS]["http"] = resources[LDS]["http"]._replace(version="bad")
    stream.want(resources)
    listeners = stream.outgoing()
    assert ack(stream, listeners, error="cannot bind 127.0.0.1:8080") == []
    assert stream.settled
    assert stream.refusals == ("cannot bind 127.0.0.1:8080",)
    stream.want(resources)
    assert stream.refusals == ()
    assert shown(stream.outgoing()) == [(LDS, ["http"], [])]


def test_a_newer_target_in_mid_push_goes_on_from_what_was_sent() -> None:
    build = builder()
    stream = settled_on(ONE, build)
    stream.want(build.build(TWO))
    clusters = stream.outgoing()
    stream.want(build.build(ONE))
    assert stream.outgoing() == []
    stream.receive(request(EDS, "api"))
    answer = stream.outgoing()
    assert shown(answer) == [(EDS, [], ["api"])]
    ack(stream, answer)
    assert shown(ack(stream, clusters)) == [(CDS, [], ["api"])]


def test_unchanged_objects_are_not_built_again() -> None:
    build = builder()
    first, second = build.build(ONE), build.build(TWO)
    assert second[CDS]["web"] is first[CDS]["web"]
    assert second[EDS]["web"] is first[EDS]["web"]
    assert second[LDS]["http"] is first[LDS]["http"]
    assert second[RDS]["ingress"] is not first[RDS]["ingress"]
