"""The client: typed answers, errors with their exit codes, streams that survive a failover."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import pytest

from reconciler.api import types as t
from reconciler.api.client import (
    Client,
    DeployEvent,
    DeployOptions,
    NoAnswer,
    Refused,
    Unreachable,
    exit_code,
)
from reconciler.api.services import LogLine
from reconciler.fsm import commands as c
from tests.api.cluster import TOKENS, WAIT_S, Cluster, deployed

FILES = {"web.mill": "service web"}


def client_of(cluster: Cluster, *nodes: int, token: str = "admin") -> Client:
    addresses = [f"127.0.0.1:{cluster.nodes[node].port}" for node in nodes or (0,)]
    return Client(addresses, TOKENS.get(token, token))


@contextlib.asynccontextmanager
async def swallowing() -> AsyncIterator[str]:
    """A server that reads a request and closes without a word: the answer was lost."""
    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(swallow, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}"


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


async def test_deploy_is_told_once_and_whole_over_the_death_of_the_leader(pair: Cluster) -> None:
    first, second = pair.nodes
    events: list[DeployEvent] = []
    async with asyncio.timeout(WAIT_S), client_of(pair, 0, 1) as client:
        async for event in client.deploy(FILES, DeployOptions(prune=True)):
            events.append(event)
            if event.step.phase == "started":
                await first.deploys.schedule(event.step.deploy)
            elif event.step.phase == "scheduled":
                pair.log.leader = "node-2"
                await first.server.stop()
                await second.deploys.finish(events[0].step.deploy)
    ids = [event.id for event in events]
    assert ids == [e.index for e in second.state.deploy_events[events[0].step.deploy]]
    assert events[-1].terminal
    assert (events[-1].event, events[-1].step.success) == ("done", True)
    assert first.deploys.requests[0].prune


async def test_deploy_whose_answer_is_lost_is_offered_again_with_the_same_key(
    cluster: Cluster,
) -> None:
    async with swallowing() as broken, asyncio.timeout(WAIT_S):
        good = f"127.0.0.1:{cluster.nodes[0].port}"
        async with Client([broken, good], TOKENS["admin"]) as client:
            told = await client.deploy_detached(FILES, key="k-1")
            again = await client.deploy_detached(FILES, key="k-1")
    assert told.id == again.id
    assert {request.key for request in cluster.nodes[0].deploys.requests} == {"k-1"}


async def test_deploy_waits_for_an_election(pair: Cluster) -> None:
    pair.log.leader = None

    async def elect() -> None:
        async with client_of(pair, token="wrong") as probe:
            with contextlib.suppress(Refused):
                await probe.status()  # the cluster has answered at least once without a leader
        pair.log.leader = "node-1"

    async with asyncio.timeout(WAIT_S), client_of(pair, 1) as client:
        elected = asyncio.create_task(elect())
        assert (await client.deploy_detached(FILES)).id in pair.nodes[0].state.deploys
        await elected


async def test_write_without_a_key_whose_answer_is_lost_is_not_repeated(cluster: Cluster) -> None:
    async with swallowing() as broken:
        good = f"127.0.0.1:{cluster.nodes[0].port}"
        async with Client([broken, good], TOKENS["admin"]) as client:
            with pytest.raises(NoAnswer) as caught:
                await client.create_token(t.TokenBody(role="read"))
    assert exit_code(caught.value) == 3


async def test_secret_whose_answer_is_lost_is_written_again_and_once(cluster: Cluster) -> None:
    async with swallowing() as broken:
        good = f"127.0.0.1:{cluster.nodes[0].port}"
        async with Client([broken, good], TOKENS["admin"]) as client:
            assert (await client.set_secret("a", "x")).version == 1
    assert len(cluster.nodes[0].state.secrets["a"].versions) == 1


async def test_next_address_is_asked_where_none_answers(cluster: Cluster) -> None:
    async with Client([closed_port(), f"127.0.0.1:{cluster.nodes[0].port}"],
                      TOKENS["admin"]) as client:
        assert (await client.set_secret("a", "x")).version == 1
        assert (await client.secret("a")).value == "x"


async def test_nobody_there_is_unreachable(cluster: Cluster) -> None:
    async with Client([closed_port()], "x") as client:
        with pytest.raises(Unreachable) as caught:
            await client.status()
    assert exit_code(caught.value) == 3


async def test_refusals_carry_the_problem_and_its_exit_code(cluster: Cluster) -> None:
    await deployed(cluster)
    async with client_of(cluster) as client, client_of(cluster, token="wrong") as stranger:
        for call, code in (
            (client.service("nope"), 5), (client.plan({"a": "wrong"}), 2),
            (client.deploy_detached({"a": "huge"}), 6), (stranger.status(), 4),
            (client.add_source(t.SourceBody(name="a", url="ssh://x/y")), 2),
        ):
            with pytest.raises(Refused) as caught:
                await call
            assert exit_code(caught.value) == code
        with pytest.raises(Refused) as invalid:
            await anext(client.deploy({"web.mill": "wrong"}))
    errors = invalid.value.problem.errors
    assert isinstance(errors, tuple)
    assert [(e.line, e.column) for e in errors] == [(3, 7), (9, 1)]


async def test_no_majority_is_exit_code_three_and_stale_answers(cluster: Cluster) -> None:
    cluster.log.majority = False
    async with client_of(cluster) as client:
        with pytest.raises(Refused) as caught:
            await client.nodes()
        assert exit_code(caught.value) == 3
        assert (await client.nodes(stale=True)).stale is True


async def test_every_call_has_a_typed_answer(cluster: Cluster) -> None:
    deploy_id = await deployed(cluster)
    alloc = next(cluster.nodes[0].state.of_service("web")).id
    cluster.nodes[0].logs.lines[alloc] = [LogLine("2026-01-01T00:00:00Z", alloc, "stderr", "x")]
    async with client_of(cluster) as client:
        assert (await client.status()).leader == "node-1"
        assert (await client.services()).services[0].replicas == t.Replicas(1, 1)
        assert (await client.service("web")).revisions[0].number == 1
        assert (await client.nodes()).nodes[0].cpu.total == 4.0
        assert (await client.deploys()).deploys[0].id == deploy_id
        assert (await client.deploy_record(deploy_id)).services[0].to == 1
        assert (await client.plan(FILES)).services[0].action == "update"
        assert [e.event async for e in client.follow_deploy(deploy_id)][-1] == "done"
        assert (await client.events(after=0)).events[0].index == 2
        assert [row.line async for row in client.logs("web", tail=5)] == ["x"]
        for stream in (client.restart("web"), client.scale("web", 2), client.rollback("web", 1)):
            assert [e async for e in stream][-1].step.changed == 0
        source = await client.add_source(t.SourceBody(name="shop", url="/srv/repo"))
        assert source.status == "waiting"
        assert (await client.source("shop")).name == "shop"
        assert (await client.sources()).sources[0].url == "/srv/repo"
        assert (await client.sync_source("shop", allow_empty=True)).name == "shop"
        assert (await client.remove_source("shop", prune=True)).name == "shop"
        await client.set_secret("a", "x")
        assert [row.name for row in (await client.secrets()).secrets] == ["a"]
        assert (await client.delete_secret("a")).name == "a"
        running = (await client.deploy_detached(FILES)).id
        assert (await client.cancel(running)).outcome == "rolling_back"


async def test_followed_events_go_on_over_the_death_of_a_node(pair: Cluster) -> None:
    rows: list[t.EventRow] = []
    async with (
        asyncio.timeout(WAIT_S), client_of(pair, 0, 1) as client,
        contextlib.aclosing(client.follow_events(after=0)) as events,
    ):
        rows += [await anext(events), await anext(events)]
        pair.log.leader = "node-2"
        await pair.nodes[0].server.stop()
        await pair.nodes[1].ledger.propose(c.SetSecret("a", b"n" * 12, b"x"))
        rows.append(await anext(events))
    assert [row.data["kind"] for row in rows] == ["node_joined", "node_joined", "secret_set"]
    assert [row.index for row in rows] == sorted({row.index for row in rows})


async def test_names_are_quoted_into_paths(cluster: Cluster) -> None:
    async with client_of(cluster) as client:
        for name in ("a/b", "..", "a?x=1", "a#b"):
            with pytest.raises(Refused) as caught:
                await client.secret(name)
            assert caught.value.status == 404
