"""Two nodes: what a follower sends on, what it answers itself, what it says with no leader."""

from __future__ import annotations

import asyncio
import json

import httpx

from reconciler.fsm import commands as c
from tests.api.cluster import TOKENS, WAIT_S, Cluster, deployed, read, told

TEXT = {"content-type": "text/plain"}


async def test_follower_streams_a_deploy_that_the_leader_runs(pair: Cluster) -> None:
    follower = pair.client(1)
    deploys = pair.nodes[0].deploys
    request = follower.stream("POST", "/v1/deploy?prune=true&var=a%3D%26b", content="service web",
                              headers=TEXT)
    async with asyncio.timeout(WAIT_S), request as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        deploy_id = answer.headers["mill-deploy"]
        stream = told(answer)
        assert json.loads((await anext(stream)).data)["phase"] == "started"
        await deploys.schedule(deploy_id)
        await deploys.finish(deploy_id)
        rest = [message async for message in stream]
    assert rest[-1].event == "done"
    assert (deploys.requests[0].prune, deploys.requests[0].variables) == (True, {"a": "&b"})
    assert not pair.nodes[1].deploys.requests


async def test_stream_of_a_deploy_is_the_same_from_every_node(pair: Cluster) -> None:
    deploy_id = await deployed(pair)
    path = f"/v1/deploys/{deploy_id}/events"
    whole = read(await pair.client(0).get(path))
    assert read(await pair.client(1).get(path)) == whole
    headers = {"last-event-id": whole[3].id or ""}
    assert read(await pair.client(1).get(path, headers=headers)) == whole[4:]


async def test_follower_serves_a_running_stream_by_itself_over_a_change_of_leader(
    pair: Cluster,
) -> None:
    deploys = pair.nodes[0].deploys
    deploy_id = (await pair.client(1).post("/v1/deploy?detach=true", content="service web",
                                           headers=TEXT)).json()["id"]
    request = pair.client(1).stream("GET", f"/v1/deploys/{deploy_id}/events")
    async with asyncio.timeout(WAIT_S), request as answer:
        stream = told(answer)
        await anext(stream)
        await deploys.schedule(deploy_id)
        await pair.nodes[0].server.stop()
        pair.log.leader = "node-2"
        await pair.nodes[1].deploys.finish(deploy_id)
        assert [message async for message in stream][-1].event == "done"


async def test_follower_that_skips_to_a_snapshot_loses_no_event(pair: Cluster) -> None:
    deploys = pair.nodes[0].deploys
    answer = await pair.client(0).post("/v1/deploy?detach=true", content="service web",
                                       headers=TEXT)
    deploy_id = answer.json()["id"]
    request = pair.client(1).stream("GET", f"/v1/deploys/{deploy_id}/events")
    async with asyncio.timeout(WAIT_S), request as stream_answer:
        stream = told(stream_answer)
        messages = [await anext(stream)]
        pair.log.lagging.add("node-2")
        await deploys.schedule(deploy_id)
        await deploys.finish(deploy_id)
        pair.log.install_snapshot("node-2", "node-1")
        messages += [message async for message in stream]
    assert messages == read(await pair.client(0).get(f"/v1/deploys/{deploy_id}/events"))


async def test_follower_that_has_not_heard_of_a_deploy_asks_the_leader(pair: Cluster) -> None:
    pair.log.lagging.add("node-2")
    deploy_id = await deployed(pair)
    answer = await pair.client(1).get(f"/v1/deploys/{deploy_id}/events")
    assert read(answer)[-1].event == "done"
    assert (await pair.client(1).get("/v1/deploys/d-999/events")).status_code == 404


async def test_reads_of_a_lagging_follower_are_the_leaders_unless_stale_is_fine(
    pair: Cluster,
) -> None:
    pair.log.lagging.add("node-2")
    await deployed(pair)
    follower = pair.client(1)
    fresh = (await follower.get("/v1/services")).json()
    assert [row["name"] for row in fresh["services"]] == ["web"]
    assert fresh["index"] == pair.nodes[0].state.index
    assert "stale" not in fresh
    stale = (await follower.get("/v1/services?stale=ok")).json()
    assert stale == {"index": pair.nodes[1].state.index, "stale": True, "services": []}


async def test_writes_on_a_follower_happen_on_the_leader_with_its_answer(pair: Cluster) -> None:
    follower = pair.client(1)
    put = await follower.put("/v1/secrets/db.url", json={"value": "postgres://x"})
    assert (put.status_code, put.json()["version"]) == (200, 1)
    assert (await follower.get("/v1/secrets/db.url")).json()["value"] == "postgres://x"
    missing = await follower.delete("/v1/secrets/nope")
    assert missing.status_code == 404
    assert missing.headers["content-type"] == "application/problem+json"
    refused = await follower.post("/v1/deploy", content="wrong", headers=TEXT)
    assert refused.status_code == 422
    assert len(refused.json()["errors"]) == 2


async def test_follower_without_a_leader_answers_503_and_stale_reads(pair: Cluster) -> None:
    pair.log.leader = None
    follower = pair.client(1)
    for method, path in (("GET", "/v1/status"), ("POST", "/v1/services/web/restart"),
                         ("GET", "/v1/events"), ("GET", "/readyz")):
        answer = await follower.request(method, path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), path
        assert answer.json()["hint"]
    assert (await follower.get("/v1/status?stale=ok")).json()["stale"] is True
    assert (await follower.get("/healthz")).status_code == 200


async def test_leader_that_cannot_be_reached_is_503_and_nothing_happened(pair: Cluster) -> None:
    await pair.nodes[0].server.stop()
    answer = await pair.client(1).put("/v1/secrets/a", json={"value": "x"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "nothing happened" in answer.json()["detail"]


async def test_leader_without_a_majority_refuses_reads_but_stale_ones(pair: Cluster) -> None:
    pair.log.majority = False
    for node in (0, 1):
        answer = await pair.client(node).get("/v1/nodes")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        stale = (await pair.client(node).get("/v1/nodes?stale=ok")).json()
        assert stale["stale"] is True


async def test_forwarded_request_is_never_sent_on_again(pair: Cluster) -> None:
    """Each believes that the other leads: the second hop must not come back to the first."""
    answer = await pair.client(1).get("/v1/status", headers={"mill-forwarded": "node-1"})
    assert answer.status_code == 503
    pair.log.nodes["node-1"][1]._replica.name = "node-9"  # type: ignore[attr-defined]  # it is deposed
    async with asyncio.timeout(WAIT_S):
        assert (await pair.client(1).get("/v1/status")).status_code == 503


async def test_token_that_a_follower_has_not_heard_of_is_judged_by_the_leader(
    pair: Cluster,
) -> None:
    pair.log.catch_up("node-2")
    made = Cluster()
    made.log.lagging.add("node-2")
    try:
        await made.start(2)
        # node-2 knows nothing yet, not even who leads at which address: it cannot say 401.
        cold = made.client(1)
        assert (await cold.get("/v1/status")).status_code == 503
        made.log.catch_up("node-2")
        assert (await cold.get("/v1/status")).status_code == 200
        assert (await made.client(1, token="wrong").get("/v1/status")).status_code == 401
        assert (await made.client(1, token="wrong").get("/v1/events")).status_code == 401
    finally:
        await made.stop()


async def test_closing_reader_of_a_forwarded_stream_frees_the_leaders_connection(
    pair: Cluster,
) -> None:
    request = pair.client(1).stream("POST", "/v1/deploy", content="service web", headers=TEXT)
    async with asyncio.timeout(WAIT_S), request as answer:
        await anext(told(answer))
        (leader,) = pair.nodes[0].server._running.values()
        assert leader.server_state.connections
    async with asyncio.timeout(WAIT_S):
        while leader.server_state.tasks:
            await asyncio.wait(set(leader.server_state.tasks))


async def test_body_over_the_bound_is_refused_by_the_follower_itself(pair: Cluster) -> None:
    pair.log.leader = None
    answer = await pair.client(1).post("/v1/deploy", content=b"x" * (2 * 1024 * 1024 + 1),
                                       headers=TEXT)
    assert answer.status_code == 413


async def test_roles_hold_on_a_follower_too(pair: Cluster) -> None:
    await pair.nodes[0].ledger.propose(c.SetSecret("a", b"n" * 12, b"s"))
    pair.grant("deploy")
    answer = await pair.client(1, token="deploy").get("/v1/secrets/a")
    assert answer.status_code == 403


async def test_two_hundred_forwarded_reads_at_once(pair: Cluster) -> None:
    async with httpx.AsyncClient(
        base_url=pair.nodes[1].url, headers={"authorization": f"Bearer {TOKENS['admin']}"},
        timeout=WAIT_S, limits=httpx.Limits(max_connections=200, max_keepalive_connections=16),
    ) as client:
        answers = await asyncio.gather(*(client.get("/v1/nodes") for _ in range(200)))
    assert {answer.status_code for answer in answers} == {200}
