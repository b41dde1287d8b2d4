"""Whoever connects and says nothing, or too slowly, is let go; whoever is served is not."""

from __future__ import annotations

import asyncio
import socket

import pytest

from reconciler.api import listening
from tests.api.cluster import WAIT_S, Cluster, told

HEAD = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


async def test_head_that_does_not_come_is_not_waited_for(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "SILENCE_S", 0.2)
    async with asyncio.timeout(WAIT_S):
        for begun in (b"", HEAD, HEAD + b"\r\n" + HEAD):
            reader, writer = await asyncio.open_connection("127.0.0.1", cluster.nodes[0].port)
            writer.write(begun)
            answer = b""
            try:
                while piece := await reader.read(65_536):
                    answer += piece
            except ConnectionResetError:
                pass
            assert (b"200 OK" in answer) == (b"\r\n\r\n" in begun)
            writer.close()
    (server,) = cluster.nodes[0].server._running
    assert not cluster.nodes[0].server._running[server].silent


async def test_stream_and_connection_in_use_outlast_any_silence(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "SILENCE_S", 0.05)
    node = cluster.nodes[0]
    request = cluster.client().stream("GET", "/v1/events?follow=true")
    async with asyncio.timeout(WAIT_S), request as answer:
        stream = told(answer)
        await anext(stream)
        loop = asyncio.get_running_loop()
        until = loop.time() + 0.5
        while loop.time() < until:
            assert (await cluster.client().get("/v1/services")).status_code == 200
        before = node.state.index
        await cluster.client().put("/v1/secrets/a", json={"value": "x"})
        while True:
            message = await anext(stream)
            if int(message.id or 0) > before:
                break


async def test_many_silent_ones_take_nobodys_place(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "MAX_SILENT", 50)
    node = cluster.nodes[0]
    (server,) = node.server._running.values()
    speaking = cluster.client()
    assert (await speaking.get("/v1/services")).status_code == 200
    silent = []
    try:
        for _ in range(20):
            silent += [socket.create_connection(("127.0.0.1", node.port)) for _ in range(20)]
            assert (await speaking.get("/v1/services")).status_code == 200
        assert len(server.server_state.connections) <= 52
        assert (await cluster.client().get("/v1/services")).status_code == 200
    finally:
        for sock in silent:
            sock.close()
