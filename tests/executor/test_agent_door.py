"""Agents obey the newest term alone, and only certificates of the cluster's CA are spoken to."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc
import pytest

from reconciler.edge.certificates import create_ca, issue
from reconciler.executor.agent.orders import (
    SERVICE,
    SESSION,
    Hello,
    Inventory,
    Order,
    Probe,
    Report,
    Start,
    decode_report,
    encode,
)
from reconciler.executor.agent.terms import Terms
from reconciler.executor.links import Credentials
from tests.executor.world import Node, World, service, world


def _order(alloc: str, term: int) -> Start:
    return Start(term=term, alloc=alloc, service="web", image="r/web:ok", digest="sha256:1",
                 address="10.77.1.9", probe=Probe(kind="running"))


def _call(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall[Order, Report]:
    return channel.stream_stream(f"/{SERVICE}/{SESSION}", request_serializer=encode,
                                 response_deserializer=decode_report)()


async def _greet(channel: grpc.aio.Channel) -> None:
    call = _call(channel)
    await call.write(Hello(99, "node-1"))
    await call.read()


def _credentials(w: World, name: str = "node-1") -> Credentials:
    identity = issue(w.authority, name, ("127.0.0.1",))
    return Credentials(identity.ca_pem, identity.cert_pem, identity.key_pem)


async def _started(node: Node, alloc: str) -> None:
    async with asyncio.timeout(30):
        while alloc not in node.runtime.started:
            await asyncio.sleep(0.01)


async def test_an_older_term_is_refused_at_the_door(tmp_path: Path) -> None:
    async with world(tmp_path, 1) as w:
        await w.unlead()
        node = w.nodes["node-1"]
        async with _credentials(w).channel(node.address, "node-1") as channel:
            newer = _call(channel)
            await newer.write(Hello(9, "node-1"))
            assert isinstance(await newer.read(), Inventory)
            older = _call(channel)
            await older.write(Hello(8, "node-1"))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await older.read()
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION


async def test_orders_of_a_session_that_a_newer_term_replaced_do_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, 1) as w:
        await w.unlead()
        node = w.nodes["node-1"]
        async with _credentials(w).channel(node.address, "node-1") as channel:
            old, new = _call(channel), _call(channel)
            await old.write(Hello(8, "node-1"))
            assert isinstance(await old.read(), Inventory)
            await new.write(Hello(9, "node-1"))
            assert isinstance(await new.read(), Inventory)
            with contextlib.suppress(
                    grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
                await old.write(_order("late-000001", 8))  # it may be closed already
            await new.write(_order("good-000001", 9))
            await _started(node, "good-000001")
        assert "late-000001" not in node.runtime.started


async def test_a_certificate_of_another_authority_gets_no_session(tmp_path: Path) -> None:
    async with world(tmp_path, 1) as w:
        node = w.nodes["node-1"]
        stranger = issue(create_ca(), "node-1", ("127.0.0.1",))
        ours = _credentials(w)
        forged = Credentials(ours.ca, stranger.cert_pem, stranger.key_pem)
        async with forged.channel(node.address, "node-1") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await _greet(channel)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_leader_speaks_only_to_the_node_it_dialled(tmp_path: Path) -> None:
    async with world(tmp_path, 1) as w:
        node = w.nodes["node-1"]
        async with _credentials(w).channel(node.address, "node-7") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await _greet(channel)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_the_same_order_again_starts_nothing(tmp_path: Path) -> None:
    async with world(tmp_path, 1) as w:
        await w.ended(await w.deploy(service("web")))
        node = w.nodes["node-1"]
        (alloc,) = node.runtime.started
        assert node.server is not None
        await w.unlead()
        async with _credentials(w).channel(node.address, "node-1") as channel:
            call = _call(channel)
            await call.write(Hello(99, "node-1"))
            assert isinstance(await call.read(), Inventory)
            order = node.runtime.running[alloc]
            await call.write(order)
            await call.write(_order("next-000001", 99))
            await _started(node, "next-000001")
        assert node.runtime.started == [alloc, "next-000001"]


def test_the_newest_term_that_was_obeyed_outlives_the_agent_and_its_log(tmp_path: Path) -> None:
    Terms(tmp_path / "agent.term").keep(16)
    kept = Terms(tmp_path / "agent.term")
    assert kept.newest() == 16
    (tmp_path / "agent.term").write_text("garbage")
    assert kept.newest() == 0
    nowhere = Terms(tmp_path / "not-there" / "agent.term")
    nowhere.keep(17)  # a disk that takes nothing stops no agent
    assert nowhere.newest() == 0
