"""Backup and restore over HTTP, from one cluster to another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import quote

import httpx
import pytest
from msgspec.structs import replace

from reconciler.api.client import Client, Refused
from tests.api.cluster import TOKENS, Cluster, deployed

PASSPHRASE = "grüße aus der tiefe"
SEALED = {"mill-passphrase": quote(PASSPHRASE)}


@pytest.fixture
async def empty() -> AsyncIterator[Cluster]:
    made = Cluster()
    try:
        await made.start(1)
        yield made
    finally:
        await made.stop()


async def filled(cluster: Cluster, api: httpx.AsyncClient) -> None:
    await api.put("/v1/secrets/db", json={"value": "hunter2"})
    await deployed(cluster, "service web db\nservice api")
    await deployed(cluster, "service web db")
    source = {"name": "repo", "url": "https://forge.test/repo.git", "secret_ref": "db"}
    assert (await api.post("/v1/sources", json=source)).status_code == 201


async def test_a_cluster_comes_back_from_its_backup_in_another(
    cluster: Cluster, api: httpx.AsyncClient, empty: Cluster
) -> None:
    await filled(cluster, api)
    before = cluster.nodes[0].state
    taken = await api.get("/v1/backup", headers=SEALED)
    assert taken.status_code == 200
    assert taken.headers["content-type"] == "application/octet-stream"
    assert f"mill-test-{before.index}" in taken.headers["content-disposition"]
    other = empty.client()
    answer = await other.post("/v1/restore", content=taken.content, headers=SEALED)
    after = empty.nodes[0].state
    assert answer.json() == {
        "index": after.index, "cluster": "mill-test", "backup_index": before.index,
        "taken_at": "2023-11-14T22:13:20.000Z", "services": ["api", "web"], "secrets": ["db"],
        "sources": ["repo"],
    }
    assert (await other.get("/v1/secrets/db")).json()["value"] == "hunter2"
    (source,) = (await other.get("/v1/sources")).json()["sources"]
    assert (source["status"], source["reason"]) == ("suspended", "restored from a backup")
    assert after.specs == before.specs
    for name, service in before.services.items():
        kept = tuple(replace(r, deploy="") for r in service.revisions)
        assert after.services[name] == replace(service, revisions=kept)
    assert after.tokens == empty.nodes[0].state.tokens
    assert after.allocations == {}
    kinds = [e["data"].get("kind") for e in (await other.get("/v1/events")).json()["events"]]
    assert kinds[-1] == "cluster_restored"


async def test_a_second_restore_is_a_conflict_that_names_what_is_there(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await filled(cluster, api)
    data = (await api.get("/v1/backup", headers=SEALED)).content
    answer = await api.post("/v1/restore", content=data, headers=SEALED)
    assert answer.status_code == 409
    assert "service api" in answer.json()["detail"]


async def test_without_a_good_passphrase_there_is_neither(
    cluster: Cluster, api: httpx.AsyncClient, empty: Cluster
) -> None:
    await filled(cluster, api)
    for headers in ({}, {"mill-passphrase": "short"}, {"mill-passphrase": "%ff%fe" * 8}):
        answer = await api.get("/v1/backup", headers=headers)
        assert answer.status_code == 422
        assert "passphrase" in answer.json()["detail"].lower()
    data = (await api.get("/v1/backup", headers=SEALED)).content
    other = empty.client()
    for content, headers, said in (
        (data, {"mill-passphrase": "another passphrase"}, "does not open"),
        (data, {}, "does not open"), (data[:-1], SEALED, "damaged"),
        (b"manifest", SEALED, "no backup"), (b"", SEALED, "no backup"),
    ):
        answer = await other.post("/v1/restore", content=content, headers=headers)
        assert answer.status_code == 422
        assert said in answer.json()["detail"]
    assert empty.nodes[0].state.services == {}


async def test_only_an_admin_may(cluster: Cluster) -> None:
    for role in ("read", "deploy"):
        cluster.grant(role)  # type: ignore[arg-type]  # two of the roles
        api = cluster.client(token=role)
        assert (await api.get("/v1/backup", headers=SEALED)).status_code == 403
        assert (await api.post("/v1/restore", headers=SEALED)).status_code == 403


async def test_a_follower_passes_both_on_bytes_and_all(pair: Cluster, empty: Cluster) -> None:
    await filled(pair, pair.client())
    taken = await pair.client(node=1).get("/v1/backup", headers=SEALED)
    assert taken.status_code == 200
    index = (await empty.client().post("/v1/restore", content=taken.content, headers=SEALED))
    assert index.status_code == 200


async def test_a_body_over_the_usual_bound_reaches_restore_and_nothing_else(
    pair: Cluster
) -> None:
    follower, large = pair.client(node=1), b"x" * (3 << 20)
    answer = await follower.post("/v1/restore", content=large, headers=SEALED)
    assert answer.status_code == 422
    assert "no backup" in answer.json()["detail"]
    assert (await follower.post("/v1/deploy", content=large)).status_code == 413


async def test_a_cluster_without_majority_gives_what_one_node_knows(pair: Cluster) -> None:
    await filled(pair, pair.client())
    pair.log.majority = False
    api = pair.client(node=1)
    assert (await api.get("/v1/backup", headers=SEALED)).status_code == 503
    assert (await api.get("/v1/backup?stale=ok", headers=SEALED)).status_code == 200


async def test_the_client_takes_a_backup_and_restores_it(
    cluster: Cluster, api: httpx.AsyncClient, empty: Cluster
) -> None:
    await filled(cluster, api)
    async with Client([cluster.nodes[0].url], TOKENS["admin"]) as client:
        data = await client.backup(PASSPHRASE)
        index = cluster.nodes[0].state.index
        assert (await client.status(at=index)).index == index
        with pytest.raises(Refused, match="an empty one"):
            await client.restore(data, PASSPHRASE)
    async with Client([empty.nodes[0].url], TOKENS["admin"]) as client:
        assert (await client.restore(data, PASSPHRASE)).services == ("api", "web")
