"""One step of the state machine: what every command's function is handed and gives back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import msgspec

from reconciler.fsm.events import Data, Event
from reconciler.fsm.state import EVENT_CHUNK, State

K = TypeVar("K")
V = TypeVar("V")


class Refused(msgspec.Struct, frozen=True):
    """The command's assumption no longer holds; the state is as it was."""

    reason: str
    hint: str = ""


class Repeated(msgspec.Struct, frozen=True):
    """The same request was carried out before, by the entry `index`; the state is as it was."""

    index: int


def put(mapping: Mapping[K, V], key: K, value: V) -> dict[K, V]:
    """A copy of `mapping` with `key` set."""
    changed = dict(mapping)
    changed[key] = value
    return changed


def without(mapping: Mapping[K, V], *keys: K) -> dict[K, V]:
    """A copy of `mapping` that lacks `keys`."""
    changed = dict(mapping)
    for key in keys:
        changed.pop(key, None)
    return changed


def emit(state: State, deploy: str, data: Data) -> State:
    """Record the one event that this entry makes, in the cluster's history and the deploy's.

    What comes after a deploy's terminal event goes to the cluster's history alone, so that a
    stream ends once and for ever.
    """
    record = state.deploys.get(deploy)
    event = Event(state.index, state.time_ms, deploy, data)
    chunks = state.events
    if chunks and len(chunks[-1]) < EVENT_CHUNK:
        events = (*chunks[:-1], (*chunks[-1], event))
    else:
        events = (*chunks, (event,))
    streams = state.deploy_events
    if record is not None:
        stream = streams.get(deploy, ())
        if not stream or stream[-1].kind == "progress":
            streams = put(streams, deploy, (*stream, event))
    return msgspec.structs.replace(state, events=events, deploy_events=streams)
