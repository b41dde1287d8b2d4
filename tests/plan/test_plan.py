"""The whole plan: what holds for every history of deploys, and what a plan refuses."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.fsm import commands as c
from reconciler.fsm.records import ENDED, Origin
from reconciler.language.spec import AddressRef, EnvVar, Health, canonical
from reconciler.plan.budget import budget_ms
from reconciler.plan.diff import RouteTaken
from reconciler.plan.place import reserved
from reconciler.plan.plan import MAX_WARNINGS, DoesNotFit
from reconciler.plan.references import dangling, dependency_cycle
from tests.plan.cluster import Cluster, digest, routed, service, three_nodes, with_secret


def test_new_beside_old_must_fit_and_the_refusal_says_what_to_free():
    cluster = Cluster()
    cluster.node("node-1", 1, cpu_milli=1000)
    cluster.deploy(service("web", cpu_milli=600))
    with pytest.raises(DoesNotFit) as caught:
        cluster.plan(service("web", cpu_milli=600, user="new"))
    assert caught.value.status == 409
    assert caught.value.what == (
        "1 of 1 replicas of web do not fit: each needs 0.6 cores and 134M of memory; "
        "nearest is node-1, which has 0.4 cores free"
    )
    assert "rolling) is not built yet" in caught.value.hint


def test_a_kept_container_needs_no_second_room():
    cluster = Cluster()
    cluster.node("node-1", 1, cpu_milli=1000)
    cluster.deploy(service("web", cpu_milli=600))
    assert cluster.plan(service("web", cpu_milli=600, routes=routed("x"))).changes


def test_capacity_that_stopping_containers_still_hold_is_said():
    cluster = Cluster()
    cluster.node("node-1", 1, cpu_milli=1000)
    cluster.deploy(service("web", cpu_milli=600))
    [alloc] = cluster.running("web")
    cluster.do(c.SetAllocStatus(alloc=alloc, status="stopping", was="healthy"))
    with pytest.raises(DoesNotFit) as caught:
        cluster.plan(service("api", cpu_milli=600))
    assert "1 allocations are just stopping: try again" in caught.value.hint


def test_room_that_the_running_deploy_has_yet_to_take_is_reserved():
    cluster = three_nodes()
    cluster.deploy(service("web", replicas=1))
    plan = cluster.plan(service("web", replicas=3), service("api", replicas=2, cpu_milli=300))
    before = reserved(cluster.state)
    for one in plan.diffs:
        cluster.do(c.StoreSpec(one.spec_hash, 0, 1, canonical(one.spec)))
    cluster.do(c.StartDeploy(changes=plan.changes, origin=Origin(), budget_ms=1))
    promised = reserved(cluster.state)
    assert sum(r.cpu_milli for r in promised.values()) == 100 + 2 * 100 + 2 * 300
    assert sum(r.allocations for r in before.values()) == 1
    for change in plan.changes:
        for number, slot in enumerate(change.slots):
            if not slot.keep:
                cluster.do(c.ScheduleAlloc(
                    alloc=f"{change.service}-new{number:03}", service=change.service,
                    node=slot.node, slot=number, deploy=cluster.state.active_deploy))
    assert reserved(cluster.state) == promised


def test_what_is_lost_with_its_node_is_placed_anew_and_the_rest_stays():
    cluster = three_nodes()
    cluster.deploy(service("web", replicas=3))
    before = cluster.running("web")
    cluster.do(c.SetNodeStatus("node-2", "down"))
    plan = cluster.deploy(service("web", replicas=3, routes=routed("x")))
    slots = plan.changes[0].slots
    kept = {slot.keep for slot in slots if slot.keep}
    assert kept == {alloc for alloc, node in before.items() if node != "node-2"}
    assert all(slot.node != "node-2" for slot in slots)


def test_a_draining_node_keeps_what_stands_and_takes_nothing_new():
    cluster = three_nodes()
    cluster.deploy(service("web", replicas=3))
    cluster.do(c.DrainNode("node-2"))
    slots = cluster.plan(service("web", replicas=6)).changes[0].slots
    assert [slot.node for slot in slots if slot.node == "node-2"] == ["node-2"]


def test_the_budget_is_pulls_and_the_longest_chain_and_the_settle():
    cluster = three_nodes()
    cluster.deploy(service("db"))
    slow = Health(kind="tcp", deadline_ms=90_000)
    plan = cluster.plan(
        service("db", user="new", bake_ms=7_000),
        service("api", depends_on=("db",), health=slow),
        service("web", depends_on=("api",)),
        service("lone", health=slow),
    )
    assert plan.budget_ms(300_000) == 300_000 + 60_000 + 90_000 + 60_000 + 7_000


def test_what_is_new_does_not_settle():
    plan = three_nodes().plan(service("web", bake_ms=7_000))
    assert plan.budget_ms(1_000) == 1_000 + 60_000


def test_what_only_stays_or_goes_waits_for_no_health():
    cluster = three_nodes()
    cluster.deploy(service("web", replicas=2), service("api"))
    plan = cluster.plan(service("web"), prune=True)
    specs = {one.spec_hash: one.spec for one in plan.diffs if one.spec}
    assert budget_ms(plan.changes, specs, 5) == 5


def test_references_that_nothing_meets_are_named():
    cluster = three_nodes()
    cluster.deploy(service("worker", port=None))
    cluster.secret("there")
    web = service("web", depends_on=("gone",), registry_auth="ghcr", env=(
        with_secret("A", "there"), with_secret("B", "missing"),
        EnvVar("C", (AddressRef("nowhere"),)), EnvVar("D", (AddressRef("worker"),)),
    ))
    found = [(d.kind, d.name) for d in dangling([web], cluster.state)]
    assert found == [("secret", "missing"), ("registry_auth", "ghcr"), ("depends_on", "gone"),
                     ("address", "nowhere"), ("address", "worker")]


def test_a_service_that_the_deploy_removes_meets_no_reference():
    cluster = three_nodes()
    cluster.deploy(service("db"))
    web = service("web", depends_on=("db",))
    assert dangling([web], cluster.state) == ()
    assert [d.name for d in dangling([web], cluster.state, {"db"})] == ["db"]


def test_a_cycle_through_a_live_service_is_seen():
    cluster = three_nodes()
    cluster.deploy(service("a", depends_on=("b",)), service("b"))
    assert dependency_cycle([service("b", depends_on=("a",))], cluster.state) == ("a", "b", "a")


def test_what_runs_on_with_an_old_port_or_loses_its_dependency_is_warned_of():
    cluster = three_nodes()
    web = service("web", env=(EnvVar("API", (AddressRef("api"),)),))
    cluster.deploy(web, service("api"))
    assert cluster.plan(web, service("api", port=9090)).warnings == (
        "web runs on with the old port of api: mill restart web takes the new",
    )
    assert cluster.plan(replace(web, user="1"), service("api", port=9090)).warnings == ()
    cluster.deploy(web, owner="repo")
    assert "web needs api, which this removes" in cluster.plan(prune=True).warnings


def test_warnings_are_bounded():
    cluster = three_nodes()
    cluster.secret("key")
    many = [service(f"s{n}", cpu_milli=10, memory_bytes=4_000_000, env=(with_secret("K", "key"),))
            for n in range(MAX_WARNINGS + 5)]
    cluster.deploy(*many)
    cluster.secret("key")
    warnings = cluster.plan(*many).warnings
    assert len(warnings) == MAX_WARNINGS + 1
    assert warnings[-1] == "and 5 more warnings"


# -- whatever is deployed ------------------------------------------------------------------

NAMES = ("api", "db", "web", "worker")
specs = st.builds(
    service, st.sampled_from(NAMES), replicas=st.integers(0, 4),
    cpu_milli=st.sampled_from([100, 200, 700]), user=st.sampled_from(["", "1", "2"]),
    routes=st.sampled_from([(), routed("a"), routed("b")]),
    depends_on=st.sampled_from([(), ("db",)]),
)
manifests = st.lists(specs, max_size=4, unique_by=lambda s: s.name)
deploys = st.lists(
    st.tuples(manifests, st.booleans(), st.sampled_from(["manual", "repo"]), st.integers(1, 2)),
    min_size=1, max_size=4,
)


def tried(cluster: Cluster, manifest, prune: bool, owner: str, build: int):
    """The plan that was carried out, or None where it was refused."""
    try:
        return cluster.deploy(*manifest, owner=owner, prune=prune, build=build)
    except (DoesNotFit, RouteTaken):
        return None


@given(deploys)
@settings(max_examples=120, deadline=None)
def test_a_plan_carried_out_leaves_nothing_to_plan(history):
    cluster = three_nodes()
    for manifest, prune, owner, build in history:
        plan = tried(cluster, manifest, prune, owner, build)
        if plan is None or any("keeps its hotfix" in w for w in plan.warnings):
            continue
        again = cluster.plan(*manifest, owner=owner, prune=prune, build=build)
        assert again.changes == ()
        assert {one.action for one in again.diffs} <= {"unchanged"}


@given(deploys)
@settings(max_examples=120, deadline=None)
def test_what_is_unchanged_never_moves(history):
    cluster = three_nodes()
    for manifest, prune, owner, build in history:
        before = {name: cluster.running(name) for name in NAMES}
        plan = tried(cluster, manifest, prune, owner, build)
        action = {one.service: one.action for one in plan.diffs} if plan else {}
        keeps = {one.service: one.keeps for one in plan.diffs} if plan else {}
        for name in NAMES:
            if action.get(name, "unchanged") == "unchanged":
                assert cluster.running(name) == before[name]
            elif keeps[name]:
                smaller, larger = sorted((before[name], cluster.running(name)), key=len)
                assert smaller.items() <= larger.items()
            else:
                assert before[name].keys().isdisjoint(cluster.running(name))


@given(deploys)
@settings(max_examples=60, deadline=None)
def test_no_node_ever_holds_more_than_it_has(history):
    cluster = three_nodes()
    for manifest, prune, owner, build in history:
        tried(cluster, manifest, prune, owner, build)
        for node in cluster.state.nodes.values():
            held = [a for a in cluster.state.allocations.values()
                    if a.node == node.name and a.status not in ENDED]
            assert sum(a.cpu_milli for a in held) <= node.cpu_milli
            assert sum(a.memory_bytes for a in held) <= node.memory_bytes


@given(manifests, manifests, st.randoms())
@settings(max_examples=60, deadline=None)
def test_a_plan_is_the_same_for_a_manifest_and_a_state_in_any_order(first, second, rng):
    cluster = three_nodes()
    if tried(cluster, first, False, "manual", 1) is None:
        return
    try:
        plan = cluster.plan(*second)
    except (DoesNotFit, RouteTaken) as refused:
        shuffled = list(second)
        rng.shuffle(shuffled)
        with pytest.raises(type(refused)):
            cluster.plan(*shuffled)
        return
    shuffled = list(second)
    rng.shuffle(shuffled)
    cluster.state = replace(
        cluster.state,
        nodes=dict(reversed(cluster.state.nodes.items())),
        services=dict(reversed(cluster.state.services.items())),
        allocations=dict(reversed(cluster.state.allocations.items())),
    )
    again = cluster.plan(*shuffled)
    assert again == plan


@given(st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_scaling_starts_and_stops_only_the_difference(before, after):
    cluster = three_nodes()
    cluster.deploy(service("web", replicas=before))
    old = cluster.running("web")
    cluster.deploy(service("web", replicas=after))
    new = cluster.running("web")
    assert len(new) == after
    assert len(old.keys() & new.keys()) == min(before, after)
    spread = [list(new.values()).count(node) for node in cluster.state.nodes]
    assert max(spread) - min(spread) <= 1
    assert digest(service("web")) == cluster.state.services["web"].revisions[-1].digest
