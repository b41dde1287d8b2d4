"""What a deploy changes, against states that the real state machine made."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from reconciler.fsm.records import FieldChange, SecretPin
from reconciler.language.spec import EnvVar, Health, Listen, Text
from reconciler.plan.diff import OwnedElsewhere, RouteTaken, Wish, diff
from reconciler.plan.plan import make_plan
from tests.plan.cluster import digest, routed, service, three_nodes, with_secret


def actions(plan) -> dict[str, str]:
    return {one.service: one.action for one in plan.diffs}


def test_a_new_service_is_created_at_revision_one():
    [one] = three_nodes().plan(service("web")).diffs
    assert (one.action, one.from_revision, one.to_revision) == ("create", 0, 1)
    assert one.changes == ()


def test_the_same_manifest_again_changes_nothing():
    cluster = three_nodes()
    cluster.deploy(service("web"), service("api"))
    plan = cluster.plan(service("web"), service("api"))
    assert actions(plan) == {"api": "unchanged", "web": "unchanged"}
    assert plan.changes == ()


def test_a_changed_field_is_shown_with_both_sides():
    cluster = three_nodes()
    cluster.deploy(service("web", replicas=2, memory_bytes=512_000_000))
    plan = cluster.plan(service("web", replicas=3, memory_bytes=1 << 30,
                                health=Health(kind="http", path="/up")))
    assert plan.diffs[0].changes == (
        FieldChange("replicas", "2", "3"),
        FieldChange("memory", "512M", "1Gi"),
        FieldChange("health", "tcp", "path /up"),
    )


def test_a_moved_tag_alone_is_an_update_of_the_image():
    cluster = three_nodes()
    web = service("web")
    cluster.deploy(web)
    [one] = cluster.plan(web, build=2).diffs
    assert one.action == "update"
    assert not one.keeps
    assert one.changes == (
        FieldChange("image", f"{web.image}@{digest(web)}", f"{web.image}@{digest(web, 2)}"),
    )


def test_a_secret_is_shown_by_its_name_alone():
    cluster = three_nodes()
    cluster.secret("db.url")
    cluster.deploy(service("web", env=(EnvVar("DB", (Text("$${x} plain"),)),)))
    [one] = cluster.plan(service("web", env=(with_secret("DB", "db.url"),))).diffs
    assert one.changes == (FieldChange("env.DB", '"$$${x} plain"', '"${secret(db.url)}"'),)
    assert one.secrets == (SecretPin("db.url", 1),)


def test_long_values_that_differ_far_in_still_look_different():
    cluster = three_nodes()
    long = "x" * 5000
    cluster.deploy(service("web", env=(EnvVar("A", (Text(long + "1"),)),)))
    [one] = cluster.plan(service("web", env=(EnvVar("A", (Text(long + "2"),)),))).diffs
    [change] = one.changes
    assert change.old != change.new
    assert len(change.new) < 300


def test_scaling_keeps_every_container_and_a_new_secret_does_not_move_them():
    cluster = three_nodes()
    cluster.secret("key")
    web = service("web", replicas=2, env=(with_secret("KEY", "key"),))
    cluster.deploy(web)
    before = cluster.running("web")
    cluster.secret("key")
    plan = cluster.deploy(replace(web, replicas=3))
    assert plan.diffs[0].keeps
    assert plan.diffs[0].secrets == (SecretPin("key", 1),)
    assert any("mill restart web" in warning for warning in plan.warnings)
    assert before.items() <= cluster.running("web").items()
    assert len(cluster.running("web")) == 3


def test_a_newer_secret_alone_is_unchanged_with_a_warning():
    cluster = three_nodes()
    cluster.secret("key")
    web = service("web", env=(with_secret("KEY", "key"),))
    cluster.deploy(web)
    cluster.secret("key")
    plan = cluster.plan(web)
    assert plan.changes == ()
    assert plan.warnings == (
        "web runs with an older version of secret key: mill restart web takes the newest",
    )


def test_a_change_of_what_runs_pins_the_newest_secret():
    cluster = three_nodes()
    cluster.secret("key")
    web = service("web", env=(with_secret("KEY", "key"),))
    cluster.deploy(web)
    cluster.secret("key")
    [one] = cluster.plan(replace(web, user="1000")).diffs
    assert one.secrets == (SecretPin("key", 2),)


def test_a_restart_replaces_every_container_of_the_same_spec():
    cluster = three_nodes()
    web = service("web", replicas=2)
    cluster.deploy(web)
    before = cluster.running("web")
    plan = make_plan([Wish(web, digest(web), restart=True)], cluster.state)
    cluster.carry_out(plan)
    assert plan.diffs[0].generation == 1
    assert before.keys().isdisjoint(cluster.running("web"))
    assert cluster.plan(web).changes == ()


def test_only_prune_removes_and_only_what_its_owner_has():
    cluster = three_nodes()
    cluster.deploy(service("web"), service("api"))
    cluster.deploy(service("site"), owner="repo")
    assert actions(cluster.plan(service("web"))) == {"web": "unchanged"}
    plan = cluster.plan(service("web"), prune=True)
    assert actions(plan) == {"web": "unchanged", "api": "remove"}
    assert actions(cluster.plan(owner="repo", prune=True)) == {"site": "remove"}


def test_removals_come_last():
    cluster = three_nodes()
    cluster.deploy(service("a"), service("z"))
    plan = cluster.plan(service("m"), service("z", replicas=2), prune=True)
    assert [one.action for one in plan.diffs] == ["create", "update", "remove"]


def test_a_source_may_not_take_a_service_of_another():
    cluster = three_nodes()
    cluster.deploy(service("web"), owner="first")
    with pytest.raises(OwnedElsewhere, match="web belongs to source first"):
        cluster.plan(service("web"), owner="second")


def test_a_source_adopts_a_manual_service_without_touching_it():
    cluster = three_nodes()
    cluster.deploy(service("web"))
    before = cluster.running("web")
    plan = cluster.deploy(service("web"), owner="repo")
    assert [c.action for c in plan.changes] == ["unchanged"]
    assert cluster.state.services["web"].owner == "repo"
    assert cluster.running("web") == before
    assert cluster.plan(service("web"), owner="repo").changes == ()


def test_a_hotfix_diverges_and_keeps_the_owner():
    cluster = three_nodes()
    cluster.deploy(service("web"), owner="repo")
    cluster.deploy(service("web", user="hot"))
    record = cluster.state.services["web"]
    assert (record.owner, record.diverged) == ("repo", True)


def test_a_manual_deploy_of_the_same_is_no_hotfix():
    cluster = three_nodes()
    cluster.deploy(service("web"), owner="repo")
    assert cluster.plan(service("web")).changes == ()


def test_a_commit_that_leaves_the_service_alone_keeps_its_hotfix():
    cluster = three_nodes()
    cluster.deploy(service("web"), owner="repo")
    cluster.deploy(service("web", user="hot"))
    plan = cluster.deploy(service("web"), service("api"), owner="repo")
    assert actions(plan) == {"api": "create", "web": "unchanged"}
    assert "web keeps its hotfix: this commit does not change it" in plan.warnings
    assert cluster.state.services["web"].diverged


def test_a_commit_that_changes_the_service_ends_its_hotfix():
    cluster = three_nodes()
    cluster.deploy(service("web"), owner="repo")
    cluster.deploy(service("web", user="hot"))
    cluster.deploy(service("web", user="committed"), owner="repo")
    assert not cluster.state.services["web"].diverged


def test_a_branch_that_comes_to_say_the_same_ends_the_hotfix_without_a_restart():
    cluster = three_nodes()
    cluster.deploy(service("web"), owner="repo")
    cluster.deploy(service("web", user="hot"))
    before = cluster.running("web")
    cluster.deploy(service("web", user="hot"), owner="repo")
    assert not cluster.state.services["web"].diverged
    assert cluster.running("web") == before


def test_a_hotfix_that_was_taken_back_by_hand_ends_with_the_next_commit():
    cluster = three_nodes()
    cluster.deploy(service("web"), owner="repo")
    cluster.deploy(service("web", user="hot"))
    cluster.deploy(service("web"))
    assert cluster.state.services["web"].diverged
    plan = cluster.deploy(service("web"), owner="repo")
    assert actions(plan) == {"web": "unchanged"}
    assert not cluster.state.services["web"].diverged


def test_a_restart_neither_begins_nor_ends_a_hotfix():
    cluster = three_nodes()
    web = service("web")
    cluster.deploy(web, owner="repo")
    cluster.carry_out(make_plan([Wish(web, digest(web), restart=True)], cluster.state))
    assert not cluster.state.services["web"].diverged
    hot = service("web", user="hot")
    cluster.deploy(hot)
    cluster.carry_out(make_plan([Wish(hot, digest(hot), restart=True)], cluster.state))
    assert cluster.state.services["web"].diverged


def test_a_route_of_another_manifest_is_a_conflict_that_names_its_owner():
    cluster = three_nodes()
    cluster.deploy(service("web", routes=routed("app.example.com")), owner="repo")
    with pytest.raises(RouteTaken, match="claimed by web, owned by repo") as caught:
        cluster.plan(service("other", routes=routed("app.example.com")))
    assert caught.value.status == 409
    cluster.plan(service("other", routes=routed("app.example.com", "/api")))


def test_a_route_is_free_for_who_takes_it_from_a_service_of_the_same_deploy():
    cluster = three_nodes()
    cluster.deploy(service("web", routes=routed("app.example.com")))
    moved = service("other", routes=routed("app.example.com"))
    assert actions(cluster.plan(moved, prune=True)) == {"other": "create", "web": "remove"}
    assert actions(cluster.plan(moved, service("web")))["other"] == "create"


def test_an_edge_port_has_one_holder_too():
    cluster = three_nodes()
    cluster.deploy(service("db", listens=(Listen(protocol="tcp", port=5432),)))
    with pytest.raises(RouteTaken, match="tcp port 5432"):
        cluster.plan(service("db2", listens=(Listen(protocol="tcp", port=5432),)))


def test_revisions_count_on_after_a_removal_of_another_and_from_one_after_its_own():
    cluster = three_nodes()
    cluster.deploy(service("web"))
    cluster.deploy(service("web", user="1"))
    [one] = cluster.plan(service("web", user="2")).diffs
    assert (one.from_revision, one.to_revision) == (2, 3)
    cluster.deploy(prune=True)
    [again] = cluster.plan(service("web")).diffs
    assert (again.action, again.to_revision) == ("create", 1)


def test_a_diff_is_the_same_for_wishes_in_any_order():
    cluster = three_nodes()
    cluster.deploy(service("a"), service("b"))
    wishes = [Wish(service(n, replicas=2), digest(service(n))) for n in ("a", "b", "c")]
    forward = diff(wishes, cluster.state)
    assert diff(reversed(wishes), cluster.state) == forward


def test_the_view_has_the_shape_of_the_contract():
    cluster = three_nodes()
    cluster.deploy(service("web", replicas=2))
    plan = cluster.plan(service("web", replicas=3))
    shown = msgspec.to_builtins(plan.view)
    assert set(shown) == {"services", "warnings"}
    [row] = shown["services"]
    assert list(row) == ["name", "action", "changes", "strategy", "reason", "image", "placements"]
    assert row["changes"] == ({"field": "replicas", "old": "2", "new": "3"},)
    assert row["image"] == f"{service('web').image}@{digest(service('web'))}"
    assert [p["kept"] for p in row["placements"]] == [True, True, False]
    assert sorted(p["node"] for p in row["placements"]) == ["node-1", "node-2", "node-3"]
