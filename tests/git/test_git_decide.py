"""The table of decisions: a source's state and what was found, to what is done."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from reconciler.fsm import commands as c
from reconciler.fsm.apply import apply
from reconciler.fsm.codec import Entry
from reconciler.fsm.commands import ObserveSource
from reconciler.fsm.records import Deploy, Failure, Origin, Outcome, Service, Source, SourceStatus
from reconciler.fsm.state import State
from reconciler.git.decide import (
    Apply,
    Ask,
    Blocked,
    Deployed,
    Emptied,
    Invalid,
    Rest,
    Result,
    Retryable,
    RolledBack,
    decide,
    inherited,
    next_look_s,
    observe,
    on_result,
    settled_head,
)
from reconciler.git.findings import Commit, Found, Missing, Refused, Unchanged, Unreachable

A, B = "a" * 40, "b" * 40
NEW = Commit(B, {"web.mill": b"#"})
BARE = Commit(B, {})
OWNED = {"web": Service(name="web", vip="10.77.255.1", live=1, owner="app")}
FRESH = Source(name="app", url="/srv/app")
SYNCED = replace(FRESH, status="synced", head=A, applied=A)
BAD = replace(SYNCED, status="failing", reason="bbbbbbb was rolled back by d-9: x", head=B,
              quarantined=(B,))
AWAY = replace(SYNCED, status="unreachable", reason="away")


def seen(status: SourceStatus, reason: str = "", head: str = A, applied: str = A) -> ObserveSource:
    return ObserveSource(name="app", status=status, reason=reason, head=head, applied=applied)


def ended(outcome: Outcome, commit: str = B) -> State:
    deploy = Deploy(id="d-9", changes=(), started_ms=5, deadline_ms=9, outcome=outcome,
                    failure=Failure(reason="web is ill") if "roll" in outcome else None,
                    origin=Origin(kind="git", source="app", commit=commit))
    return State(deploys={"d-9": deploy}, active_deploy="d-9" if outcome == "running" else "")


EMPTY_HELD = ("bbbbbbb would remove every service of this source: there is no .mill file below /; "
              "if that is meant: mill git sync app --allow-empty")


@pytest.mark.parametrize(("source", "found", "does"), [
    (FRESH, NEW, Apply(NEW)),
    (SYNCED, NEW, Apply(NEW)),
    (SYNCED, Unchanged(A), Rest(None, A)),
    (SYNCED, Commit(A, {"web.mill": b"#"}), Rest(None, A)),
    (AWAY, Unchanged(A), Rest(seen("synced"), A)),
    (AWAY, Unreachable("away"), Rest(None)),
    (SYNCED, Unreachable("away"), Rest(seen("unreachable", "away"))),
    (AWAY, Unreachable("gone"), Rest(seen("unreachable", "gone"))),
    (SYNCED, Missing("no branch main"), Rest(seen("failing", "no branch main"))),
    (SYNCED, Missing("no folder", B), Rest(seen("failing", "no folder", B), B)),
    (SYNCED, Refused("bomb", B), Rest(seen("failing", "bomb", B), B)),
    (BAD, Unchanged(B), Rest(None, B)),
    (BAD, NEW, Rest(None, B)),
    (replace(BAD, status="unreachable"), Unchanged(B),
     Rest(seen("failing", "bbbbbbb was rolled back: it was rolled back before", B), B)),
    (BAD, Commit("c" * 40, {"web.mill": b"#"}), Apply(Commit("c" * 40, {"web.mill": b"#"}))),
    (SYNCED, BARE, Rest(seen("held", EMPTY_HELD, B), B)),
])
def test_what_is_found_decides(source: Source, found: Found, does: Rest | Apply) -> None:
    assert decide(State(services=OWNED), source, found) == does


def test_a_forced_look_tries_a_quarantined_commit_again() -> None:
    assert decide(State(), BAD, NEW, Ask(forced=True)) == Apply(NEW)


def test_an_emptied_source_is_applied_when_a_person_allows_it() -> None:
    assert decide(State(services=OWNED), SYNCED, BARE, Ask(allow_empty=True)) == Apply(BARE)


def test_an_empty_folder_of_a_source_that_owns_nothing_is_synced_and_says_so() -> None:
    told = Rest(seen("synced", "there is no .mill file below /", B, B), B)
    assert decide(State(), SYNCED, BARE) == told


def test_services_of_others_do_not_hold_an_empty_commit() -> None:
    others = {"web": replace(OWNED["web"], owner="manual"), "api": replace(OWNED["web"], live=0)}
    step = decide(State(services=others), SYNCED, BARE)
    assert isinstance(step, Rest)
    assert step.command is not None
    assert step.command.status == "synced"


def test_the_reason_of_a_quarantine_comes_back_from_the_deploys() -> None:
    step = decide(ended("rolled_back"), replace(BAD, status="unreachable"), Unchanged(B))
    assert step == Rest(seen("failing", "bbbbbbb was rolled back by d-9: web is ill", B), B)


@pytest.mark.parametrize(("result", "command"), [
    (Deployed("d-9"), seen("synced", "", B, B)),
    (Deployed(), seen("synced", "", B, B)),
    (Invalid("web.mill:4:3: unknown"), seen("failing", "web.mill:4:3: unknown", B)),
    (RolledBack("d-9", "web is ill"),
     replace(seen("failing", "bbbbbbb was rolled back by d-9: web is ill", B), quarantine=B)),
    (Blocked("d-8 runs"), seen("waiting", "d-8 runs", B)),
    (Retryable("registry away"), seen("waiting", "registry away", B)),
    (Emptied("x"), seen("held", EMPTY_HELD.replace("there is no .mill file below /", "x"), B)),
])
def test_what_a_deploy_came_to_is_recorded(result: Result, command: ObserveSource) -> None:
    assert on_result(SYNCED, B, result) == command


def test_a_running_deploy_is_taken_over() -> None:
    state = ended("running")
    assert inherited(state, SYNCED) == state.deploys["d-9"]


DEPLOYING = replace(SYNCED, status="deploying", reason="d-9", head=B)


@pytest.mark.parametrize(("outcome", "status", "applied"), [
    ("deployed", "synced", B), ("rolled_back", "failing", A), ("cancelled", "failing", A),
    ("rollback_failed", "failing", A),
])
def test_an_unrecorded_end_is_recorded(outcome: Outcome, status: str, applied: str) -> None:
    command = inherited(ended(outcome), DEPLOYING)
    assert isinstance(command, ObserveSource)
    assert (command.status, command.head, command.applied) == (status, B, applied)
    assert command.quarantine == ("" if outcome == "deployed" else B)


@pytest.mark.parametrize("source", [SYNCED, BAD, AWAY, replace(DEPLOYING, head="c" * 40)])
def test_a_recorded_end_is_left_alone(source: Source) -> None:
    assert inherited(ended("deployed"), source) is None


def test_deploys_of_others_are_not_taken_over() -> None:
    assert inherited(ended("running"), replace(SYNCED, name="other")) is None


def test_a_long_reason_is_cut() -> None:
    command = observe(SYNCED, "failing", "x" * 5000)
    assert command is not None
    assert len(command.reason) == 2000


def test_the_next_look_doubles_up_to_five_minutes() -> None:
    assert [next_look_s(10_000, n, 0.5) for n in range(7)] == [10, 20, 40, 80, 160, 300, 300]
    assert next_look_s(600_000, 5, 0.5) == 600


@given(st.integers(100, 10**7), st.integers(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_the_jitter_is_ten_percent(poll_ms: int, misses: int, chance: float) -> None:
    exact = next_look_s(poll_ms, misses, 0.5)
    assert 0.9 * exact <= next_look_s(poll_ms, misses, chance) <= 1.1 * exact + 1e-9


SHAS = st.sampled_from([A, B, "c" * 40])
FOUND = st.one_of(
    st.builds(Unchanged, SHAS), st.builds(Commit, SHAS, st.just({"web.mill": b"#"})),
    st.builds(Commit, SHAS, st.just({})), st.builds(Missing, st.just("gone")),
    st.builds(Missing, st.just("no folder"), SHAS), st.builds(Refused, st.just("bomb"), SHAS),
    st.builds(Unreachable, st.just("away")),
)
RESULT = st.one_of(
    st.builds(Deployed), st.builds(Invalid, st.just("bad")), st.builds(Blocked, st.just("busy")),
    st.builds(RolledBack, st.just("d-9"), st.just("ill")), st.builds(Retryable, st.just("later")),
    st.builds(Emptied, st.just("empty")),
)


@given(st.lists(st.tuples(FOUND, RESULT, st.booleans()), max_size=12))
def test_the_same_finding_twice_writes_once_and_only_a_deploy_moves_applied(
    steps: list[tuple[Found, Result, bool]],
) -> None:
    state, _ = apply(State(services=OWNED), 1, Entry(1, c.PutSource(FRESH)))
    for index, (found, result, forced) in enumerate(steps, 2):
        source = state.sources["app"]
        step = decide(state, source, found, Ask(forced=forced))
        match step:
            case Apply(commit):
                command = on_result(source, commit.sha, result)
                may_move = isinstance(result, Deployed)
            case Rest(command):
                may_move = isinstance(found, Commit) and not found.files
        if command is None:
            continue
        state, refused = apply(state, index, Entry(index, command))
        assert refused is None
        after = state.sources["app"]
        assert may_move or after.applied == source.applied
        if isinstance(step, Rest):
            again = decide(state, after, found, Ask(forced=forced))
            assert again == Rest(None, step.head)
        else:
            assert on_result(after, step.commit.sha, result) is None
        assert settled_head(after) in ("", after.head)
