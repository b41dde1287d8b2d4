"""What a source's state and what was found come to: pure, one decision at a time.

Nothing is written where nothing changed: a command is None where the state says it already.
"""

from __future__ import annotations

from typing import assert_never

import msgspec

from reconciler.fsm.commands import ObserveSource
from reconciler.fsm.records import Deploy, Source, SourceStatus
from reconciler.fsm.state import State
from reconciler.git.findings import Commit, Found, Missing, Refused, Unchanged, Unreachable

MAX_REASON_CHARS = 2_000
MAX_BACKOFF_S = 300.0
JITTER = 0.1
SHORT = 7
"""Digits of a commit that people are shown."""


class Deployed(msgspec.Struct, frozen=True):
    """The commit runs. `deploy` is "" where nothing had to change."""

    deploy: str = ""


class Invalid(msgspec.Struct, frozen=True):
    """The manifest was refused before anything was touched; file:line:col and reason a line."""

    problems: str


class RolledBack(msgspec.Struct, frozen=True):
    """The deploy ran and did not end as deployed: rolled back, or cancelled by a person."""

    deploy: str
    reason: str


class Blocked(msgspec.Struct, frozen=True):
    """The cluster as it is cannot take it: another deploy runs, it does not fit, a name clash."""

    reason: str


class Retryable(msgspec.Struct, frozen=True):
    """It failed from outside (a registry away, a node lost); another time it may work."""

    reason: str


class Emptied(msgspec.Struct, frozen=True):
    """It would remove everything that the source owns, and nobody has allowed that."""

    reason: str


Result = Deployed | Invalid | RolledBack | Blocked | Retryable | Emptied


class Ask(msgspec.Struct, frozen=True):
    """How a person wants the next look: `forced` tries a quarantined commit again."""

    forced: bool = False
    allow_empty: bool = False


class Rest(msgspec.Struct, frozen=True):
    """Nothing to apply. `head` is settled by this: the same head needs no second reading."""

    command: ObserveSource | None
    head: str = ""


class Apply(msgspec.Struct, frozen=True):
    """The commit is to be brought about as one deploy."""

    commit: Commit


def settled_head(source: Source) -> str:
    """The head about which the state alone says that there is nothing to do; "" where none."""
    if source.head and (source.head == source.applied or source.head in source.quarantined):
        return source.head
    return ""


def decide(state: State, source: Source, found: Found, ask: Ask = Ask()) -> Rest | Apply:  # noqa: B008  frozen, so shared safely
    """What to do about what was found."""
    match found:
        case Unreachable(reason):
            return Rest(observe(source, "unreachable", reason))
        case Missing(reason, head) | Refused(reason, head):
            return Rest(observe(source, "failing", reason, head=head), head)
        case Unchanged(sha):
            return Rest(_unchanged(state, source, sha), sha)
        case Commit(sha):
            if sha == source.applied:
                return Rest(observe(source, "synced", head=sha), sha)
            if sha in source.quarantined and not ask.forced:
                return Rest(_quarantined(state, source, sha), sha)
            if not found.files:
                return _without_files(state, source, found, ask)
            return Apply(found)
        case _:
            assert_never(found)


def _unchanged(state: State, source: Source, sha: str) -> ObserveSource | None:
    if sha == source.applied:
        return observe(source, "synced", source.reason if source.status == "synced" else "",
                       head=sha)
    if sha in source.quarantined:
        return _quarantined(state, source, sha)
    return None


def _quarantined(state: State, source: Source, sha: str) -> ObserveSource | None:
    if source.status == "failing" and source.head == sha:
        return None
    deploy = next((d for d in _deploys_of(state, source) if d.origin.commit == sha), None)
    why = deploy.failure.reason if deploy and deploy.failure else "it was rolled back before"
    return observe(source, "failing", _rolled_back(sha, deploy.id if deploy else "", why), head=sha)


def _without_files(state: State, source: Source, commit: Commit, ask: Ask) -> Rest | Apply:
    sha = commit.sha
    where = f"there is no .mill file below {source.path}"
    if not owned_services(state, source.name):
        return Rest(observe(source, "synced", where, head=sha, applied=sha), sha)
    if ask.allow_empty:
        return Apply(commit)
    return Rest(_held(source, sha, where), sha)


def _held(source: Source, sha: str, why: str) -> ObserveSource | None:
    return observe(
        source, "held",
        f"{sha[:SHORT]} would remove every service of this source: {why}; if that is meant: "
        f"mill git sync {source.name} --allow-empty", head=sha)


def on_result(source: Source, sha: str, result: Result) -> ObserveSource | None:
    """What to record about an attempt to apply the commit `sha`."""
    match result:
        case Deployed():
            return observe(source, "synced", head=sha, applied=sha)
        case Invalid(problems):
            return observe(source, "failing", problems, head=sha)
        case RolledBack(deploy, reason):
            return observe(source, "failing", _rolled_back(sha, deploy, reason), head=sha,
                           quarantine=sha)
        case Blocked(reason) | Retryable(reason):
            return observe(source, "waiting", reason, head=sha)
        case Emptied(reason):
            return _held(source, sha, reason)
        case _:
            assert_never(result)


def _rolled_back(sha: str, deploy: str, reason: str) -> str:
    by = f" by {deploy}" if deploy else ""
    return f"{sha[:SHORT]} was rolled back{by}: {reason}"


def inherited(state: State, source: Source) -> Deploy | ObserveSource | None:
    """What an earlier leader left behind: a running deploy to wait for, or an unrecorded end."""
    deploy = next(iter(_deploys_of(state, source)), None)
    if deploy is None:
        return None
    if not deploy.finished:
        return deploy
    sha = deploy.origin.commit
    if source.status != "deploying" or source.head != sha:
        return None  # its end is in the record, and the source may have moved on since
    if deploy.outcome == "deployed":
        return on_result(source, sha, Deployed(deploy.id))
    why = deploy.failure.reason if deploy.failure else deploy.outcome
    return on_result(source, sha, RolledBack(deploy.id, why))


def running_deploy(state: State, source: str) -> Deploy | None:
    """The deploy of this source that runs now."""
    deploy = state.running_deploy()
    return deploy if deploy and deploy.origin.kind == "git" and deploy.origin.source == source \
        else None


def _deploys_of(state: State, source: Source) -> list[Deploy]:
    """The source's own deploys, the newest first; ids grow with the log (`d-` and its index)."""
    own = [d for d in state.deploys.values()
           if d.origin.kind == "git" and d.origin.source == source.name]
    return sorted(own, key=lambda d: (d.started_ms, len(d.id), d.id), reverse=True)


def owned_services(state: State, source: str) -> list[str]:
    """The services that run because of this source, by name."""
    return sorted(n for n, s in state.services.items() if s.owner == source and s.live)


def observe(
    source: Source, status: SourceStatus, reason: str = "", *, head: str = "", applied: str = "",
    quarantine: str = "",
) -> ObserveSource | None:
    """The command that makes the state say so; None where it does."""
    if len(reason) > MAX_REASON_CHARS:
        reason = reason[: MAX_REASON_CHARS - 1] + "…"
    head, applied = head or source.head, applied or source.applied
    told = (status, reason, head, applied)
    known = not quarantine or quarantine in source.quarantined
    if known and told == (source.status, source.reason, source.head, source.applied):
        return None
    return ObserveSource(name=source.name, status=status, reason=reason, head=head,
                         applied=applied, quarantine="" if known else quarantine)


def next_look_s(poll_ms: int, misses: int, chance: float) -> float:
    """Seconds until the next look: the poll interval, doubled for each miss up to 5 minutes.

    `chance` in [0, 1) spreads it by 10 % either way, so that sources do not poll in step.
    """
    poll_s = poll_ms / 1000
    wait_s = max(poll_s, min(MAX_BACKOFF_S, poll_s * 2.0 ** min(misses, 30)))
    return wait_s * (1 - JITTER + 2 * JITTER * chance)
