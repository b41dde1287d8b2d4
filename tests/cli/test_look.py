"""What a cluster is asked about, and what it is told: tables, JSON, exit codes."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import aclosing

import pytest

from reconciler.api.client import Client
from reconciler.api.services import LogLine
from reconciler.cli.logs import resumed
from tests.api.cluster import TOKENS, WAIT_S, Cluster, deployed
from tests.cli.conftest import Mill
from tests.cli.test_deploy import running


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"127.0.0.1:{taken.getsockname()[1]}"


async def test_tables_name_what_runs(mill: Mill, cluster: Cluster) -> None:
    deploy_id = await deployed(cluster)
    (alloc,) = cluster.nodes[0].state.allocations
    ps = await mill.beside("ps")
    assert ps.lines[0].split()[:4] == ["ALLOCATION", "SERVICE", "NODE", "STATUS"]
    assert ps.lines[1].split()[:4] == [alloc, "web", "node-1", "healthy"]
    assert (await mill.beside("services")).lines[1].split() == [
        "web", "registry.test/web:v1", "1", "1/1", "manual"]
    assert (await mill.beside("nodes")).lines[1].split()[:3] == ["node-1", "ready", "leader"]
    assert (await mill.beside("deploys")).lines[1].split()[:2] == [deploy_id, "deployed"]
    status = await mill.beside("status")
    assert status.lines[0].startswith("mill-test: 1 node, led by node-1, term 1")
    shown = await mill.beside("deploy-show", deploy_id)
    assert shown.lines[0] == f"{deploy_id}: deployed (0.0s)"
    assert shown.lines[-1] == "  web: create (none → 1)"


async def test_json_documents_are_the_answers_of_the_api(mill: Mill, cluster: Cluster) -> None:
    await deployed(cluster)
    api = cluster.client()
    for command, path in (("services", "services"), ("nodes", "nodes"), ("deploys", "deploys"),
                          ("status", "status")):
        assert json.loads((await mill.beside(command, "--json")).out) == \
            (await api.get(f"/v1/{path}")).json()
    (row,) = json.loads((await mill.beside("ps", "--json")).out)["allocations"]
    (known,) = (await api.get("/v1/services")).json()["services"]
    assert row == {"service": "web", **known["allocations"][0]}


async def test_quiet_lists_are_names_alone(mill: Mill, cluster: Cluster) -> None:
    await deployed(cluster, "service web\nservice api")
    assert (await mill.beside("services", "-q")).lines == ["api", "web"]


async def test_without_a_majority_what_one_node_knows_is_shown_with_a_warning(
    mill: Mill, cluster: Cluster
) -> None:
    await deployed(cluster)
    cluster.log.majority = False
    for command in ("status", "nodes", "ps"):
        result = await mill.beside(command)
        assert result.code == 0
        assert "node-1" in result.out
        assert result.err.startswith("warning: ")
        assert json.loads((await mill.beside(command, "--json")).out)["stale"] is True
    refused = await mill.beside("services")
    assert (refused.code, refused.out, refused.err[:7]) == (3, "", "error: ")


@pytest.mark.parametrize("command", ["status", "ps", "services", "deploys", "events"])
async def test_nobody_there_is_exit_code_3(offline: Mill, command: str) -> None:
    offline.address = closed_port()
    result = await offline.beside(command)
    assert (result.code, result.out) == (3, "")
    assert result.err.splitlines()[0].startswith("error: nothing answers at http://127.0.0.1:")
    assert result.err.splitlines()[1].startswith("hint: ")


async def test_token_is_told_apart_by_what_it_may(mill: Mill, cluster: Cluster) -> None:
    cluster.grant("read")
    assert (await mill.beside("--token", "wrong", "ps")).code == 4
    assert (await mill.beside("ps", "--token", TOKENS["read"])).code == 0
    refused = await mill.beside("secret", "set", "a", "b", "--token", TOKENS["read"])
    assert (refused.code, refused.out) == (4, "")


async def test_environment_names_the_cluster(
    mill: Mill, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MILL_ADDRESS", mill.address)
    monkeypatch.setenv("MILL_TOKEN", TOKENS["admin"])
    mill.address = ""
    assert (await mill.beside("nodes", "-q")).lines == ["node-1"]


async def test_events_are_told_in_order_and_followed(mill: Mill, cluster: Cluster) -> None:
    await deployed(cluster)
    lines = (await mill.beside("events")).lines
    assert [int(line.split()[0]) for line in lines] == sorted(int(li.split()[0]) for li in lines)
    assert any("scheduled service=web" in line for line in lines)
    async with asyncio.timeout(WAIT_S), running(mill, "events", "-f", "--json") as child:
        assert child.stdout is not None
        second = await deployed(cluster)
        while True:
            row = json.loads(await child.stdout.readline())
            if row["event"] == "done" and row["deploy"] == second:
                break


async def write_logs(cluster: Cluster, *services: str) -> list[str]:
    await deployed(cluster, "\n".join(f"service {name}" for name in services))
    logs, state = cluster.nodes[0].logs, cluster.nodes[0].state
    for number, name in enumerate(sorted(state.allocations)):
        logs.lines[name] = [LogLine(f"2026-01-01T00:00:0{line}.{number}Z", name, "stdout", text)
                            for line, text in enumerate(("one", "two\x1b[2J\u202e", "a\tb"))]
    return sorted(state.allocations)


async def test_logs_of_one_allocation_are_its_lines_without_control_characters(
    mill: Mill, cluster: Cluster
) -> None:
    (alloc,) = await write_logs(cluster, "web")
    for name in ("web", alloc):
        assert (await mill.beside("logs", name)).lines == ["one", "two\\x1b[2J\\u202e", "a       b"]
    assert (await mill.beside("logs", "web", "-n", "1")).lines == ["a       b"]
    rows = [json.loads(line) for line in (await mill.beside("logs", "web", "--json")).lines]
    assert rows[1] == {"ts": "2026-01-01T00:00:01.0Z", "alloc": alloc, "stream": "stdout",
                       "line": "two\x1b[2J\u202e"}
    missing = await mill.beside("logs", "nosuch")
    assert (missing.code, missing.out) == (5, "")


async def test_logs_of_an_allocation_that_cannot_be_read_are_a_warning(
    mill: Mill, cluster: Cluster
) -> None:
    (alloc,) = await write_logs(cluster, "web")
    cluster.nodes[0].logs.refuse.add(alloc)
    result = await mill.beside("logs", "web")
    assert f"warning: {alloc}: cannot be read from node-1" in result.err


async def test_followed_logs_come_as_they_are_written(mill: Mill, cluster: Cluster) -> None:
    (alloc,) = await write_logs(cluster, "web")
    async with asyncio.timeout(WAIT_S), running(mill, "logs", "web", "-f", "-n", "1") as child:
        assert child.stdout is not None
        assert (await child.stdout.readline()).decode() == "a       b\n"
        live = cluster.nodes[0].logs.live.setdefault(alloc, asyncio.Queue())
        live.put_nowait(LogLine("2026-01-01T00:00:09Z", alloc, "stdout", "later"))
        assert (await child.stdout.readline()).decode() == "later\n"


async def test_followed_logs_go_on_at_another_node_without_a_line_twice(pair: Cluster) -> None:
    (alloc,) = await write_logs(pair, "web")
    first, second = pair.nodes
    second.logs.lines[alloc] = [*first.logs.lines[alloc],
                                LogLine("2026-01-01T00:00:08Z", alloc, "stdout", "meanwhile")]
    seen = []
    async with asyncio.timeout(WAIT_S), \
            Client([first.url, second.url], TOKENS["admin"]) as client, \
            aclosing(resumed(client, "web", 100)) as rows:
        async for row in rows:
            seen.append(row.line)
            if len(seen) == 3:
                pair.log.leader = "node-2"
                await first.server.stop()
            if row.line == "meanwhile":
                break
    assert seen == ["one", "two\x1b[2J\u202e", "a\tb", "meanwhile"]


async def test_secret_comes_from_an_argument_or_from_standard_input_and_is_not_echoed(
    mill: Mill, cluster: Cluster
) -> None:
    values = {("plain",): b"", ("-",): b"from-input\n\n", (): b"no-newline"}
    for version, (arguments, stdin) in enumerate(values.items(), 1):
        result = await mill.beside("secret", "set", "db.url", *arguments, stdin=stdin)
        assert (result.out, result.err) == (f"  db.url: set (version {version})\n", "")
    assert (await mill.beside("secret", "get", "db.url")).out == "no-newline\n"
    await mill.beside("secret", "set", "db.url", "-", stdin=b"from-input\n\n")
    assert (await mill.beside("secret", "get", "db.url")).out == "from-input\n\n"
    assert (await mill.beside("secret", "list")).lines == ["db.url"]
    assert (await mill.beside("secret", "delete", "db.url")).lines == ["  db.url: deleted"]
    assert (await mill.beside("secret", "get", "db.url")).code == 5


async def test_secret_that_a_service_uses_cannot_be_deleted(mill: Mill, cluster: Cluster) -> None:
    await mill.beside("secret", "set", "db", "x")
    await deployed(cluster, "service web db")
    result = await mill.beside("secret", "delete", "db")
    assert (result.code, result.err[:7]) == (6, "error: ")


async def test_source_is_added_shown_synced_and_removed(mill: Mill, cluster: Cluster) -> None:
    added = await mill.beside("git", "add", "app", "https://git.test/app.git", "--branch", "prod",
                              "--path", "/deploy", "--poll", "30s", "--var", "tag=v2")
    assert added.lines == ["  app: follows prod of https://git.test/app.git; "
                           "look with: mill git show app"]
    source = cluster.nodes[0].state.sources["app"]
    assert (source.path, source.poll_ms, source.variables) == ("/deploy", 30_000, (("tag", "v2"),))
    shown = (await mill.beside("git", "show", "app")).lines
    assert shown[0].startswith("app: waiting")
    assert "  poll       every 30s" in shown
    assert [line.split()[0] for line in shown[1:]] == [
        "url", "branch", "path", "head", "applied", "poll", "next", "var"]
    assert (await mill.beside("git", "list", "-q")).lines == ["app"]
    await mill.beside("git", "sync", "app", "--retry", "--allow-empty")
    assert cluster.nodes[0].sources.synced == [("app", True, True)]
    assert (await mill.beside("git", "remove", "app", "--prune")).lines == ["  app: removed"]
    assert cluster.nodes[0].sources.removed == [("app", True)]
    assert (await mill.beside("git", "show", "app")).code == 5


async def test_folder_of_a_source_is_sent_by_its_full_path(mill: Mill, cluster: Cluster) -> None:
    await mill.beside("git", "add", "app", ".")
    assert cluster.nodes[0].state.sources["app"].url == str(mill.folder)
