"""Nodes over the API: drained, taken back, removed; and machines that join."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl

import httpx
import pytest
from cryptography import x509

from reconciler.api.client import Client, Refused
from reconciler.api.join_token import JoinToken, parse_join_token
from reconciler.api.stream import Message
from reconciler.edge.certificates import create_key_and_csr
from reconciler.errors import Unavailable
from reconciler.fsm import commands as c
from tests.api.cluster import TOKENS, WAIT_S, Cluster, deployed, told


async def moved(cluster: Cluster, alloc: str, to: str) -> None:
    """As the leader's loops do: a replacement on another node, then the old one ends."""
    propose, state = cluster.nodes[0].ledger.propose, cluster.nodes[0].state
    old = state.allocations[alloc]
    new = f"{old.service}-moved{len(state.allocations)}"
    await propose(c.ScheduleAlloc(alloc=new, service=old.service, node=to, slot=old.slot,
                                  replaces=alloc))
    for was, status in (("pending", "starting"), ("starting", "running"), ("running", "healthy")):
        await propose(c.SetAllocStatus(alloc=new, status=status, was=was))  # type: ignore[arg-type]  # states
    await propose(c.RetireAlloc(alloc=alloc, successor=new, was="healthy"))
    await propose(c.SetAllocStatus(alloc=alloc, status="stopped", was="stopping"))


def data(message: Message) -> dict[str, object]:
    found: dict[str, object] = json.loads(message.data)
    return found


# -- draining --------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0, 1])
async def test_drain_is_told_step_by_step_until_the_node_is_empty(
    pair: Cluster, asked: int
) -> None:
    await deployed(pair)
    (alloc,) = pair.nodes[0].state.allocations
    request = pair.client(asked).stream("POST", "/v1/nodes/node-1/drain?timeout=5m")
    async with asyncio.timeout(WAIT_S), request as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream"
        stream = told(answer)
        first = await anext(stream)
        assert (first.event, data(first)) == (
            "progress", {"phase": "draining", "node": "node-1", "left": 1})
        rows = (await pair.client().get("/v1/nodes")).json()["nodes"]
        assert [row["status"] for row in rows] == ["draining", "ready"]
        await moved(pair, alloc, "node-2")
        pair.log.leader = "node-2"  # it led: the executor hands that over too
        messages = [message async for message in stream]
    assert [message.event for message in messages][-1] == "done"
    phases = [data(message).get("phase") for message in messages[:-1]]
    assert {"moving", "moved"} <= set(phases)
    end = data(messages[-1])
    assert end["success"] is True
    assert "phase" not in end
    assert isinstance(end["elapsed"], float)


async def test_drain_that_does_not_end_in_time_fails_and_the_node_stays_draining(
    pair: Cluster,
) -> None:
    await deployed(pair)
    request = pair.client().stream("POST", "/v1/nodes/node-1/drain")
    async with asyncio.timeout(WAIT_S), request as answer:
        stream = told(answer)
        await anext(stream)
        pair.clock.advance(600)
        messages = [data(message) async for message in stream]
    assert messages[-1]["success"] is False
    assert messages[-1]["left"] == 1
    assert pair.nodes[0].state.nodes["node-1"].status == "draining"


async def test_undrained_node_takes_allocations_again(pair: Cluster) -> None:
    client = pair.client(1)
    assert (await client.post("/v1/nodes/node-2/undrain")).status_code == 409
    await pair.nodes[0].ledger.propose(c.DrainNode("node-2"))
    answer = (await client.post("/v1/nodes/node-2/undrain")).json()
    assert (answer["name"], answer["status"], answer["voter"]) == ("node-2", "ready", True)
    assert answer["index"] == pair.nodes[0].state.index


async def test_node_with_allocations_is_409_that_names_them(pair: Cluster) -> None:
    await deployed(pair)
    (alloc,) = pair.nodes[0].state.allocations
    refused = await pair.client().delete("/v1/nodes/node-1")
    assert refused.status_code == 409
    assert alloc in refused.json()["detail"]
    assert "mill drain node-1" in refused.json()["hint"]
    gone = await pair.client().delete("/v1/nodes/node-2")
    assert (gone.status_code, gone.json()["name"]) == (200, "node-2")
    rows = (await pair.client().get("/v1/nodes")).json()["nodes"]
    assert [row["id"] for row in rows] == ["node-1"]


async def test_unknown_node_is_404_before_any_stream(api: httpx.AsyncClient) -> None:
    for method, path in (("POST", "/v1/nodes/x/drain"), ("POST", "/v1/nodes/x/undrain"),
                         ("DELETE", "/v1/nodes/x")):
        answer = await api.request(method, path)
        assert (answer.status_code, answer.json()["detail"]) == (404, "no node x")


async def test_timeout_is_a_duration(cluster: Cluster, api: httpx.AsyncClient) -> None:
    answer = await api.post("/v1/nodes/node-1/drain?timeout=long")
    assert answer.status_code == 422
    assert not cluster.nodes[0].state.nodes["node-1"].draining


async def test_node_without_the_part_says_so(cluster: Cluster, api: httpx.AsyncClient) -> None:
    backend = cluster.nodes[0].server.api.site.backend
    object.__setattr__(backend, "nodes", None)
    object.__setattr__(backend, "joining", None)
    for method, path in (("POST", "/v1/nodes/node-1/drain"), ("DELETE", "/v1/nodes/node-1"),
                         ("GET", "/v1/join/ca")):
        answer = await api.request(method, path)
        assert answer.status_code == 503
        assert answer.json()["hint"]
    answer = await api.post("/v1/tokens", json={"join": True})
    assert answer.status_code == 503


async def test_who_votes_is_the_logs_word(pair: Cluster) -> None:
    pair.nodes[0].health.learners.add("node-2")
    rows = (await pair.client().get("/v1/nodes")).json()["nodes"]
    assert [row["voter"] for row in rows] == [True, False]


async def test_client_asks_again_where_the_stream_breaks_off(pair: Cluster) -> None:
    """The node that told it goes away in the middle; the other one goes on telling."""
    await deployed(pair)
    (alloc,) = pair.nodes[0].state.allocations
    addresses = [f"127.0.0.1:{node.port}" for node in pair.nodes]
    phases = []
    async with asyncio.timeout(WAIT_S), Client(addresses, TOKENS["admin"]) as client:
        async for step in client.drain("node-1", "5m"):
            if not phases:
                assert step.left == 1
                await moved(pair, alloc, "node-2")
                pair.log.leader = "node-2"
                await pair.nodes[0].server.stop()
            phases.append(step.phase)
    assert phases[0] == "draining"
    assert phases[-1] == "done"


async def test_client_undrains_and_removes(pair: Cluster) -> None:
    async with Client([f"127.0.0.1:{pair.nodes[1].port}"], TOKENS["admin"]) as client:
        with pytest.raises(Refused, match="not draining"):
            await client.undrain("node-2")
        assert (await client.remove_node("node-2")).name == "node-2"
        with pytest.raises(Refused, match="last node"):
            await client.remove_node("node-1")


# -- joining ---------------------------------------------------------------------------------


async def invitation(cluster: Cluster, **body: object) -> JoinToken:
    await cluster.found_authority()
    answer = await cluster.client().post("/v1/tokens", json={"join": True, **body})
    return parse_join_token(answer.json()["token"])


def body(token: JoinToken, csr: bytes, name: str = "m-1", ip: str = "10.0.0.1",
         **fields: object) -> dict[str, object]:
    return {"token": token.secret, "id": token.id, "name": name, "csr": csr.decode(),
            "api": f"{ip}:4400", "agent": f"{ip}:4402", "log": f"{ip}:4401",
            "cpu_milli": 4_000, "memory_bytes": 8_000_000_000, **fields}


@pytest.mark.parametrize("asked", [0, 1])
async def test_machine_joins_through_any_node_and_gets_what_it_needs(
    pair: Cluster, asked: int
) -> None:
    token = await invitation(pair)
    nobody = pair.client(asked, token=None)
    ca = await nobody.get("/v1/join/ca")
    der = ssl.PEM_cert_to_DER_cert(ca.text)
    assert hashlib.sha256(der).hexdigest() == token.fingerprint
    _, csr = create_key_and_csr("m-1")
    answer = await nobody.post("/v1/join", json=body(token, csr))
    assert answer.status_code == 200, answer.text
    joined = answer.json()
    assert (joined["cluster"], joined["number"], joined["ca"]) == ("mill-test", 3, ca.text)
    assert [node["name"] for node in joined["nodes"]] == ["node-1", "node-2", "m-1"]
    assert [member["name"] for member in joined["members"]] == ["node-1", "node-2"]
    certificate = x509.load_pem_x509_certificate(joined["certificate"].encode())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca.content))
    again = await nobody.post("/v1/join", json=body(token, csr))
    assert (again.status_code, again.json()["number"]) == (200, 3)
    assert pair.nodes[0].state.tokens[token.id].joined == (
        pair.nodes[0].state.nodes["m-1"].key_sha256,)


async def test_token_that_is_wrong_revoked_spent_or_over_lets_nobody_in(
    pair: Cluster, subtests: pytest.Subtests
) -> None:
    token = await invitation(pair)
    nobody = pair.client(1, token=None)
    _, csr = create_key_and_csr("m-1")
    _, other = create_key_and_csr("m-2")

    async def refused(status: int, said: str, sent: dict[str, object]) -> None:
        with subtests.test(said=said):
            answer = await nobody.post("/v1/join", json=sent)
            assert (answer.status_code, answer.headers["content-type"]) == (
                status, "application/problem+json")
            assert said in answer.json()["detail"]
            assert "mill token create --join" in answer.json()["hint"]

    await refused(401, "no such join token", {**body(token, csr), "token": "guess"})
    await refused(401, "no such join token", {**body(token, csr), "id": "t-none"})
    await refused(401, "no such join token", {**body(token, csr), "id": "t-admin",
                                              "token": TOKENS["admin"]})
    assert (await nobody.post("/v1/join", json=body(token, csr))).status_code == 200
    await refused(403, "spent", body(token, other, "m-2", "10.0.0.2"))
    old = await invitation(pair, expires="5m")
    pair.clock.advance(300)
    await refused(403, "expired", body(old, other, "m-2", "10.0.0.2"))
    gone = await invitation(pair)
    await pair.client().delete(f"/v1/tokens/{gone.id}")
    await refused(401, "no such join token", body(gone, other, "m-2", "10.0.0.2"))
    assert sorted(pair.nodes[0].state.nodes) == ["m-1", "node-1", "node-2"]


async def test_guesses_at_join_tokens_are_429_after_a_while(pair: Cluster) -> None:
    token = await invitation(pair)
    _, csr = create_key_and_csr("m-1")
    nobody = pair.client(1, token=None)
    seen = [(await nobody.post("/v1/join", json={**body(token, csr), "token": "guess"})).status_code
            for _ in range(32)]
    assert seen == [401] * 30 + [429] * 2
    assert (await nobody.post("/v1/join", json=body(token, csr))).status_code == 200


async def test_name_of_another_machine_is_409(pair: Cluster) -> None:
    token = await invitation(pair)
    _, csr = create_key_and_csr("node-1")
    answer = await pair.client(token=None).post("/v1/join", json=body(token, csr, "node-1"))
    assert answer.status_code == 409
    assert "node-1 is taken" in answer.json()["detail"]
    assert pair.nodes[0].state.tokens[token.id].joined == ()


@pytest.mark.parametrize("fields", [
    {"csr": "junk"}, {"api": "nowhere"}, {"cpu_milli": 0}, {"extra": 1},
    {"memory_bytes": "much"},
])
async def test_request_that_cannot_be_taken_is_told_why_and_spends_nothing(
    cluster: Cluster, fields: dict[str, object]
) -> None:
    token = await invitation(cluster)
    _, csr = create_key_and_csr("m-1")
    answer = await cluster.client(token=None).post(
        "/v1/join", content=json.dumps({**body(token, csr), **fields}),
        headers={"content-type": "application/json"})
    assert answer.status_code == 422
    assert cluster.nodes[0].state.tokens[token.id].joined == ()
    assert token.secret not in answer.text


async def test_body_of_a_join_is_small(cluster: Cluster) -> None:
    answer = await cluster.client(token=None).post("/v1/join", content=b"x" * 65_537)
    assert answer.status_code == 413


async def test_leader_that_loses_its_lead_breaks_the_stream_off_without_an_end(
    cluster: Cluster,
) -> None:
    """What ends a drain is told by its end alone: the reader asks another node."""
    from reconciler.api.nodes import _frames
    from reconciler.executor.requests import DrainStep

    async def steps():  # type: ignore[no-untyped-def]  # two lines
        yield DrainStep(phase="warning", reason="so")
        raise Unavailable("no leader")

    frames = [frame async for frame in _frames(DrainStep(phase="draining"), steps())]
    assert len(frames) == 2
    assert not any(b"event: failed" in frame for frame in frames)
