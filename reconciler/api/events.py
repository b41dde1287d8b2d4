"""What happened: a deploy's stream, and the cluster's events as a list or a stream.

Streams are level-triggered: each looks at the newest state, sends what is newer than what it sent
last, and waits for another state. So a snapshot install or a slow reader loses nothing.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncGenerator
from itertools import islice

from starlette.responses import Response

from reconciler.api import replies
from reconciler.api.calls import MAX_INDEX, Asked, Call, Query
from reconciler.api.stream import encode
from reconciler.api.types import EventList, EventRow
from reconciler.errors import Malformed, NotFound
from reconciler.executor.history import History
from reconciler.executor.ledger import Ledger
from reconciler.fsm.apply_cluster import KEPT_EVENTS
from reconciler.fsm.events import Event, Note
from reconciler.fsm.state import State

DEFAULT_EVENTS = 1_000
MAX_EVENTS = 10_000
MAX_REPLAYS = 20
"""States of the past for one page; most entries make an event, so that two or three fill it."""


async def facts(ledger: Ledger, deploy_id: str, after: int) -> AsyncGenerator[Event, None]:
    """A deploy's events with a greater index than `after`, as they come, to the terminal one."""
    state = ledger.state
    while True:
        events = state.deploy_events.get(deploy_id, ())
        for event in events[bisect_right(events, after, key=_index):]:
            after = event.index
            if isinstance(event.data, Note):
                continue  # no phase of the contract's stream; `/v1/events` has it
            yield event
        # The entry that ends a deploy makes its last event, so nothing is missing here.
        deploy = state.deploys.get(deploy_id)
        if deploy is None or deploy.finished:
            return
        state = await ledger.changed(state)


def frame(event: Event) -> bytes:
    """A fact of a deploy as the stream sends it."""
    return encode(event.kind, event.wire(), event.index)


def row(event: Event) -> EventRow:
    """A fact as `/v1/events` shows it."""
    return EventRow(index=event.index, at=replies.rfc3339(event.at_ms), event=event.kind,
                    deploy=event.deploy, data=event.wire())


def last_event_id(asked: Asked) -> int | None:
    """The index after which to go on, from `Last-Event-ID`; None where it is not given."""
    text = asked.request.headers.get("last-event-id", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit()) or int(text) > MAX_INDEX:
        raise Malformed(f"Last-Event-ID {text[:40]!r} is no log index",
                        hint="send the id of the last event that came, or none")
    return int(text)


async def cluster_events(asked: Asked) -> Response:
    """The list from a confirmed state, or a stream from this node's own."""
    limit = asked.integer("limit", DEFAULT_EVENTS)
    after = asked.integer("after", -1)
    if asked.flag("follow"):
        resumed = last_event_id(asked)
        first = resumed if resumed is not None else after
        if first < 0:
            first = _before_last(asked.state, limit)
        return replies.events(asked, _happenings(asked.backend.ledger, first))
    state = await asked.confirmed()
    if after < 0:
        after = _before_last(state, limit)
    found = await _recalled(asked.backend.history, state, after, limit)
    rows = tuple(map(row, found))
    return replies.json(EventList(index=state.index, events=rows, stale=replies.stale(asked)))


async def _recalled(history: History, state: State, after: int, limit: int) -> list[Event]:
    """The oldest `limit` events after an index; those that are trimmed from the state since come
    from states of the past, as far as the log holds them."""
    found: list[Event] = []
    replays = 0
    while _trimmed(state, after) and len(found) < limit:
        # An entry makes one event at most, and each state keeps so many: none is missing there.
        upto = min(after + KEPT_EVENTS, state.index)
        try:
            past = await history.at(upto)
        except NotFound:
            break
        found += islice(past.events_after(after), limit - len(found))
        after, replays = upto, replays + 1
        if found and replays >= MAX_REPLAYS:
            return found  # whoever goes on after the last one misses nothing
    return found + list(islice(state.events_after(after), limit - len(found)))


def _trimmed(state: State, after: int) -> bool:
    """Whether events after this index may have been forgotten."""
    total = sum(map(len, state.events))
    return total >= KEPT_EVENTS and state.events[0][0].index > after + 1


async def _happenings(ledger: Ledger, after: int) -> AsyncGenerator[bytes, None]:
    state = ledger.state
    while True:
        for event in state.events_after(after):
            after = event.index
            yield encode(event.kind, row(event), event.index)
        state = await ledger.changed(state)


def _before_last(state: State, limit: int) -> int:
    """The index after which the newest `limit` events stand."""
    left = limit
    for chunk in reversed(state.events):
        if len(chunk) > left:
            return chunk[len(chunk) - left - 1].index
        left -= len(chunk)
    return 0


def _index(event: Event) -> int:
    return event.index


CALLS = (
    Call(
        "GET", "/v1/events", cluster_events,
        "What happened, oldest first: a list, or with follow a stream that resumes after "
        "Last-Event-ID",
        role="read", serve="here", answer=EventList, streams="EventRow",
        query=(
            Query("follow", "stream what happens from now on too", "flag"),
            Query("after", "only events with a greater index", "integer", high=MAX_INDEX),
            Query("limit", "how many: the newest, or with after the oldest", "integer",
                  low=1, high=MAX_EVENTS),
            Query("stale", "answer from what this node knows", values=("ok",)),
        ),
    ),
)
