"""Server-sent events as bytes, and streams that are kept open or end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.api.calls import format_duration, parse_duration_ms
from reconciler.api.stream import (
    COMMENT,
    MAX_LINE_BYTES,
    Decoder,
    Message,
    StreamGarbled,
    beside,
    encode,
    kept_open,
)
from tests.api.cluster import WAIT_S, Cluster

EVENTS = st.lists(st.tuples(
    st.sampled_from(["progress", "done", "failed"]),
    st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3),
    st.none() | st.integers(0, 10**12),
), max_size=5)


@given(EVENTS, st.lists(st.integers(1, 40), max_size=40))
def test_events_come_out_as_they_went_in_whatever_the_pieces(
    events: list[tuple[str, dict[str, str], int | None]], sizes: list[int]
) -> None:
    raw = COMMENT.join(encode(*event) for event in events)
    decoder, found = Decoder(), []
    for size in sizes:
        found += decoder.feed(raw[:size])
        raw = raw[size:]
    found += decoder.feed(raw)
    assert [(m.event, json.loads(m.data), m.id) for m in found] == [
        (event, data, None if id_ is None else str(id_)) for event, data, id_ in events
    ]


def test_stream_of_others_is_read_as_the_standard_says() -> None:
    raw = (b"data: a\r\ndata:b\r\n\r\n: x\n\nid: 5\n\nevent: e\ndata\n\n"
           b"retry: 3\ndata: \xff\n\nid: 1")
    assert list(Decoder().feed(raw)) == [
        Message(None, "message", "a\nb"), Message(None, "e", ""),
        Message(None, "message", "\ufffd"),
    ]


def test_line_without_an_end_is_refused() -> None:
    with pytest.raises(StreamGarbled):
        list(Decoder().feed(b"x" * (MAX_LINE_BYTES + 1)))


class Tap:
    """A source of items that says whether it was closed."""

    def __init__(self, *items: bytes, forever: bool = False) -> None:
        self.items, self.forever, self.closed = items, forever, False

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for item in self.items:
                yield item
            if self.forever:
                await asyncio.get_running_loop().create_future()
        finally:
            self.closed = True


async def test_kept_open_stream_ends_with_its_source() -> None:
    tap = Tap(b"a", b"b")
    assert [f async for f in kept_open(tap(), asyncio.Event(), None)] == [b"a", b"b"]
    assert tap.closed


async def test_kept_open_stream_ends_when_its_server_closes() -> None:
    tap, closing = Tap(b"a", forever=True), asyncio.Event()
    stream = kept_open(tap(), closing, None)
    assert await anext(stream) == b"a"
    closing.set()
    assert [f async for f in stream] == []
    assert tap.closed


async def test_reader_that_leaves_closes_the_source() -> None:
    tap = Tap(b"a", forever=True)
    stream = kept_open(tap(), asyncio.Event(), 0.01)
    assert [await anext(stream), await anext(stream)] == [b"a", COMMENT]
    await stream.aclose()
    assert tap.closed


async def test_end_of_the_main_stream_ends_both() -> None:
    main, side = Tap(b"m"), Tap(b"s", forever=True)
    found = [item async for item in beside(main(), side())]
    assert b"m" in found
    assert main.closed
    assert side.closed


async def test_main_stream_goes_on_when_the_side_ends() -> None:
    main, side = Tap(b"m1", b"m2"), Tap()
    assert [item async for item in beside(main(), side())] == [b"m1", b"m2"]


@given(st.integers(1, 30 * 86_400_000))
def test_durations_are_read_back_as_they_are_written(ms: int) -> None:
    assert parse_duration_ms(format_duration(ms)) == ms


@pytest.mark.parametrize("text", [
    "", "5", "s", "1.5s", "-1s", "0s", "31d", "1s ", "\u0661s", "9" * 41,
])
def test_what_is_no_duration_is_none(text: str) -> None:
    assert parse_duration_ms(text) is None


async def test_silent_stream_gets_comment_lines() -> None:
    made = Cluster()
    try:
        await made.start(1, heartbeat_s=0.05)
        api = made.client()
        request = api.stream("POST", "/v1/deploy", content="service web",
                             headers={"content-type": "text/plain"})
        async with asyncio.timeout(WAIT_S), request as answer:
            text = ""
            async with aclosing(answer.aiter_text()) as pieces:
                async for piece in pieces:
                    text += piece
                    if text.count(": keep open\n\n") >= 2:
                        break
        assert text.startswith("id: ")
    finally:
        await made.stop()
