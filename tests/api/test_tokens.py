"""Tokens: shown once, kept as hashes, bounded by role, scope, time and revocation."""

from __future__ import annotations

import hashlib
import json

import httpx
import pytest

from reconciler.api import types as t
from reconciler.api.client import Client, Refused
from reconciler.api.join_token import parse_join_token
from reconciler.api.local_token import local_token
from reconciler.api.server import CALLS
from reconciler.edge.certificates import fingerprint
from reconciler.fsm.codec import encode_state
from reconciler.fsm.records import Origin
from tests.api.cluster import KEY, TOKENS, Cluster, deployed

TEXT = {"content-type": "text/plain"}


async def made(api: httpx.AsyncClient, **body: object) -> dict[str, str]:
    answer = await api.post("/v1/tokens", json=body)
    assert answer.status_code == 201, answer.text
    found: dict[str, str] = answer.json()
    return found


async def test_token_works_at_once_on_every_node_and_is_kept_as_a_hash(pair: Cluster) -> None:
    token = await made(pair.client(), role="read")
    assert set(token) == {"index", "id", "token", "role", "services", "expires_at"}
    assert (token["role"], token["services"], token["expires_at"]) == ("read", [], None)
    for node in (0, 1):
        assert (await pair.client(node, token["token"]).get("/v1/services")).status_code == 200
    assert token["token"].encode() not in encode_state(pair.nodes[0].state)
    kept = pair.nodes[0].state.tokens[token["id"]]
    assert kept.sha256 == hashlib.sha256(token["token"].encode()).hexdigest()
    assert token["token"] not in str(pair.nodes[0].state.events)
    assert token["id"] in str(pair.nodes[0].state.events)


async def test_list_shows_all_but_the_texts(cluster: Cluster, api: httpx.AsyncClient) -> None:
    await cluster.found_authority()
    read = await made(api, role="read", expires="30d")
    web = await made(api, role="deploy", services=["web", "api", "web"])
    join = await made(api, join=True, uses=3)
    listed = (await api.get("/v1/tokens")).json()
    assert listed["index"] == cluster.nodes[0].state.index
    rows = {row["id"]: row for row in listed["tokens"]}
    assert list(rows) == sorted(rows, key=lambda name: (rows[name]["created_at"], name))
    assert rows[web["id"]] == {
        "id": web["id"], "role": "deploy", "services": ["api", "web"], "uses": 0, "used": 0,
        "created_at": "2023-11-14T22:13:20.000Z", "expires_at": None}
    assert rows[read["id"]]["expires_at"] == "2023-12-14T22:13:20.000Z"
    assert rows[join["id"]]["uses"] == 3
    assert rows[join["id"]]["expires_at"] == "2023-11-14T23:13:20.000Z"
    for secret in (read["token"], web["token"], join["token"]):
        assert secret not in json.dumps(listed)


async def test_revoked_token_is_good_nowhere(pair: Cluster) -> None:
    token = await made(pair.client(), role="admin")
    mine = pair.client(1, token["token"])
    assert (await mine.get("/v1/tokens")).status_code == 200
    gone = await pair.client().delete(f"/v1/tokens/{token['id']}")
    assert (gone.status_code, gone.json()["name"]) == (200, token["id"])
    for node in (0, 1):
        answer = await pair.client(node, token["token"]).get("/v1/services")
        assert (answer.status_code, answer.headers["www-authenticate"][:6]) == (401, "Bearer")
    assert (await pair.client().delete(f"/v1/tokens/{token['id']}")).status_code == 404


async def test_last_admin_token_stays(api: httpx.AsyncClient) -> None:
    answer = await api.delete("/v1/tokens/t-admin")
    assert answer.status_code == 409
    assert "last admin token" in answer.json()["detail"]


async def test_expired_token_is_good_no_more(cluster: Cluster, api: httpx.AsyncClient) -> None:
    token = await made(api, role="read", expires="1h")
    client = cluster.client(token=token["token"])
    cluster.clock.advance(3_599)
    assert (await client.get("/v1/services")).status_code == 200
    cluster.clock.advance(1)
    answer = await client.get("/v1/services")
    assert (answer.status_code, answer.json()["detail"]) == (401, "this token has expired")


@pytest.mark.parametrize(("body", "said"), [
    ({}, "no role"), ({"role": "root"}, "body does not fit"), ({"role": "read", "x": 1}, "fit"),
    ({"role": "read", "services": ["web"]}, "not bound to services"),
    ({"role": "deploy", "services": ["Web"]}, "not the name of a service"),
    ({"role": "deploy", "services": ["s" + str(n) for n in range(101)]}, "101 services"),
    ({"role": "read", "expires": "soon"}, "expires cannot be"),
    ({"role": "read", "expires": "31d"}, "expires cannot be"),
    ({"role": "read", "uses": 1}, "uses are for join"),
    ({"join": True, "role": "read"}, "no role"), ({"join": True, "services": ["a"]}, "no role"),
    ({"join": True, "uses": 0}, "uses cannot be 0"), ({"join": True, "uses": 254}, "uses cannot"),
])
async def test_what_makes_no_sense_is_422(
    cluster: Cluster, api: httpx.AsyncClient, body: dict[str, object], said: str
) -> None:
    answer = await api.post("/v1/tokens", json=body)
    assert answer.status_code == 422
    assert said in answer.json()["detail"]
    assert list(cluster.nodes[0].state.tokens) == ["t-admin"]


async def test_join_token_says_where_whom_and_with_what(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    token = await made(api, join=True)
    assert token["role"] == "join"
    assert token["uses"] == 1  # type: ignore[comparison-overlap]  # JSON
    parsed = parse_join_token(token["token"])
    assert parsed.address == f"127.0.0.1:{cluster.nodes[0].port}"
    assert parsed.fingerprint == fingerprint(cluster.authority.cert_pem)
    kept = cluster.nodes[0].state.tokens[parsed.id]
    assert kept.sha256 == hashlib.sha256(parsed.secret.encode()).hexdigest()
    for text in (parsed.secret, token["token"]):  # it lets machines in, and nobody ask
        answer = await cluster.client(token=text).get("/v1/services")
        assert answer.status_code == 401


async def test_roots_token_of_a_node_is_an_admins_on_every_node(pair: Cluster) -> None:
    for node in (0, 1):
        client = pair.client(node, local_token(KEY))
        assert (await client.get("/v1/tokens")).status_code == 200
        other = pair.client(node, local_token(b"x" * 32))
        assert (await other.get("/v1/tokens")).status_code == 401


async def test_only_admins_have_to_do_with_tokens_and_nodes(
    cluster: Cluster, api: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    calls = [call for call in CALLS if not call.open
             and call.path.startswith(("/v1/tokens", "/v1/nodes/", "/v1/backup", "/v1/restore"))]
    assert len(calls) >= 8
    for role in ("read", "deploy"):
        client = cluster.client(token=(await made(api, role=role))["token"])
        for call in calls:
            with subtests.test(call=f"{role}: {call.method} {call.path}"):
                path = call.path.replace("{id}", "node-1")
                assert (await client.request(call.method, path)).status_code == 403
    assert not cluster.nodes[0].state.nodes["node-1"].draining


# -- bound to services -----------------------------------------------------------------------


async def test_token_bound_to_services_deploys_those_alone(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await deployed(cluster, "service web\nservice api")
    token = await made(api, role="deploy", services=["web", "new"])
    client = cluster.client(token=token["token"])
    deploys = cluster.nodes[0].deploys
    before = len(deploys.requests)
    refused = await client.post("/v1/deploy?detach=true", content="service web\nservice api",
                                headers=TEXT)
    assert refused.status_code == 403
    assert refused.json()["detail"] == "this token may not touch api"
    assert refused.json()["hint"] == "it is for new, web"
    pruned = await client.post("/v1/deploy?detach=true&prune=true", content="service web",
                               headers=TEXT)
    assert (pruned.status_code, pruned.json()["detail"]) == (403, "this token may not prune")
    assert len(deploys.requests) == before
    invalid = await client.post("/v1/deploy?detach=true", content="wrong", headers=TEXT)
    assert invalid.status_code == 422
    keyed = {**TEXT, "idempotency-key": "k"}
    taken = await client.post("/v1/deploy?detach=true", content="service web\nservice new",
                              headers=keyed)
    assert taken.status_code == 202
    again = await client.post("/v1/deploy?detach=true", content="service web\nservice new",
                              headers=keyed)
    assert (again.status_code, again.json()["id"]) == (202, taken.json()["id"])
    assert deploys.requests[-1].origin.token == token["id"]


async def test_token_bound_to_services_scales_restarts_rolls_back_and_cancels_those_alone(
    cluster: Cluster, api: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    await deployed(cluster, "service web\nservice api")
    client = cluster.client(token=(await made(api, role="deploy", services=["web"]))["token"])
    for verb, body in (("restart", None), ("scale", {"replicas": 2}), ("rollback", {"to": 1})):
        for name, status in (("web", 202), ("api", 403), ("nosuch", 403)):
            with subtests.test(verb=verb, name=name):
                path = f"/v1/services/{name}/{verb}?detach=true"
                assert (await client.post(path, json=body)).status_code == status
    assert (await client.post("/v1/restart/api")).status_code == 403
    running = await cluster.nodes[0].deploys.begin((), Origin())
    assert (await client.post(f"/v1/deploys/{running}/cancel")).status_code == 202


async def test_token_bound_to_services_cancels_no_other_deploy(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    client = cluster.client(token=(await made(api, role="deploy", services=["web"]))["token"])
    answer = await api.post("/v1/deploy?detach=true", content="service web\nservice api",
                            headers=TEXT)
    cancel = f"/v1/deploys/{answer.json()['id']}/cancel"
    refused = await client.post(cancel)
    assert (refused.status_code, refused.json()["detail"]) == (403, "this token may not touch api")
    assert (await api.post(cancel)).status_code == 202


async def test_every_other_call_that_changes_something_is_closed_to_it(
    cluster: Cluster, api: httpx.AsyncClient, subtests: pytest.Subtests
) -> None:
    client = cluster.client(token=(await made(api, role="deploy", services=["web"]))["token"])
    for call in CALLS:
        if call.role == "read" or call.scoped or call.open:
            continue
        with subtests.test(call=f"{call.method} {call.path}"):
            path = call.path.replace("{name}", "web").replace("{id}", "web")
            assert (await client.request(call.method, path)).status_code == 403
    assert (await client.get("/v1/services")).status_code == 200


# -- too many ---------------------------------------------------------------------------------


async def test_wrong_tokens_are_429_after_a_while_and_right_ones_never(cluster: Cluster) -> None:
    wrong, right = cluster.client(token="guess"), cluster.client()
    seen = [(await wrong.get("/v1/services")).status_code for _ in range(40)]
    assert seen == [401] * 30 + [429] * 10
    answer = await wrong.get("/v1/services")
    assert (answer.headers["retry-after"], answer.json()["status"]) == ("1", 429)
    assert answer.headers["content-type"] == "application/problem+json"
    assert (await right.get("/v1/services")).status_code == 200
    cluster.clock.advance(2)
    assert (await wrong.get("/v1/services")).status_code == 401


async def test_follower_counts_what_the_leader_refused_and_asks_it_no_more(
    pair: Cluster,
) -> None:
    wrong = pair.client(1, token="guess")
    seen = [(await wrong.get("/v1/services")).status_code for _ in range(40)]
    assert seen == [401] * 30 + [429] * 10
    await pair.nodes[0].server.stop()
    assert (await wrong.get("/v1/services")).status_code == 429


# -- the client -------------------------------------------------------------------------------


async def test_client_makes_lists_and_revokes(cluster: Cluster) -> None:
    async with Client([cluster.nodes[0].url], TOKENS["admin"]) as client:
        token = await client.create_token(t.TokenBody(role="deploy", services=("web",)))
        assert token.token not in repr(token)
        assert [row.id for row in (await client.tokens()).tokens] == sorted(["t-admin", token.id])
        assert (await client.revoke_token(token.id)).name == token.id
        with pytest.raises(Refused, match="no token") as caught:
            await client.revoke_token(token.id)
        assert caught.value.status == 404
