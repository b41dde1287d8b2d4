"""Secrets over HTTP: sealed in the log, in clear for an admin who asks, nowhere else."""

from __future__ import annotations

import json

import httpx
import pytest

from reconciler.fsm.seal import unseal
from tests.api.cluster import KEY, Cluster, deployed

VALUE = "postgres://u:hunter2@db/x"


async def test_secret_is_sealed_in_the_log_and_comes_back_in_clear(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    put = await api.put("/v1/secrets/db.url", json={"value": VALUE})
    index = cluster.nodes[0].state.index
    assert put.json() == {"index": index, "name": "db.url", "version": 1}
    assert (await api.get("/v1/secrets/db.url")).json() == {
        "index": index, "name": "db.url", "value": VALUE, "version": 1}
    assert not any(b"hunter2" in entry for entry in cluster.log.entries)
    sealed = cluster.nodes[0].state.secrets["db.url"].versions[0]
    assert unseal(KEY, sealed.nonce, "db.url", sealed.sealed) == VALUE


async def test_list_has_names_only(api: httpx.AsyncClient) -> None:
    for name in ("b", "a"):
        await api.put(f"/v1/secrets/{name}", json={"value": VALUE})
    answer = await api.get("/v1/secrets")
    assert answer.json()["secrets"] == [{"name": "a"}, {"name": "b"}]
    assert "hunter2" not in answer.text


async def test_new_value_is_a_new_version(api: httpx.AsyncClient) -> None:
    for version in (1, 2):
        put = await api.put("/v1/secrets/a", json={"value": f"v{version}"})
        assert put.json()["version"] == version
    assert (await api.get("/v1/secrets/a")).json()["value"] == "v2"


async def test_a_repeat_with_the_same_key_is_the_same_write(api: httpx.AsyncClient) -> None:
    again = {"idempotency-key": "k-1"}
    first = await api.put("/v1/secrets/a", json={"value": "one"}, headers=again)
    await api.put("/v1/secrets/a", json={"value": "two"})
    repeated = await api.put("/v1/secrets/a", json={"value": "one"}, headers=again)
    assert repeated.json() == first.json()
    assert (await api.get("/v1/secrets/a")).json()["value"] == "two"
    gone = await api.delete("/v1/secrets/a", headers=again)  # another call: a key of its own
    assert gone.status_code == 200
    assert (await api.delete("/v1/secrets/a", headers=again)).json() == gone.json()
    assert (await api.delete("/v1/secrets/a")).status_code == 404
    assert (await api.put("/v1/secrets/a", json={"value": "x"}, headers={
        "idempotency-key": "x" * 300})).status_code == 400


async def test_a_repeated_token_is_refused_for_its_text_was_told_once(
    api: httpx.AsyncClient
) -> None:
    again = {"idempotency-key": "k-1"}
    made = await api.post("/v1/tokens", json={"role": "read"}, headers=again)
    assert made.status_code == 201
    repeated = await api.post("/v1/tokens", json={"role": "read"}, headers=again)
    assert repeated.status_code == 409
    assert len((await api.get("/v1/tokens")).json()["tokens"]) == 2


async def test_delete_of_one_in_use_is_refused_naming_the_services(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await api.put("/v1/secrets/db.url", json={"value": VALUE})
    await deployed(cluster, "service web db.url\nservice api db.url")
    answer = await api.delete("/v1/secrets/db.url")
    assert answer.status_code == 409
    assert "api, web" in answer.json()["detail"]
    await api.put("/v1/secrets/free", json={"value": "x"})
    assert (await api.delete("/v1/secrets/free")).json()["name"] == "free"
    assert (await api.get("/v1/secrets/free")).status_code == 404
    assert (await api.delete("/v1/secrets/free")).status_code == 404


NAMES = [
    ("a", 200), ("A1._-", 200), ("a" * 128, 200), ("a" * 129, 422), (".a", 422), ("-a", 422),
    ("a b", 422), ("a%0A", 422), ("%C3%A9", 422), ("%D9%A1", 422),
]


async def test_names_are_those_of_the_language(
    api: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    for name, status in NAMES:
        with subtests.test(name=name):
            answer = await api.put(f"/v1/secrets/{name}", json={"value": "x"})
            assert answer.status_code == status


VALUES: list[tuple[object, int]] = [
    ({"value": ""}, 200), ({"value": "x" * 256 * 1024}, 200),
    ({"value": "x" * (256 * 1024 + 1)}, 422), ({"value": "\u00e9" * 200_000}, 422),
    ({"value": 5}, 422), ({}, 422), ({"value": "hunter2", "valu": "hunter2"}, 422),
]


async def test_values_are_text_within_a_bound(
    api: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    for body, status in VALUES:
        with subtests.test(body=str(body)[:40]):
            answer = await api.put("/v1/secrets/a", json=body)
            assert answer.status_code == status
            assert "hunter2" not in answer.text


UNREADABLE = [
    b'{"value": "hunter2', b'{"value": hunter2}', b'{"value": "hunter2\xff"}', b"hunter2",
    b'{"value": "hunter2\\ud800"}', b'["hunter2"]', b'{"value": ["hunter2"]}',
]


async def test_body_that_cannot_be_read_is_not_repeated_in_the_error(
    cluster: Cluster, api: httpx.AsyncClient, capsys: pytest.CaptureFixture[str],
    subtests: pytest.Subtests,
) -> None:
    for raw in UNREADABLE:
        with subtests.test(raw=raw):
            answer = await api.put("/v1/secrets/a", content=raw,
                                   headers={"content-type": "application/json"})
            assert answer.status_code in (400, 422)
            assert "hunter2" not in answer.text + "".join(capsys.readouterr())
            assert not cluster.nodes[0].state.secrets


async def test_value_is_in_no_event_and_no_status(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await api.put("/v1/secrets/db.url", json={"value": VALUE})
    await deployed(cluster, "service web db.url")
    for path in ("/v1/events", "/v1/status", "/v1/services/web", "/v1/deploys"):
        assert "hunter2" not in (await api.get(path)).text, path
    assert json.loads((await api.get("/v1/events")).text)["events"]
