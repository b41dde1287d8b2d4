"""Events of a deploy's stream as lines of its transcript; a plan as text."""

from __future__ import annotations

import unicodedata
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from reconciler.api.client import DeployEvent, Step
from reconciler.api.types import Placement, PlanAnswer, ServicePlan
from reconciler.cli.render import Transcript, plan_lines
from reconciler.fsm.records import FieldChange

DIGEST = "sha256:" + "ab" * 32


def event(kind: str = "progress", **fields: Any) -> DeployEvent:
    return DeployEvent(1, kind, msgspec.convert(fields, Step), msgspec.json.encode(fields).decode())


def told(*events: DeployEvent, actions: dict[str, str] | None = None) -> list[str]:
    transcript = Transcript()
    transcript.actions = actions or {}
    return [line for one in events for line in transcript.lines(one)]


def test_first_deploy_reads_as_the_contract_has_it() -> None:
    assert told(
        event(phase="started", deploy="d-12", services=2),
        event(phase="pulling"),
        event(phase="scheduled", service="web", alloc="web-aaaaaa", node="node-2"),
        event(phase="scheduled", service="web", alloc="web-bbbbbb", node="node-3"),
        event(phase="scheduled", service="api", alloc="api-cccccc", node="node-1"),
        event(phase="pulling", image="r/web:v1", node="node-2", bytes=10, total=100),
        event(phase="pulled", image="r/web:v1", node="node-2", cached=False),
        event(phase="pulled"),
        event(phase="starting", service="web", alloc="web-aaaaaa", node="node-2"),
        event(phase="healthy", service="web", alloc="web-aaaaaa", node="node-2", elapsed=1.0),
        event(phase="healthy", service="web", alloc="web-bbbbbb", node="node-3", elapsed=2.0),
        event(phase="healthy", service="web", elapsed=2.0),
        event(phase="healthy", service="api", alloc="api-cccccc", node="node-1", elapsed=1.2),
        event(phase="healthy", service="api", elapsed=1.2),
        event(phase="routed"),
        event("done", elapsed=4.8, success=True, outcome="deployed", changed=2),
    ) == [
        "  pulling images...",
        "  web: scheduled on node-2",
        "  web: scheduled on node-3",
        "  api: scheduled on node-1",
        "  web: healthy (2.0s)",
        "  api: healthy (1.2s)",
        "  deployed (4.8s)",
    ]


def test_update_names_each_old_instance_and_a_removed_service_once() -> None:
    assert told(
        event(phase="stopped", service="web", alloc="web-aaaaaa", node="node-1"),
        event(phase="stopped", service="old", alloc="old-aaaaaa", node="node-1"),
        event(phase="stopped", service="web", alloc="web-bbbbbb", node="node-2"),
        event(phase="stopped", service="old", alloc="old-bbbbbb", node="node-2"),
        event("done", elapsed=1.0, success=True, outcome="deployed", changed=3),
        actions={"web": "update", "old": "remove", "idle": "remove"},
    ) == [
        "  web: old instance stopped",
        "  web: old instance stopped",
        "  idle: removed",
        "  old: removed",
        "  deployed (1.0s)",
    ]


def test_nothing_to_do_is_said() -> None:
    assert told(event("done", elapsed=0.0, success=True, changed=0)) == ["  no changes"]


def test_warnings_stand_where_they_came() -> None:
    assert told(event(phase="pulling"), event(phase="warning", message="node-3 is silent")) == [
        "  pulling images...", "  warning: node-3 is silent"]


def failed(outcome: str = "rolled_back", **fields: Any) -> DeployEvent:
    return event("failed", elapsed=6.1, success=False, outcome=outcome, reason="exited with code 3",
                 **fields)


def test_failure_names_the_service_before_the_rollback() -> None:
    assert told(
        event(phase="rolling_back", reason="exited with code 3"),
        failed(service="web", alloc="web-aaaaaa", node="node-1", logs=["one", "\ttwo"]),
    ) == [
        "  web: failed: exited with code 3",
        "    one",
        "            two",
        "  rolling back...",
        "  rolled back (6.1s): nothing changed",
    ]


def test_rollback_of_a_replaced_batch_says_what_runs_again() -> None:
    lines = told(
        event(phase="stopped", service="web", alloc="web-aaaaaa", node="node-1"),
        event(phase="rolling_back", reason="exited with code 3"),
        failed(service="web"),
        actions={"web": "update"},
    )
    assert lines[-1] == "  rolled back (6.1s): previous revisions restored"


def test_failure_of_no_single_service_is_the_deploys() -> None:
    assert told(failed())[0] == "  failed: exited with code 3"


def test_cancelled_and_failed_rollbacks_are_told_apart() -> None:
    assert told(failed("cancelled")) == [
        "  rolling back...", "  cancelled (6.1s): nothing changed"]
    assert told(failed("rollback_failed"))[-1].startswith("  rollback failed (6.1s): ")


def test_phases_of_newer_versions_add_nothing() -> None:
    assert told(event(phase="baking", service="web")) == []


@given(st.text(), st.sampled_from(["scheduled", "healthy", "stopped", "warning"]))
def test_no_control_character_reaches_a_line(text: str, phase: str) -> None:
    lines = told(
        event(phase=phase, service=text, node=text, message=text, elapsed=1.0),
        failed(service=text, logs=[text, text]),
    )
    for line in lines:
        assert not any(unicodedata.category(c) in ("Cc", "Cf") for c in line)


def service_plan(name: str, action: str, **fields: Any) -> ServicePlan:
    base: dict[str, Any] = {
        "name": name, "action": action, "changes": (), "strategy": "surge", "reason": "it fits",
        "image": f"r/{name}:v1@{DIGEST}", "placements": ()}
    return ServicePlan(**{**base, **fields})


def test_plan_reads_service_by_service_with_changes_and_places() -> None:
    plan = PlanAnswer(index=3, warnings=("node-3 is down",), services=(
        service_plan("api", "create", placements=(Placement("node-1", False),)),
        service_plan("web", "update", changes=(FieldChange("cpu", "0.25", "0.5"),
                                               FieldChange("env.A", "", "b")),
                     placements=(Placement("node-1", True), Placement("node-2", False))),
        service_plan("old", "remove", strategy="", reason=""),
        service_plan("idle", "unchanged", strategy="", reason=""),
    ))
    assert plan_lines(plan) == [
        "  api: create (surge: it fits)",
        "    image: r/api:v1@sha256:abababababab…",
        "    on node-1",
        "  web: update (surge: it fits)",
        "    cpu: 0.25 → 0.5",
        "    env.A: (none) → b",
        "    on node-1 (stays)",
        "    on node-2",
        "  old: remove",
        "  idle: unchanged",
        "  warning: node-3 is down",
        "  plan: 1 to create, 1 to update, 1 to remove, 1 unchanged",
    ]


def test_plan_without_changes_says_so() -> None:
    plan = PlanAnswer(index=3, warnings=(), services=(service_plan("web", "unchanged"),))
    assert plan_lines(plan)[-1] == "  no changes"
