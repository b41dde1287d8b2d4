"""State → table: who is an endpoint, which routes there are, in which order."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.edge import dns
from reconciler.edge.table import (
    Cluster,
    EdgeTable,
    Endpoint,
    HostRoutes,
    PathRoute,
    VirtualAddress,
    edge_table,
    zone,
)
from reconciler.fsm.records import AllocStatus
from reconciler.fsm.state import State
from reconciler.language.spec import Route
from tests.edge.states import spec, with_alloc, with_live, with_new, without

WEB = spec("web", 80, Route(host="app.example.com"))


def web_state() -> State:
    return with_alloc(with_live(State(), WEB, "10.97.0.1"), "web-aaaaaa", "web", "10.77.1.2")


def test_a_live_healthy_allocation_is_an_endpoint_of_its_service() -> None:
    table = edge_table(web_state())
    assert table.clusters == (Cluster("web", (Endpoint("10.77.1.2", 80),)),)
    assert table.addresses == (VirtualAddress("10.97.0.1", 80, "web"),)
    assert table.hosts == (HostRoutes("app.example.com", (PathRoute("/", "web"),)),)


def test_an_allocation_of_a_deploy_that_is_not_committed_gets_no_traffic() -> None:
    state = with_alloc(
        web_state(), "web-bbbbbb", "web", "10.77.2.2", live=False, routed=False, deploy="d-9"
    )
    assert edge_table(state) == edge_table(web_state())


def test_an_allocation_that_is_not_healthy_is_out_at_once_and_the_route_stays() -> None:
    for status in ("pending", "pulling", "starting", "running", "failed", "lost", "stopped"):
        state = with_alloc(web_state(), "web-aaaaaa", "web", "10.77.1.2", status=status)
        table = edge_table(state)
        assert table.clusters == (Cluster("web"),)
        assert table.hosts == edge_table(web_state()).hosts


def test_a_routed_allocation_that_stops_drains_and_one_never_routed_is_gone() -> None:
    state = with_alloc(
        web_state(), "web-aaaaaa", "web", "10.77.1.2", status="stopping", live=False
    )
    state = with_alloc(
        state, "web-bbbbbb", "web", "10.77.1.3", status="stopping", live=False, routed=False
    )
    state = with_alloc(state, "web-cccccc", "web", "10.77.1.4")
    assert edge_table(state).clusters == (
        Cluster("web", (Endpoint("10.77.1.2", 80, draining=True), Endpoint("10.77.1.4", 80))),
    )


def test_a_new_service_has_its_address_before_the_commit_and_its_routes_only_after() -> None:
    state = with_new(State(), WEB, "10.97.0.1", "d-5")
    state = with_alloc(
        state, "web-aaaaaa", "web", "10.77.1.2", live=False, routed=True, deploy="d-5"
    )
    table = edge_table(state)
    assert table.clusters == (Cluster("web", (Endpoint("10.77.1.2", 80),)),)
    assert table.addresses == (VirtualAddress("10.97.0.1", 80, "web"),)
    assert table.hosts == ()


def test_a_new_service_has_no_endpoints_of_another_deploy() -> None:
    state = with_new(State(), WEB, "10.97.0.1", "d-5")
    state = with_alloc(
        state, "web-aaaaaa", "web", "10.77.1.2", live=False, routed=True, deploy="d-4"
    )
    assert edge_table(state).clusters == (Cluster("web"),)


def test_a_removed_service_keeps_only_what_drains() -> None:
    state = with_alloc(
        web_state(), "web-aaaaaa", "web", "10.77.1.2", status="stopping", live=False
    )
    table = edge_table(without(state, "web"))
    assert table.clusters == (Cluster("web", (Endpoint("10.77.1.2", 80, draining=True),)),)
    assert table.addresses == ()
    assert table.hosts == ()
    ended = with_alloc(
        state, "web-aaaaaa", "web", "10.77.1.2", status="stopped", live=False, routed=False
    )
    assert edge_table(without(ended, "web")).clusters == ()


def test_a_worker_without_a_port_is_nowhere() -> None:
    state = with_live(State(), spec("worker", None), "10.97.0.1")
    state = with_alloc(state, "worker-aaaaaa", "worker", "10.77.1.2", None)
    assert edge_table(state) == edge_table(State())


def test_paths_are_longest_first_and_hosts_most_exact_first() -> None:
    routes = (
        Route(host="*", path="/"),
        Route(host="*.example.com", path="/"),
        Route(host="*.eu.example.com", path="/"),
        Route(host="App.example.com", path="/"),
        Route(host="app.example.com", path="/api/v2", strip_prefix=True),
        Route(host="app.example.com", path="/api/", websocket=True),
    )
    hosts = edge_table(with_live(State(), spec("web", 80, *routes), "10.97.0.1")).hosts
    assert [host.host for host in hosts] == [
        "app.example.com", "*.eu.example.com", "*.example.com", "*"
    ]
    assert hosts[0].paths == (
        PathRoute("/api/v2", "web", strip_prefix=True),
        PathRoute("/api", "web", websocket=True),
        PathRoute("/", "web"),
    )


def test_a_route_claimed_twice_goes_to_the_first_service_by_name() -> None:
    state = with_live(State(), spec("b", 80, Route(host="x.example.com")), "10.97.0.1")
    state = with_live(state, spec("a", 80, Route(host="X.example.com")), "10.97.0.2")
    assert edge_table(state).hosts == (HostRoutes("x.example.com", (PathRoute("/", "a"),)),)


Drawn = tuple[str, int, AllocStatus, bool, bool]
NAMES = st.sampled_from(["a", "b", "c", "d"])
ALLOCS = st.tuples(
    NAMES, st.integers(2, 9),
    st.sampled_from(["pending", "running", "healthy", "stopping", "stopped", "lost"]),
    st.booleans(), st.booleans(),
)
ROUTES = st.tuples(
    st.sampled_from(["*", "*.x.org", "a.x.org", "b.org"]), st.sampled_from(["/", "/a", "/a/b"])
)


@settings(deadline=None)
@given(
    st.dictionaries(NAMES, st.lists(ROUTES, max_size=4)), st.lists(ALLOCS, max_size=12),
    st.randoms(use_true_random=False),
)
def test_the_order_in_which_a_state_came_about_never_shows(
    services: dict[str, list[tuple[str, str]]], allocs: list[Drawn], random: Random
) -> None:
    def build(service_names: list[str], numbered: list[tuple[int, Drawn]]) -> EdgeTable:
        state = State()
        for name in service_names:
            routes = (Route(host=host, path=path) for host, path in services[name])
            state = with_live(state, spec(name, 80, *routes), f"10.97.0.{ord(name)}")
        for number, (name, node, status, live, routed) in numbered:
            state = with_alloc(
                state, f"{name}-{number}", name, f"10.77.{node}.{number}", status=status,
                live=live, routed=routed,
            )
        return edge_table(state)

    names, numbered = sorted(services), list(enumerate(allocs))
    table = build(names, numbered)
    random.shuffle(names)
    random.shuffle(numbered)
    assert build(names, numbered) == table
    serving = {
        (f"10.77.{node}.{number}", 80)
        for number, (name, node, status, live, _) in enumerate(allocs)
        if status == "healthy" and live
    }
    got = {(e.ip, e.port) for c in table.clusters for e in c.endpoints if not e.draining}
    assert got == serving
    clusters = {cluster.service for cluster in table.clusters}
    assert {path.service for host in table.hosts for path in host.paths} <= clusters
    assert {address.service for address in table.addresses} <= clusters
    claims = [(host.host, path.path) for host in table.hosts for path in host.paths]
    assert len(claims) == len(set(claims))


def test_a_service_has_its_name_from_its_first_health_and_keeps_it() -> None:
    new = with_new(State(), WEB, "10.97.0.1", "d-5")
    starting = with_alloc(
        new, "web-aaaaaa", "web", "10.77.1.2", status="starting", live=False, routed=False,
        deploy="d-5",
    )
    assert zone(starting).services == {}
    assert zone(starting).allocations == {"web-aaaaaa": dns.Allocation("10.77.1.2", "web")}
    healthy = with_alloc(
        new, "web-aaaaaa", "web", "10.77.1.2", live=False, deploy="d-5"
    )
    assert zone(healthy).services == {"web": dns.Service("10.97.0.1", 80)}
    unhealthy = with_alloc(web_state(), "web-aaaaaa", "web", "10.77.1.2", status="running")
    assert zone(unhealthy).services == {"web": dns.Service("10.97.0.1", 80)}


def test_an_ended_allocation_has_no_name_and_a_worker_has_one_without_a_port() -> None:
    state = with_live(State(), spec("worker", None), "10.97.0.9")
    state = with_alloc(state, "worker-aaaaaa", "worker", "10.77.1.3", None)
    state = with_alloc(state, "worker-bbbbbb", "worker", "10.77.1.4", None, status="stopped")
    assert zone(state).services == {"worker": dns.Service("10.97.0.9", None)}
    assert set(zone(state).allocations) == {"worker-aaaaaa"}
