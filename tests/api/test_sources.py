"""Sources over HTTP."""

from __future__ import annotations

import httpx
import pytest

from tests.api.cluster import Cluster

BODY = {"name": "shop", "url": "https://git.test/shop.git", "branch": "prod", "path": "/deploy",
        "poll": "1m30s", "services": ["web", "api"], "hosts": ["App.Example.com"],
        "variables": {"tag": "v1"}}


async def test_added_source_comes_back_as_it_was_described(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    answer = await api.post("/v1/sources", json=BODY)
    assert answer.status_code == 201
    record = {
        "name": "shop", "url": "https://git.test/shop.git", "branch": "prod", "path": "/deploy",
        "poll": "90s", "secret_ref": "", "services": ["api", "web"],
        "hosts": ["app.example.com"], "variables": {"tag": "v1"}, "status": "waiting",
        "reason": "", "since": "2023-11-14T22:13:20.000Z", "head": "", "applied": "",
        "next_poll": "2023-11-14T22:13:30.000Z",
    }
    index = cluster.nodes[0].state.index
    assert answer.json() == {**record, "index": index}
    assert (await api.get("/v1/sources/shop")).json() == {**record, "index": index}
    assert (await api.get("/v1/sources")).json() == {"index": index, "sources": [record]}


async def test_defaults_are_those_of_the_contract(api: httpx.AsyncClient) -> None:
    answer = await api.post("/v1/sources", json={"name": "a", "url": "/srv/repo"})
    body = answer.json()
    assert (body["branch"], body["path"], body["poll"]) == ("main", "/", "10s")


async def test_name_that_is_taken_is_a_conflict(api: httpx.AsyncClient) -> None:
    await api.post("/v1/sources", json=BODY)
    answer = await api.post("/v1/sources", json=BODY)
    assert answer.status_code == 409
    assert "shop" in answer.json()["detail"]


UNFIT: list[dict[str, object]] = [
    {"name": "Shop"}, {"name": "a--b"}, {"name": "a" * 41}, {"name": ""}, {"name": "a\n"},
    {"url": "ext::sh -c x"}, {"url": "--upload-pack=x"}, {"url": "ssh://git.test/x"},
    {"url": "https://u:p@git.test/x"}, {"branch": "-x"}, {"branch": ""}, {"path": "/../x"},
    {"poll": "5"}, {"poll": "10ms"}, {"secret_ref": "nope"}, {"more": 1}, {"services": "web"},
    {"require_signed": "key"}, {"no_rewrites": True}, {"variables": {"a": 1}},
    {"hosts": ["x"] * 1001},
]


async def test_what_cannot_be_followed_is_unprocessable(
    cluster: Cluster, api: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    for change in UNFIT:
        with subtests.test(change=str(change)[:60]):
            answer = await api.post("/v1/sources", json={**BODY, **change})
            assert answer.status_code == 422, answer.text
            assert not cluster.nodes[0].state.sources


async def test_credentials_in_a_url_are_not_repeated(api: httpx.AsyncClient) -> None:
    answer = await api.post("/v1/sources", json={**BODY, "url": "https://u:hunter2@git.test/x"})
    assert "hunter2" not in answer.text


async def test_credentials_go_over_plain_http_to_loopback_only(api: httpx.AsyncClient) -> None:
    await api.put("/v1/secrets/git", json={"value": "u:p"})
    far = {**BODY, "secret_ref": "git", "url": "http://git.test/x.git"}
    assert (await api.post("/v1/sources", json=far)).status_code == 422
    near = {**far, "url": "http://127.0.0.1:8080/x.git"}
    assert (await api.post("/v1/sources", json=near)).status_code == 201


async def test_sync_and_removal_reach_the_loop(cluster: Cluster, api: httpx.AsyncClient) -> None:
    await api.post("/v1/sources", json=BODY)
    assert (await api.post("/v1/sources/shop/sync")).status_code == 202
    await api.post("/v1/sources/shop/sync?allow_empty=true&retry=true")
    sources = cluster.nodes[0].sources
    assert sources.synced == [("shop", False, False), ("shop", True, True)]
    assert (await api.delete("/v1/sources/shop?prune=true")).json()["name"] == "shop"
    assert sources.removed == [("shop", True)]
    for method, path in (("GET", "shop"), ("DELETE", "shop"), ("POST", "shop/sync")):
        assert (await api.request(method, f"/v1/sources/{path}")).status_code == 404
