"""What each command does, and what it refuses."""

from __future__ import annotations

import pytest

from reconciler.fsm import commands as c
from reconciler.fsm.apply import KEPT_REQUESTS, Repeated, apply
from reconciler.fsm.codec import Entry, decode_state, encode_state
from reconciler.fsm.records import ENDED, Failure, SecretPin, Slot, Source
from tests.fsm.machine import Machine, cluster, service


def test_a_cluster_is_founded_once() -> None:
    machine = cluster()
    assert "exists already" in machine.do(c.InitCluster("other", "t", "1" * 64))
    assert machine.state.cluster == "test"


def test_two_nodes_never_share_a_number() -> None:
    machine = cluster()
    refused = machine.do(c.RegisterNode(name="other", number=1, api="a:1", agent="a:2",
                                        cpu_milli=1, memory_bytes=1))
    assert "node-1" in refused


def test_logged_time_never_goes_back() -> None:
    machine = cluster()
    before = machine.state.time_ms
    machine.now_ms -= 60_000
    machine.do(c.Trim(0))
    assert machine.state.time_ms == before


def test_a_second_deploy_is_refused_naming_the_first() -> None:
    machine = cluster()
    deploy = machine.start(service())
    refused = machine.do(c.StartDeploy(changes=(), origin=machine.state.deploys[deploy].origin,
                                       budget_ms=1))
    assert deploy in refused


def test_a_deploy_planned_on_a_revision_that_moved_on_is_refused() -> None:
    machine = cluster()
    machine.deploy(service())
    deploy = machine.deploy(service(user="1"))
    change = machine.state.deploys[deploy].changes[0]
    refused = machine.do(c.StartDeploy(changes=(change,), origin=_manual(), budget_ms=1))
    assert "revision 2, not 1" in refused


def test_a_spec_is_kept_only_under_its_own_hash() -> None:
    machine = cluster()
    assert "another hash" in machine.do(c.StoreSpec("f" * 64, 0, 1, _encoded()))
    assert machine.state.specs == {}


def test_a_spec_in_pieces_is_whole_at_the_last_piece() -> None:
    machine = cluster()
    spec = service(command=tuple("abcdefgh"))
    data, key = _encoded(spec), _hash(spec)
    cut = len(data) // 2
    machine.do(c.StoreSpec(key, 0, 2, data[:cut]))
    assert key not in machine.state.specs
    machine.do(c.StoreSpec(key, 0, 2, data[:cut]))  # a successor sends all again
    machine.do(c.StoreSpec(key, 1, 2, data[cut:]))
    assert machine.state.specs[key] == spec


def test_a_slot_is_filled_once() -> None:
    machine = cluster()
    deploy = machine.start(service())
    machine.place(deploy)
    refused = machine.do(c.ScheduleAlloc(alloc="web-other", service="web", node="node-1", slot=0,
                                         deploy=deploy))
    assert "held by" in refused


def test_addresses_on_a_node_differ_and_come_back_late() -> None:
    machine = cluster(1)
    seen = [machine.state.allocations[a].address
            for _ in range(30) for a in [_replace(machine)]]
    assert len(set(seen)) == 30


def test_an_allocation_moves_only_from_where_it_was_thought_to_be() -> None:
    machine = cluster()
    (alloc,) = machine.place(machine.start(service()))
    refused = machine.do(c.SetAllocStatus(alloc=alloc, status="healthy", was="running"))
    assert "pending" in refused


def test_nothing_revives_an_allocation_that_ended() -> None:
    machine = cluster()
    (alloc,) = machine.place(machine.start(service()))
    machine.walk(alloc, "failed")
    for status in ("pending", "running", "healthy"):
        assert machine.do(c.SetAllocStatus(alloc=alloc, status=status, was="failed"))
    assert machine.state.allocations[alloc].status == "failed"


def test_a_commit_is_refused_while_a_slot_is_not_healthy() -> None:
    machine = cluster()
    deploy = machine.start(service(replicas=2))
    first, _ = machine.place(deploy)
    machine.walk(first, "starting", "running", "healthy")
    assert "slot 1 of web" in machine.do(c.CommitDeploy(deploy))
    assert machine.state.services["web"].live == 0


def test_a_commit_flips_all_services_at_once() -> None:
    machine = cluster()
    machine.deploy(service("web"), service("api"))
    deploy = machine.start(service("web", user="1"), service("api", user="1"))
    for alloc in machine.place(deploy):
        machine.walk(alloc, "starting", "running", "healthy")
    before = {s.name: s.live for s in machine.state.services.values()}
    machine.do(c.CommitDeploy(deploy))
    assert before == {"web": 1, "api": 1}
    assert {s.live for s in machine.state.services.values()} == {2}
    assert {a.status for a in machine.state.allocations.values() if not a.live} == {"stopping"}


def test_kept_allocations_stay_live_over_a_commit() -> None:
    machine = cluster()
    machine.deploy(service(replicas=1))
    (kept,) = machine.state.allocations
    spec = service(replicas=2)
    deploy = machine.start(spec)
    change = machine.state.deploys[deploy].changes[0]
    machine.do(c.RollBackDeploy(deploy, Failure(reason="replanned")))
    machine.do(c.EndRollback(deploy, "rolled_back"))
    machine.do(c.StoreSpec(_hash(spec), 0, 1, _encoded(spec)))
    slots = (Slot("node-1", kept), Slot("node-2"))
    machine.do(c.StartDeploy(changes=(_with(change, slots),), origin=_manual(), budget_ms=1))
    deploy = machine.state.active_deploy
    for alloc in machine.place(deploy):
        machine.walk(alloc, "starting", "running", "healthy")
    assert not machine.do(c.CommitDeploy(deploy))
    assert machine.state.allocations[kept].live
    assert machine.state.allocations[kept].revision == 2


def test_there_is_no_way_back_after_the_commit() -> None:
    machine = cluster()
    deploy = machine.start(service())
    for alloc in machine.place(deploy):
        machine.walk(alloc, "starting", "running", "healthy")
    machine.do(c.CommitDeploy(deploy))
    assert "no way back" in machine.do(c.RollBackDeploy(deploy, Failure(reason="late")))


def test_a_rollback_leaves_services_as_they_were() -> None:
    machine = cluster()
    machine.deploy(service())
    before = machine.state.services
    deploy = machine.start(service(user="1"), service("new"))
    machine.place(deploy)
    machine.do(c.RollBackDeploy(deploy, Failure(reason="bad", service="web")))
    for alloc in machine.state.of_deploy(deploy):
        machine.walk(alloc.id, "stopped")
    machine.do(c.EndRollback(deploy, "rolled_back"))
    assert machine.state.services == before
    assert machine.state.deploys[deploy].outcome == "rolled_back"
    assert len(machine.state.specs) == 1


def test_a_node_that_goes_down_loses_its_allocations_in_the_same_entry() -> None:
    machine = cluster()
    machine.deploy(service(replicas=3), nodes=3)
    machine.do(c.SetNodeStatus("node-2", "down", "silent"))
    lost = [a for a in machine.state.allocations.values() if a.status == "lost"]
    assert [a.node for a in lost] == ["node-2"]
    assert not lost[0].live


def test_a_lost_slot_is_filled_again_and_is_live_at_once() -> None:
    machine = cluster()
    machine.deploy(service(replicas=2), nodes=2)
    machine.do(c.SetNodeStatus("node-2", "down", "silent"))
    assert not machine.do(c.ScheduleAlloc(alloc="web-heal", service="web", node="node-3", slot=1))
    assert machine.state.allocations["web-heal"].live


@pytest.mark.parametrize("ended", ["stopped", "failed", "lost"])
def test_what_ended_frees_its_room(ended: str) -> None:
    machine = cluster()
    (alloc,) = machine.place(machine.start(service()))
    machine.walk(alloc, "starting", ended)
    assert list(machine.state.of_node("node-1")) == []


def test_a_slot_that_a_commit_took_away_is_not_healed_any_more() -> None:
    """The leader decided on the revision before; its command comes after the commit."""
    machine = cluster()
    machine.deploy(service(replicas=2), nodes=2)
    machine.deploy(service(replicas=1))
    refused = machine.do(c.ScheduleAlloc(alloc="web-late", service="web", node="node-3", slot=1,
                                         revision=1))
    assert "revision 2, not 1" in refused


def test_a_restart_that_ended_before_it_was_seen_running_is_counted() -> None:
    machine = cluster()
    machine.deploy(service())
    (alloc,) = machine.state.allocations
    machine.walk(alloc, "running")
    for restarts in (1, 2, 3):
        was = machine.state.allocations[alloc].status
        assert not machine.do(c.SetAllocStatus(
            alloc=alloc, status="starting", was=was, restarts=restarts))
    assert machine.state.allocations[alloc].restarts == 3
    assert machine.do(c.SetAllocStatus(alloc=alloc, status="starting", was="starting", restarts=3))


def test_an_idempotency_key_makes_one_deploy_even_of_two_admitted_at_once() -> None:
    machine = cluster()
    one = c.StartDeploy(changes=(), origin=_manual(), budget_ms=1, key="k")
    assert not machine.do(one)
    first = machine.state.active_deploy
    assert not machine.do(c.FinishDeploy(first))
    assert first in machine.do(one)


def test_a_deploy_whose_secret_went_meanwhile_is_refused() -> None:
    machine = cluster()
    machine.do(c.SetSecret("db.url", b"n" * 12, b"sealed"))
    deploy = machine.deploy(service(), secrets=(SecretPin("db.url", 1),))
    machine.deploy(service(user="1"))
    change = _at(machine.state.deploys[deploy].changes[0], from_revision=2, to_revision=3)
    assert machine.do(c.DeleteSecret("db.url")) == ""
    assert "secret db.url" in machine.do(
        c.StartDeploy(changes=(change,), origin=_manual(), budget_ms=1))


def test_a_secret_in_use_is_not_deleted_and_says_who_uses_it() -> None:
    machine = cluster()
    machine.do(c.SetSecret("db.url", b"n" * 12, b"sealed"))
    machine.deploy(service(), secrets=(SecretPin("db.url", 1),))
    assert "web" in machine.do(c.DeleteSecret("db.url"))
    machine.deploy(service(user="1"))
    assert machine.do(c.DeleteSecret("db.url")) == ""


def test_versions_that_a_kept_revision_pins_stay() -> None:
    machine = cluster()
    machine.do(c.SetSecret("a", b"n" * 12, b"1"))
    machine.deploy(service(), secrets=(SecretPin("a", 1),))
    for number in range(40):
        machine.do(c.SetSecret("a", b"n" * 12, b"%d" % number))
    versions = [v.version for v in machine.state.secrets["a"].versions]
    assert versions[0] == 1
    assert len(versions) <= 22


def test_revisions_past_the_fifth_are_forgotten_with_their_specs() -> None:
    machine = cluster()
    for number in range(8):
        machine.deploy(service(user=str(number)))
    assert [r.number for r in machine.state.services["web"].revisions] == [4, 5, 6, 7, 8]
    assert len(machine.state.specs) == 5


def test_trim_keeps_the_last_deploys_and_forgets_what_ended() -> None:
    machine = cluster()
    for number in range(30):
        machine.deploy(service(user=str(number)))
    machine.do(c.Trim(machine.now_ms + 1))
    assert len(machine.state.deploys) == 20
    assert all(a.status not in ENDED for a in machine.state.allocations.values())
    assert set(machine.state.deploy_events) == set(machine.state.deploys)


def test_facts_after_the_terminal_event_are_in_the_cluster_history_alone() -> None:
    machine = cluster()
    deploy = machine.deploy(service())
    machine.do(c.WarnDeploy(deploy, "late"))
    assert machine.state.deploy_events[deploy][-1].kind == "done"
    assert next(machine.state.events_after(machine.state.index - 1)).deploy == deploy


def test_a_source_is_put_once_and_leaves_its_services_manual() -> None:
    machine = cluster()
    source = Source(name="repo", url="file:///srv/repo")
    assert machine.do(c.PutSource(source)) == ""
    assert "exists already" in machine.do(c.PutSource(source))
    assert machine.do(c.RemoveSource("repo")) == ""
    assert machine.state.sources == {}


def test_since_moves_only_with_the_status() -> None:
    machine = cluster()
    machine.do(c.PutSource(Source(name="repo", url="file:///srv/repo")))
    machine.do(c.ObserveSource(name="repo", status="failing", reason="one"))
    since = machine.state.sources["repo"].since_ms
    machine.do(c.ObserveSource(name="repo", status="failing", reason="two"))
    assert machine.state.sources["repo"].since_ms == since


def _replace(machine: Machine) -> str:
    """Deploy again, so that the allocation gets a new address; its id."""
    deploy = machine.deploy(service(user=str(machine.state.index)))
    return next(a.id for a in machine.state.allocations.values() if a.deploy == deploy)


def _encoded(spec: object = None) -> bytes:
    from reconciler.language.spec import canonical
    return canonical(spec or service())  # type: ignore[arg-type]  # a spec


def _hash(spec: object) -> str:
    from reconciler.language.spec import spec_hash
    return spec_hash(spec)  # type: ignore[arg-type]  # a spec


def _manual() -> object:
    from reconciler.fsm.records import Origin
    return Origin()


def _at(change: object, **fields: object) -> object:
    from msgspec.structs import replace
    return replace(change, **fields)  # type: ignore[type-var]  # a Change


def _with(change: object, slots: tuple[Slot, ...]) -> object:
    from msgspec.structs import replace
    return replace(change, slots=slots)  # type: ignore[type-var]  # a Change


def test_a_request_that_names_itself_is_carried_out_once_over_snapshots_and_leaders() -> None:
    machine = cluster()
    write = c.SetSecret("a", b"n", b"sealed", request="t PUT /v1/secrets/a key-1")
    assert not machine.do(write)
    first = machine.state.index
    machine.state = decode_state(encode_state(machine.state))
    state, result = apply(machine.state, first + 1, Entry(machine.now_ms, write))
    assert result == Repeated(first)
    assert len(state.secrets["a"].versions) == 1
    assert not machine.do(c.SetSecret("a", b"m", b"sealed", request="t PUT /v1/secrets/a key-2"))
    assert len(machine.state.secrets["a"].versions) == 2


def test_a_request_that_was_refused_may_be_asked_again_and_old_ones_are_forgotten() -> None:
    machine = cluster()
    gone = c.DeleteSecret("a", request="t DELETE /v1/secrets/a key")
    assert machine.do(gone)
    assert not machine.state.requests
    assert not machine.do(c.SetSecret("a", b"n", b"sealed", request="t PUT a key"))
    assert not machine.do(gone)
    assert len(machine.state.requests) == 2
    assert not machine.do(c.Trim(machine.now_ms + 10_000))
    assert not machine.state.requests
    for number in range(KEPT_REQUESTS + 5):
        machine.do(c.SetSecret(f"s{number % 7}", b"n", b"x", request=f"r{number}"))
    assert len(machine.state.requests) == KEPT_REQUESTS
    assert "r4" not in machine.state.requests
    assert "r5" in machine.state.requests
