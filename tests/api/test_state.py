"""Status, services and nodes: the rows of the contract."""

from __future__ import annotations

import httpx

from reconciler.fsm import commands as c
from tests.api.cluster import Cluster, deployed

TEXT = {"content-type": "text/plain"}
DIGEST = "sha256:" + "a" * 64


async def test_service_row_has_the_fields_of_the_contract(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await deployed(cluster)
    alloc = next(cluster.nodes[0].state.of_service("web"))
    body = (await api.get("/v1/services")).json()
    row = {
        "name": "web", "image": "registry.test/web:v1", "digest": DIGEST, "revision": 1,
        "replicas": {"desired": 1, "healthy": 1}, "owner": "manual", "diverged": False,
        "allocations": [{
            "id": alloc.id, "node": "node-1", "status": "healthy", "address": "10.77.1.2:3000",
            "cpu": 0.25, "memory": 256_000_000, "started_at": "2023-11-14T22:13:20.000Z",
            "restarts": 0, "revision": 1, "reason": "",
        }],
    }
    assert body == {"index": cluster.nodes[0].state.index, "services": [row]}
    one = (await api.get("/v1/services/web")).json()
    revisions = [{"number": 1, "image": "registry.test/web:v1", "digest": DIGEST,
                  "deploy": alloc.deploy, "at": "2023-11-14T22:13:20.000Z"}]
    assert one == {**row, "index": body["index"], "revisions": revisions, "ended": []}
    assert (await api.get("/v1/services/nope")).status_code == 404


async def test_service_of_a_first_deploy_is_shown_as_it_comes_up(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    answer = await api.post("/v1/deploy?detach=true", content="service web", headers=TEXT)
    await cluster.nodes[0].deploys.schedule(answer.json()["id"])
    row = (await api.get("/v1/services")).json()["services"][0]
    assert (row["revision"], row["image"]) == (0, "registry.test/web:v1")
    assert row["replicas"] == {"desired": 1, "healthy": 0}
    assert row["allocations"][0]["status"] == "pending"
    assert row["allocations"][0]["started_at"] is None


async def test_old_and_new_allocations_of_an_update_are_both_listed(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await deployed(cluster)
    answer = await api.post("/v1/deploy?detach=true", content="service web", headers=TEXT)
    await cluster.nodes[0].deploys.schedule(answer.json()["id"])
    row = (await api.get("/v1/services")).json()["services"][0]
    assert sorted(a["revision"] for a in row["allocations"]) == [1, 2]
    assert row["replicas"] == {"desired": 1, "healthy": 1}
    new = next(a["id"] for a in row["allocations"] if a["revision"] == 2)
    for was, status in (("pending", "starting"), ("starting", "running"), ("running", "healthy")):
        await cluster.nodes[0].ledger.propose(
            c.SetAllocStatus(alloc=new, status=status, was=was))  # type: ignore[arg-type]  # literals
    row = (await api.get("/v1/services")).json()["services"][0]
    # Until the commit, only what is live counts: never two of one.
    assert row["replicas"] == {"desired": 1, "healthy": 1}


async def test_ended_allocations_are_told_with_their_reason(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await deployed(cluster)
    alloc = next(cluster.nodes[0].state.of_service("web"))
    await cluster.nodes[0].ledger.propose(c.SetAllocStatus(
        alloc=alloc.id, status="failed", was="healthy", reason="killed: out of memory"))
    one = (await api.get("/v1/services/web")).json()
    assert one["allocations"] == []
    assert [(a["id"], a["status"], a["reason"]) for a in one["ended"]] == [
        (alloc.id, "failed", "killed: out of memory")]


async def test_node_row_has_the_fields_of_the_contract(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    await deployed(cluster)
    node = cluster.nodes[0]
    assert (await api.get("/v1/nodes")).json() == {"index": node.state.index, "nodes": [{
        "id": "node-1", "name": "node-1", "status": "ready", "voter": True, "leader": True,
        "address": f"127.0.0.1:{node.port}", "cpu": {"total": 4.0, "used": 0.25},
        "memory": {"total": 8_000_000_000, "used": 256_000_000}, "allocations": 1,
        "last_seen": "2023-11-14T22:13:20.500Z",
    }]}


async def test_a_closed_log_is_named_with_its_disk_on_the_leader_and_on_the_node_itself(
    pair: Cluster,
) -> None:
    reason = "No space left on device (/var/lib/mill/log)"
    said = f"node-2: its log is closed: {reason}"
    leader, closed = pair.nodes
    leader.health.log["node-2"] = closed.health.log["node-2"] = reason
    for path in ("/v1/status", "/v1/nodes"):
        assert said in (await pair.client().get(path)).json()["warnings"]
        stale = (await pair.client(1).get(path, params={"stale": "ok"})).json()
        assert stale["stale"] is True
        assert said in stale["warnings"]
    leader.health.log.clear()
    assert "warnings" not in (await pair.client().get("/v1/nodes")).json()


async def test_what_a_closed_log_cannot_answer_says_which_disk(pair: Cluster) -> None:
    pair.log.leader = None
    pair.nodes[1].health.log["node-2"] = "No space left on device (/var/lib/mill/log)"
    refused = await pair.client(1).get("/v1/status")
    assert refused.status_code == 503
    assert "(/var/lib/mill/log)" in refused.text


async def test_status_shows_the_running_deploy_and_what_is_off(
    pair: Cluster,
) -> None:
    api = pair.client()
    await deployed(pair)
    quiet = (await api.get("/v1/status")).json()
    assert (quiet["deploy"], quiet["warnings"], quiet["leader"]) == (None, [], "node-1")
    assert (quiet["cluster"], quiet["term"], quiet["node"]) == ("mill-test", 1, "node-1")
    alloc = next(pair.nodes[0].state.of_service("web"))
    pair.nodes[0].health.edge["node-2"] = "route refused"
    await pair.nodes[0].ledger.propose(c.SetNodeStatus("node-2", "down", "silent for 15 s"))
    await pair.nodes[0].ledger.propose(
        c.SetAllocStatus(alloc=alloc.id, status="running", was="healthy", reason="503"))
    deploy_id = (await api.post("/v1/deploy?detach=true", content="service api",
                                headers=TEXT)).json()["id"]
    status = (await api.get("/v1/status")).json()
    assert status["deploy"]["id"] == deploy_id
    assert status["warnings"] == [
        "node-2 is down since 2023-11-14T22:13:20.000Z",
        "the edge of node-2 does not take the routes: route refused",
        "web: 0 of 1 replicas healthy",
    ]
    assert [node["name"] for node in status["nodes"]] == ["node-1", "node-2"]
    assert [service["name"] for service in status["services"]] == ["api", "web"]
