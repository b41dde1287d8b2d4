"""Deploys over HTTP: what is refused before a stream begins, and what the stream tells."""

from __future__ import annotations

import json

import httpx
import pytest

from reconciler.executor.requests import DEFAULT_PULL_BUDGET_MS
from reconciler.fsm import commands as c
from reconciler.fsm.events import Pulling
from reconciler.fsm.records import Failure
from tests.api.cluster import Cluster, deployed, read, told

TEXT = {"content-type": "text/plain"}


async def test_stream_tells_every_fact_with_its_log_index_and_ends_with_done(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    deploys = cluster.nodes[0].deploys
    async with api.stream("POST", "/v1/deploy", content="service web", headers=TEXT) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        deploy_id = answer.headers["mill-deploy"]
        await deploys.schedule(deploy_id)
        await deploys.finish(deploy_id)
        messages = [message async for message in told(answer)]
    alloc = next(cluster.nodes[0].state.of_deploy(deploy_id)).id
    place = {"service": "web", "alloc": alloc, "node": "node-1"}
    assert [(m.event, json.loads(m.data)) for m in messages] == [
        ("progress", {"phase": "started", "deploy": deploy_id, "services": 1}),
        ("progress", {"phase": "pulling"}),
        ("progress", {"phase": "scheduled", **place}),
        ("progress", {"phase": "pulled", "image": "registry.test/web:v1", "node": "node-1",
                      "cached": False}),
        ("progress", {"phase": "pulled"}),
        ("progress", {"phase": "starting", **place}),
        ("progress", {"phase": "healthy", **place, "elapsed": 1.2}),
        ("progress", {"phase": "healthy", "service": "web", "elapsed": 1.2}),
        ("progress", {"phase": "routed"}),
        ("done", {"elapsed": 0.0, "success": True, "outcome": "deployed", "changed": 1}),
    ]
    ids = [int(m.id or 0) for m in messages]
    assert ids == sorted(set(ids))
    assert ids == [e.index for e in cluster.nodes[0].state.deploy_events[deploy_id]]
    assert deploy_id == f"d-{ids[0]}"


async def test_failed_deploy_ends_with_one_failed_event(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    node = cluster.nodes[0]
    async with api.stream("POST", "/v1/deploy", content="service web", headers=TEXT) as answer:
        deploy_id = answer.headers["mill-deploy"]
        alloc = (await node.deploys.schedule(deploy_id))[0]
        await node.ledger.propose(c.RollBackDeploy(deploy_id, Failure(
            reason="exited with 1", service="web", alloc=alloc.id, node="node-1", logs=("boom",)
        )))
        await node.ledger.propose(c.SetAllocStatus(alloc=alloc.id, status="stopped",
                                                   was="stopping"))
        await node.ledger.propose(c.EndRollback(deploy_id, "rolled_back"))
        messages = [message async for message in told(answer)]
    assert json.loads(messages[-2].data) == {"phase": "rolling_back", "reason": "exited with 1"}
    assert messages[-1].event == "failed"
    assert json.loads(messages[-1].data) == {
        "elapsed": 0.0, "success": False, "outcome": "rolled_back", "service": "web",
        "alloc": alloc.id, "node": "node-1", "reason": "exited with 1", "logs": ["boom"],
    }


async def test_pull_bytes_come_without_an_id_and_only_while_images_are_pulled(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    deploys = cluster.nodes[0].deploys
    early = Pulling("registry.test/web:v1", "node-1", 1, 100)
    deploys.pulls.put_nowait(early)
    async with api.stream("POST", "/v1/deploy", content="service web", headers=TEXT) as answer:
        deploy_id = answer.headers["mill-deploy"]
        stream = told(answer)
        assert json.loads((await anext(stream)).data)["phase"] == "started"
        await deploys.schedule(deploy_id)
        assert json.loads((await anext(stream)).data) == {"phase": "pulling"}
        assert json.loads((await anext(stream)).data)["phase"] == "scheduled"
        deploys.pulls.put_nowait(Pulling("registry.test/web:v1", "node-1", 50, 100))
        message = await anext(stream)
        assert (message.id, message.event) == (None, "progress")
        assert json.loads(message.data) == {
            "phase": "pulling", "image": "registry.test/web:v1", "node": "node-1",
            "bytes": 50, "total": 100,
        }
        # A registry may not say how much is to come: every key is there all the same.
        deploys.pulls.put_nowait(Pulling("registry.test/web:v1", "node-1", 60))
        assert json.loads((await anext(stream)).data) == {
            "phase": "pulling", "image": "registry.test/web:v1", "node": "node-1",
            "bytes": 60, "total": 0,
        }
        await deploys.finish(deploy_id)
        assert all([message.id is not None async for message in stream])


async def test_stream_goes_on_after_the_last_event_id(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    deploy_id = await deployed(cluster)
    whole = read(await api.get(f"/v1/deploys/{deploy_id}/events"))
    for seen in range(len(whole)):
        headers = {"last-event-id": whole[seen].id or ""}
        rest = read(await api.get(f"/v1/deploys/{deploy_id}/events", headers=headers))
        assert rest == whole[seen + 1:]


async def test_facts_after_the_terminal_event_stay_out_of_the_stream(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    deploy_id = await deployed(cluster)
    before = read(await api.get(f"/v1/deploys/{deploy_id}/events"))
    await cluster.nodes[0].ledger.propose(c.WarnDeploy(deploy_id, "late"))
    assert read(await api.get(f"/v1/deploys/{deploy_id}/events")) == before
    events = (await api.get("/v1/events")).json()["events"]
    assert events[-1]["data"] == {"phase": "warning", "message": "late"}


async def test_last_event_id_that_is_no_index_is_malformed(
    cluster: Cluster, api: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    path = f"/v1/deploys/{await deployed(cluster)}/events"
    for bad in ("x", "-1", "1.5", "²", "9" * 30):
        with subtests.test(bad=bad):
            answer = await api.get(path, headers={b"last-event-id": bad.encode()})
            assert answer.status_code == 400


async def test_detached_deploy_is_accepted_with_the_place_of_its_stream(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    answer = await api.post("/v1/deploy?detach=true", content="service web", headers=TEXT)
    assert answer.status_code == 202
    body = answer.json()
    assert body["events"] == f"/v1/deploys/{body['id']}/events"
    assert answer.headers["mill-deploy"] == body["id"]
    assert cluster.nodes[0].state.active_deploy == body["id"]


async def test_same_idempotency_key_is_the_same_deploy(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    headers = {**TEXT, "idempotency-key": "k-1"}
    first = await api.post("/v1/deploy?detach=true", content="service web", headers=headers)
    again = await api.post("/v1/deploy?detach=true", content="service web", headers=headers)
    assert first.json()["id"] == again.json()["id"]
    assert len(cluster.nodes[0].state.deploys) == 1


@pytest.mark.parametrize("key", ["k" * 256, "k\u00e9"])
async def test_idempotency_key_that_cannot_be_kept_is_malformed(
    api: httpx.AsyncClient, key: str
) -> None:
    headers = {b"content-type": b"text/plain", b"idempotency-key": key.encode("latin-1")}
    answer = await api.post("/v1/deploy", content="service web", headers=headers)
    assert answer.status_code == 400


async def test_second_deploy_is_refused_naming_the_first(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    first = (await api.post("/v1/deploy?detach=true", content="service web", headers=TEXT)).json()
    answer = await api.post("/v1/deploy", content="service api", headers=TEXT)
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert first["id"] in answer.json()["detail"]
    assert "mill cancel" in answer.json()["hint"]


@pytest.mark.parametrize("path", ["/v1/deploy", "/v1/plan"])
async def test_invalid_manifest_is_refused_with_every_position(
    cluster: Cluster, api: httpx.AsyncClient, path: str
) -> None:
    answer = await api.post(path, content="wrong", headers=TEXT)
    assert answer.status_code == 422
    body = answer.json()
    assert body["type"] == "urn:mill:problem:invalid-manifest"
    assert body["errors"] == [
        {"file": "web.mill", "line": 3, "column": 7, "message": "unknown attribute",
         "hint": "remove it"},
        {"file": "web.mill", "line": 9, "column": 1, "message": "no image", "hint": ""},
    ]
    assert not cluster.nodes[0].state.deploys


async def test_what_does_not_fit_is_refused_before_the_stream(api: httpx.AsyncClient) -> None:
    answer = await api.post("/v1/deploy", content="huge", headers=TEXT)
    assert answer.status_code == 409
    assert "4 cores short" in answer.json()["detail"]


async def test_plan_says_what_a_deploy_would_do_and_changes_nothing(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    before = cluster.nodes[0].state
    answer = await api.post("/v1/plan", content="service web", headers=TEXT)
    assert answer.status_code == 200
    assert answer.json() == {
        "index": before.index, "warnings": [],
        "services": [{
            "name": "web", "action": "create", "changes": [], "strategy": "surge",
            "reason": "it fits", "image": "registry.test/web:v1@sha256:" + "a" * 64,
            "placements": [{"node": "node-1", "kept": False}],
        }],
    }
    assert cluster.nodes[0].state is before


async def test_options_of_the_query_reach_the_executor(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await api.post("/v1/deploy?detach=true&prune=true&strategy=rolling&timeout=1h30m"
                   "&var=tag%3Dv2&var=empty%3D&var=eq%3Da%3Db", content="service web", headers=TEXT)
    await api.post("/v1/deploy?detach=true", content="service web", headers=TEXT)
    chosen, default = cluster.nodes[0].deploys.requests
    assert (chosen.prune, chosen.strategy, chosen.pull_budget_ms) == (True, "rolling", 5_400_000)
    assert chosen.variables == {"tag": "v2", "empty": "", "eq": "a=b"}
    assert chosen.origin.token == "t-admin"
    assert (default.prune, default.strategy) == (False, None)
    assert default.pull_budget_ms == DEFAULT_PULL_BUDGET_MS


BAD_QUERIES = [
    "strategy=fast", "prune=yes", "timeout=5", "timeout=-1s", "timeout=31d", "timeout=0s",
    "var=novalue", "var==x", "var=a%3D1&var=a%3D2", "prune=true&prune=true", "unknown=1",
]


async def test_query_that_cannot_be_taken_is_unprocessable(
    cluster: Cluster, api: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    for query in BAD_QUERIES:
        with subtests.test(query=query):
            answer = await api.post(f"/v1/deploy?{query}", content="service web", headers=TEXT)
            assert answer.status_code == 422
            assert not cluster.nodes[0].deploys.requests


async def test_three_kinds_of_body_bring_the_same_files(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    files = {"a.mill": "service web", "b.mill": "service api"}
    await api.post("/v1/deploy?detach=true", json={"files": files})
    deploys = cluster.nodes[0].deploys
    await api.post("/v1/deploy?detach=true",
                   files=[("file", (name, text)) for name, text in files.items()])
    await api.post("/v1/deploy?detach=true",
                   files=[(name, (None, text)) for name, text in files.items()])
    await api.post("/v1/deploy?detach=true", content="service web",
                   headers={"content-type": "text/plain; charset=UTF-8"})
    expected = {name: text.encode() for name, text in files.items()}
    assert [request.files for request in deploys.requests] == [
        expected, expected, expected, {"mill.mill": b"service web"}
    ]


async def test_two_parts_of_one_name_are_unprocessable(api: httpx.AsyncClient) -> None:
    answer = await api.post("/v1/deploy", files=[("f", ("a.mill", "service web")),
                                                 ("f", ("a.mill", "service api"))])
    assert answer.status_code == 422


BAD_BODIES: list[tuple[dict[str, str], bytes, int]] = [
    ({"content-type": "application/json"}, b'{"files": {"a": "x"', 400),
    ({"content-type": "application/json"}, b"\xff\xfe", 400),
    ({"content-type": "application/json"}, b'{"files": {"a": 5}}', 422),
    ({"content-type": "application/json"}, b'{"files": {}}', 422),
    ({"content-type": "application/json"}, b'{"files": {"a": "x"}, "more": 1}', 422),
    ({"content-type": "application/json"}, b'{"files": {"a\\u0000b": "x"}}', 422),
    ({"content-type": "application/json"}, b'{"files": {"\\ud800": "x"}}', 400),
    ({"content-type": "application/json"}, b'{"files": {"a": "\\ud800"}}', 400),
    ({"content-type": "multipart/form-data"}, b"x", 400),
    ({"content-type": "multipart/form-data; boundary=b"}, b"--b\r\nx", 400),
    ({"content-type": "text/plain; charset=latin-1"}, b"service web", 415),
    ({"content-type": "application/x-www-form-urlencoded"}, b"service web", 415),
    ({}, b"service web", 415),
]


async def test_bodies_that_cannot_be_read_are_refused(
    cluster: Cluster, api: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    for headers, content, status in BAD_BODIES:
        with subtests.test(headers=headers, content=content):
            answer = await api.post("/v1/deploy", content=content, headers=headers)
            assert answer.status_code == status, answer.text
            assert answer.headers["content-type"] == "application/problem+json"
            assert not cluster.nodes[0].deploys.requests


async def test_bad_json_is_told_with_its_place(api: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json"}
    typed = await api.post("/v1/plan", content=b'{"files": {"a": 5}}', headers=headers)
    assert "$.files[...]" in typed.json()["detail"]
    broken = await api.post("/v1/plan", content=b'{"files": nope}', headers=headers)
    assert "byte 14" in broken.json()["detail"]


async def test_deploys_are_listed_newest_first_with_their_records(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    first = await deployed(cluster)
    cluster.clock.advance(90)
    answer = await api.post("/v1/deploy?detach=true", content="service web", headers=TEXT)
    second = answer.json()["id"]
    cluster.clock.advance(1.5)
    body = (await api.get("/v1/deploys")).json()
    assert body["index"] == cluster.nodes[0].state.index
    assert [row["id"] for row in body["deploys"]] == [second, first]
    assert body["deploys"][0] == {
        "id": second, "outcome": "running", "started_at": "2023-11-14T22:14:50.000Z",
        "elapsed": 1.5, "reason": "",
        "services": [{"name": "web", "action": "update", "from": 1, "to": 2}],
        "origin": {"kind": "manual", "source": "", "commit": "", "author": "", "subject": "",
                   "token": "t-admin"},
    }
    one = (await api.get(f"/v1/deploys/{first}")).json()
    assert (one["id"], one["outcome"], one["index"]) == (first, "deployed", body["index"])
    assert len((await api.get("/v1/deploys?limit=1")).json()["deploys"]) == 1


async def test_cancel_rolls_a_running_deploy_back_and_refuses_an_ended_one(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    answer = await api.post("/v1/deploy?detach=true", content="service web", headers=TEXT)
    deploy_id = answer.json()["id"]
    cancelled = await api.post(f"/v1/deploys/{deploy_id}/cancel")
    assert cancelled.status_code == 202
    assert cancelled.json()["outcome"] == "rolling_back"
    await cluster.nodes[0].ledger.propose(c.EndRollback(deploy_id, "cancelled"))
    again = await api.post(f"/v1/deploys/{deploy_id}/cancel")
    assert again.status_code == 409
    assert "cancelled" in again.json()["detail"]


UNKNOWN = [
    ("GET", "/v1/deploys/d-999"), ("GET", "/v1/deploys/d-999/events"),
    ("POST", "/v1/deploys/d-999/cancel"), ("POST", "/v1/services/nope/restart"),
    ("POST", "/v1/restart/nope"), ("POST", "/v1/services/nope/rollback"),
]


async def test_unknown_names_are_not_found(
    api: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    for method, path in UNKNOWN:
        with subtests.test(call=f"{method} {path}"):
            answer = await api.request(method, path)
            assert answer.status_code == 404
            assert answer.json()["hint"]


@pytest.mark.parametrize(("path", "body", "expected"), [
    ("/v1/services/web/restart", None, ("restart", "web")),
    ("/v1/restart/web", None, ("restart", "web")),
    ("/v1/services/web/rollback", None, ("rollback", "web", None)),
    ("/v1/services/web/rollback", {"to": 3}, ("rollback", "web", 3)),
    ("/v1/services/web/scale", {"replicas": 4}, ("scale", "web", 4)),
])
async def test_restart_rollback_and_scale_stream_like_a_deploy(
    cluster: Cluster, api: httpx.AsyncClient, path: str, body: object, expected: tuple[object, ...]
) -> None:
    await deployed(cluster)
    answer = await api.post(path, json=body, headers={"idempotency-key": "k"})
    messages = read(answer)
    assert messages[0].event == "progress"
    assert json.loads(messages[-1].data)["changed"] == 0
    assert answer.headers["mill-deploy"] == json.loads(messages[0].data)["deploy"]
    *told_, ask = cluster.nodes[0].deploys.asks[0]
    assert tuple(told_) == expected
    assert (ask.key, ask.token) == ("k", "t-admin")  # type: ignore[attr-defined]  # the fake keeps objects


OUT_OF_RANGE: list[tuple[str, object]] = [
    ("/v1/services/web/scale", {"replicas": -1}), ("/v1/services/web/scale", {"replicas": 1001}),
    ("/v1/services/web/scale", {"replicas": "2"}), ("/v1/services/web/scale", {}),
    ("/v1/services/web/scale", {"replicas": 1, "x": 1}), ("/v1/services/web/rollback", {"to": 0}),
]


async def test_bodies_out_of_range_are_unprocessable(
    cluster: Cluster, api: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    await deployed(cluster)
    for path, body in OUT_OF_RANGE:
        with subtests.test(path=path, body=body):
            assert (await api.post(path, json=body)).status_code == 422
            assert not cluster.nodes[0].deploys.asks
