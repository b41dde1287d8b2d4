"""Commands on sources."""

from __future__ import annotations

from msgspec.structs import replace

from reconciler.fsm import commands as c
from reconciler.fsm.events import Note
from reconciler.fsm.state import State
from reconciler.fsm.step import Refused, emit, put, without

KEPT_QUARANTINED = 50


def put_source(state: State, command: c.PutSource) -> State | Refused:
    """Add a source; its name must be free."""
    source = command.source
    if source.name in state.sources:
        return Refused(f"a source named {source.name} exists already",
                       f"look at it with: mill git show {source.name}")
    source = replace(source, since_ms=state.time_ms)
    state = replace(state, sources=put(state.sources, source.name, source))
    return emit(state, "", Note(kind="source_added", subject=source.name, message=source.url))


def observe_source(state: State, command: c.ObserveSource) -> State | Refused:
    """Record what was found; `since` moves only with the status."""
    source = state.sources.get(command.name)
    if source is None:
        return Refused(f"no source {command.name}")
    quarantined = source.quarantined
    if command.quarantine and command.quarantine not in quarantined:
        quarantined = (*quarantined, command.quarantine)[-KEPT_QUARANTINED:]
    if command.applied:
        quarantined = tuple(commit for commit in quarantined if commit != command.applied)
    seen = replace(
        source, status=command.status, reason=command.reason,
        since_ms=source.since_ms if command.status == source.status else state.time_ms,
        head=command.head or source.head, applied=command.applied or source.applied,
        quarantined=quarantined,
    )
    state = replace(state, sources=put(state.sources, seen.name, seen))
    return emit(state, "", Note(kind=f"source_{command.status}", subject=seen.name,
                                message=command.reason or seen.head))


def remove_source(state: State, command: c.RemoveSource) -> State | Refused:
    """Follow it no more; its services stay and are manual from now on."""
    if command.name not in state.sources:
        return Refused(f"no source {command.name}")
    services = {
        name: replace(s, owner="manual", diverged=False) if s.owner == command.name else s
        for name, s in state.services.items()
    }
    state = replace(state, sources=without(state.sources, command.name), services=services)
    return emit(state, "", Note(kind="source_removed", subject=command.name))
