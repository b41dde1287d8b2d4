"""The description and the routes are one table."""

from __future__ import annotations

import json
import re

import httpx

from reconciler.api.server import CALLS
from tests.api.cluster import Cluster


async def test_every_route_is_described_and_every_description_is_routed(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    document = (await api.get("/v1/openapi.json")).json()
    described = {
        (method.upper(), path) for path, calls in document["paths"].items() for method in calls
    }
    routed = {route.path for route in cluster.nodes[0].server.api.app.routes}  # type: ignore[attr-defined]  # all are Route
    assert {path for _, path in described} == routed
    assert described == {(call.method, call.path) for call in CALLS}
    for path in sorted(routed):
        # Asked with a method that no path has, each one answers with what it really takes.
        answer = await api.request("TRACE", re.sub(r"{\w+}", "x", path))
        assert answer.status_code == 405
        allowed = {(method, path) for method in answer.headers["allow"].split(", ")}
        assert allowed == {pair for pair in described if pair[1] == path}


async def test_document_is_whole(api: httpx.AsyncClient) -> None:
    document = (await api.get("/v1/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    named = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert named <= set(document["components"]["schemas"])
    ids = []
    for path, calls in document["paths"].items():
        for operation in calls.values():
            ids.append(operation["operationId"])
            in_path = {p["name"] for p in operation["parameters"] if p["in"] == "path"}
            assert in_path == set(re.findall(r"{(\w+)}", path))
            assert any(status.startswith("2") for status in operation["responses"])
    assert len(ids) == len(set(ids))
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert "security" not in document["paths"]["/v1/status"]["get"]


async def test_described_parameters_are_those_that_are_taken(
    cluster: Cluster, api: httpx.AsyncClient
) -> None:
    document = (await api.get("/v1/openapi.json")).json()
    parameters = document["paths"]["/v1/deploy"]["post"]["parameters"]
    names = {p["name"] for p in parameters if p["in"] == "query"}
    assert names == {"prune", "strategy", "timeout", "var", "detach"}
    content = document["paths"]["/v1/deploy"]["post"]["requestBody"]["content"]
    assert set(content) == {"text/plain", "multipart/form-data", "application/json"}
    status = document["paths"]["/v1/status"]["get"]["parameters"]
    assert [p["schema"]["enum"] for p in status if p["name"] == "stale"] == [["ok"]]


async def test_real_answers_fit_their_schemas(cluster: Cluster, api: httpx.AsyncClient) -> None:
    """Every field that is sent is described, and every required field is sent."""
    document = (await api.get("/v1/openapi.json")).json()
    for path in ("/v1/status", "/v1/services", "/v1/nodes", "/v1/deploys", "/v1/secrets",
                 "/v1/sources", "/v1/events", "/v1/tokens"):
        success = document["paths"][path]["get"]["responses"]["200"]
        ref = success["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        schema = document["components"]["schemas"][ref]
        sent = set((await api.get(path)).json())
        assert set(schema["required"]) <= sent <= set(schema["properties"])
