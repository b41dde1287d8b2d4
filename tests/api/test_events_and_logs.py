"""Cluster events as a list and a stream; container logs merged, followed, and refused."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing

import httpx
import pytest

from reconciler.api.services import LogLine
from reconciler.fsm import commands as c
from tests.api.cluster import WAIT_S, Cluster, deployed, read, told


async def test_events_are_listed_oldest_first_with_their_facts(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    deploy_id = await deployed(cluster)
    body = (await api.get("/v1/events")).json()
    assert body["index"] == cluster.nodes[0].state.index
    assert body["events"][0] == {
        "index": 2, "at": "2023-11-14T22:13:20.000Z", "event": "progress", "deploy": "",
        "data": {"phase": "note", "kind": "node_joined", "subject": "node-1", "node": "node-1"},
    }
    assert body["events"][-1]["event"] == "done"
    assert body["events"][-1]["deploy"] == deploy_id
    indexes = [event["index"] for event in body["events"]]
    assert indexes == sorted(set(indexes))


async def test_events_page_by_after_and_limit(cluster: Cluster, api: httpx.AsyncClient) -> None:
    for number in range(600):  # more than two chunks of the history
        await cluster.nodes[0].ledger.propose(c.SetSecret(f"s{number}", b"n" * 12, b"x"))
    whole = (await api.get("/v1/events?limit=10000")).json()["events"]
    assert len(whole) == 601
    paged: list[object] = []
    after = 0
    while True:
        page = (await api.get(f"/v1/events?after={after}&limit=250")).json()["events"]
        if not page:
            break
        paged += page
        after = page[-1]["index"]
    assert paged == whole
    for limit in (1, 88, 256, 257, 600, 601, 602):
        newest = (await api.get(f"/v1/events?limit={limit}")).json()["events"]
        assert newest == whole[-limit:]
    assert (await api.get("/v1/events?limit=10001")).status_code == 422
    assert (await api.get("/v1/events?after=-1")).status_code == 422


@pytest.mark.parametrize("node", [0, 1])
async def test_followed_events_go_on_after_the_last_id_on_any_node(
    pair: Cluster, node: int
) -> None:
    await deployed(pair)
    listed = (await pair.client(node).get("/v1/events")).json()["events"]
    seen = listed[4]["index"]
    request = pair.client(node).stream("GET", "/v1/events?follow=true&after=1",
                                       headers={"last-event-id": str(seen)})
    async with asyncio.timeout(WAIT_S), request as answer:
        stream = told(answer)
        rows = [json.loads((await anext(stream)).data) for _ in listed[5:]]
        assert rows == listed[5:]
        await pair.nodes[0].ledger.propose(c.SetSecret("a", b"n" * 12, b"x"))
        message = await anext(stream)
    assert json.loads(message.data)["data"]["kind"] == "secret_set"
    assert message.id == str(pair.nodes[0].state.index)


def line(alloc: str, second: int, text: str) -> LogLine:
    return LogLine(f"2026-01-01T00:00:{second:02d}.000000000Z", alloc, "stdout", text)



async def test_lines_of_one_service_come_in_the_order_of_time(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await deployed(cluster)
    first = next(cluster.nodes[0].state.of_service("web")).id
    # A second, healing replica beside the first, on a slot that nobody holds.
    await cluster.nodes[0].ledger.propose(
        c.ScheduleAlloc(alloc="web-zzzzzz", service="web", node="node-1", slot=1))
    lines = cluster.nodes[0].logs.lines
    lines[first] = [line(first, 1, "a"), line(first, 4, "d")]
    lines["web-zzzzzz"] = [line("web-zzzzzz", 2, "b"), line("web-zzzzzz", 3, "c")]
    messages = read(await api.get("/v1/logs/web"))
    assert [json.loads(m.data)["line"] for m in messages] == ["a", "b", "c", "d"]
    assert json.loads(messages[0].data) == {
        "ts": "2026-01-01T00:00:01.000000000Z", "alloc": first, "stream": "stdout", "line": "a"}
    tail = read(await api.get("/v1/logs/web?tail=1"))
    assert [json.loads(m.data)["line"] for m in tail] == ["c", "d"]
    one = read(await api.get("/v1/logs/web-zzzzzz"))
    assert [json.loads(m.data)["line"] for m in one] == ["b", "c"]


async def test_followed_logs_take_up_allocations_that_come_later(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await deployed(cluster)
    node = cluster.nodes[0]
    first = next(node.state.of_service("web")).id
    node.logs.lines[first] = [line(first, 1, "old")]
    request = api.stream("GET", "/v1/logs/web?follow=true")
    async with asyncio.timeout(WAIT_S), request as answer:
        stream = told(answer)
        assert json.loads((await anext(stream)).data)["line"] == "old"
        node.logs.live.setdefault(first, asyncio.Queue()).put_nowait(line(first, 2, "new"))
        assert json.loads((await anext(stream)).data)["line"] == "new"
        node.logs.lines["web-zzzzzz"] = [line("web-zzzzzz", 3, "later")]
        await node.ledger.propose(
            c.ScheduleAlloc(alloc="web-zzzzzz", service="web", node="node-1", slot=1))
        assert json.loads((await anext(stream)).data)["line"] == "later"
        assert node.logs.reading == {first, "web-zzzzzz"}
    (serving,) = node.server._running.values()
    async with asyncio.timeout(WAIT_S):
        while serving.server_state.tasks:
            await asyncio.wait(set(serving.server_state.tasks))
    assert not node.logs.reading


async def test_node_that_does_not_answer_is_a_remark_among_the_others_lines(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await deployed(cluster)
    first = next(cluster.nodes[0].state.of_service("web")).id
    cluster.nodes[0].logs.refuse.add(first)
    messages = read(await api.get("/v1/logs/web"))
    remark = json.loads(messages[0].data)
    assert (remark["stream"], remark["alloc"]) == ("mill", first)
    assert "node-1 does not answer" in remark["line"]


async def test_service_of_which_nothing_runs_shows_how_it_ended(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await deployed(cluster)
    first = next(cluster.nodes[0].state.of_service("web")).id
    cluster.nodes[0].logs.lines[first] = [line(first, 1, "last words")]
    assert not read(await api.get("/v1/logs/web?previous=true"))
    await cluster.nodes[0].ledger.propose(
        c.SetAllocStatus(alloc=first, status="failed", was="healthy"))
    for path in ("/v1/logs/web", "/v1/logs/web?previous=true"):
        assert json.loads(read(await api.get(path))[0].data)["line"] == "last words"


async def test_logs_of_nothing_are_refused_before_the_stream(api: httpx.AsyncClient) -> None:
    assert (await api.get("/v1/logs/nope")).status_code == 404
    assert (await api.get("/v1/logs/nope?tail=10001")).status_code == 422


async def test_follower_streams_logs_from_the_leader(pair: Cluster) -> None:
    await deployed(pair)
    first = next(pair.nodes[0].state.of_service("web")).id
    pair.nodes[0].logs.lines[first] = [line(first, 1, "from the leader")]
    request = pair.client(1).stream("GET", "/v1/logs/web?follow=true")
    async with asyncio.timeout(WAIT_S), request as answer, aclosing(told(answer)) as stream:
        assert json.loads((await anext(stream)).data)["line"] == "from the leader"
