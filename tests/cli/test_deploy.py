"""`deploy` and its like from the call to the last line, against the real API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator

import pytest

from reconciler.fsm.records import Change, Failure, Origin
from tests.api.cluster import TOKENS, WAIT_S, Cluster, deployed
from tests.cli.conftest import Mill
from tests.cli.driven import begun, stopped, to_a_failure, to_the_end

PROGRAM = (sys.executable, "-m", "reconciler.cli.main")
FAILURE = Failure(reason="web-x exited with code 3", service="web", alloc="web-x", node="node-1",
                  logs=("\x1b[31mred\x1b[0m", "\tindented"))


@contextlib.asynccontextmanager
async def running(
    mill: Mill, *arguments: str, **streams: int
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The program in a process of its own, gone at the end."""
    child = await asyncio.create_subprocess_exec(
        *PROGRAM, "--address", mill.address, "--token", TOKENS["admin"], *arguments,
        cwd=mill.folder, **{"stdout": PIPE, "stderr": PIPE, **streams},  # type: ignore[arg-type]  # file descriptors
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"})
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def test_first_deploy_and_update_and_nothing_to_do(mill: Mill, cluster: Cluster) -> None:
    node = cluster.nodes[0]
    mill.write("mill.mill", "service web\nservice api\n")
    first = asyncio.create_task(mill.beside("deploy"))
    await to_the_end(node, await begun(cluster))
    assert (await first).lines == [
        "  pulling images...",
        "  web: scheduled on node-1",
        "  api: scheduled on node-1",
        "  api: healthy (1.2s)",
        "  web: healthy (1.2s)",
        "  deployed (0.0s)",
    ]
    second = asyncio.create_task(mill.beside("deploy"))
    await to_the_end(node, await begun(cluster, 1))
    result = await second
    assert (result.code, result.err) == (0, "")
    assert result.lines[-3:] == ["  web: old instance stopped", "  api: old instance stopped",
                                 "  deployed (0.0s)"]
    restarted = await mill.beside("restart", "web")
    assert (restarted.code, restarted.out) == (0, "  no changes\n")


async def test_removed_service_is_told_from_the_record(mill: Mill, cluster: Cluster) -> None:
    node = cluster.nodes[0]
    await deployed(cluster, "service web")
    removal = Change(service="web", action="remove", from_revision=1)
    deploy_id = await node.deploys.begin((removal,), Origin())
    following = asyncio.create_task(mill.beside("deploy-show", deploy_id, "-f"))
    await to_the_end(node, deploy_id)
    result = await following
    assert (result.code, result.lines) == (
        0, ["  pulling images...", "  web: removed", "  deployed (0.0s)"])


async def test_failed_deploy_is_exit_code_1_and_prints_no_control_characters(
    mill: Mill, cluster: Cluster
) -> None:
    mill.write("mill.mill", "service web\n")
    told = asyncio.create_task(mill.beside("deploy"))
    await to_a_failure(cluster.nodes[0], await begun(cluster), FAILURE)
    result = await told
    assert result.code == 1
    assert result.lines[2:] == [
        "  web: failed: web-x exited with code 3",
        "  rolling back...",
        "  rolled back (0.0s): nothing changed",
    ]
    assert result.err.splitlines() == ["    \\x1b[31mred\\x1b[0m", "            indented"]


async def test_quiet_prints_what_failed_alone(mill: Mill, cluster: Cluster) -> None:
    mill.write("mill.mill", "service web\n")
    good = asyncio.create_task(mill.beside("deploy", "-q"))
    await to_the_end(cluster.nodes[0], await begun(cluster))
    assert (await good).out == ""
    bad = asyncio.create_task(mill.beside("deploy", "--quiet"))
    await to_a_failure(cluster.nodes[0], await begun(cluster, 1), FAILURE)
    assert (await bad).lines[0] == "  web: failed: web-x exited with code 3"


async def test_json_is_one_object_a_line_with_every_event(mill: Mill, cluster: Cluster) -> None:
    mill.write("mill.mill", "service web\n")
    told = asyncio.create_task(mill.beside("deploy", "--json"))
    deploy_id = await begun(cluster)
    await to_the_end(cluster.nodes[0], deploy_id)
    rows = [json.loads(line) for line in (await told).lines]
    facts = cluster.nodes[0].state.deploy_events[deploy_id]
    assert [row["id"] for row in rows if row["id"] is not None] == [fact.index for fact in facts]
    assert (rows[0]["event"], rows[0]["phase"]) == ("progress", "started")
    assert (rows[-1]["event"], rows[-1]["success"]) == ("done", True)


async def test_options_reach_the_api(mill: Mill, cluster: Cluster) -> None:
    mill.write("a.mill", "service web\n")
    result = await mill.beside("deploy", "-f", "a.mill", "--prune", "--strategy", "surge",
                               "--timeout", "90s", "--var", "tag=v2", "--detach")
    request = cluster.nodes[0].deploys.requests[0]
    assert (request.prune, request.strategy, request.pull_budget_ms) == (True, "surge", 90_000)
    assert (dict(request.variables), list(request.files)) == ({"tag": "v2"}, ["a.mill"])
    assert request.key
    deploy_id = await begun(cluster)
    assert result.lines == [
        f"  {deploy_id} has begun; follow it with: mill deploy-show {deploy_id} -f"]


async def test_invalid_manifest_shows_the_lines_of_the_file(mill: Mill, cluster: Cluster) -> None:
    mill.write("web.mill", "wrong\n\nservice web\n")
    for command in ("deploy", "plan"):
        result = await mill.beside(command, "-f", "web.mill")
        assert (result.code, result.out) == (2, "")
        assert result.err.splitlines() == [
            "error: unknown attribute", "  at web.mill:3:7", "  3 | service web",
            "    |       ^", "hint: remove it", "", "error: no image", "  at web.mill:9:1"]
    assert not cluster.nodes[0].state.deploys


async def test_what_does_not_fit_is_exit_code_6(mill: Mill, cluster: Cluster) -> None:
    mill.write("mill.mill", "huge\n")
    result = await mill.beside("deploy")
    assert (result.code, result.err.splitlines()) == (
        6, ["error: web does not fit: 4 cores short", "hint: nearest: node-1"])


async def test_manifest_that_is_no_text_is_refused_before_it_is_sent(
    mill: Mill, cluster: Cluster
) -> None:
    (mill.folder / "mill.mill").write_bytes(b"service web\n\xff")
    result = await mill.beside("deploy")
    assert result.code == 2
    assert "  at mill.mill:2:1" in result.err
    assert not cluster.nodes[0].deploys.requests


async def test_interrupted_deploy_goes_on_and_says_how_to_follow_it(
    mill: Mill, cluster: Cluster
) -> None:
    mill.write("mill.mill", "service web\n")
    async with asyncio.timeout(WAIT_S), running(mill, "deploy") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        deploy_id = await begun(cluster)
        await cluster.nodes[0].deploys.schedule(deploy_id)
        while b"scheduled" not in await child.stdout.readline():
            pass
        child.send_signal(signal.SIGINT)
        told = (await child.stderr.read()).decode()
        assert await child.wait() == 130
    assert told == (f"warning: the deploy {deploy_id} goes on; follow it with: mill deploy-show "
                    f"{deploy_id} -f, or end it with: mill cancel {deploy_id}\n")
    assert cluster.nodes[0].state.deploys[deploy_id].outcome == "running"


async def test_live_view_ends_in_the_lines_of_the_transcript(mill: Mill, cluster: Cluster) -> None:
    mill.write("mill.mill", "service web\n")
    ours, theirs = pty.openpty()
    read = bytearray()

    def take() -> None:
        with contextlib.suppress(OSError):
            read.extend(os.read(ours, 65536))

    loop = asyncio.get_running_loop()
    loop.add_reader(ours, take)
    try:
        async with asyncio.timeout(WAIT_S), running(mill, "deploy", stdout=theirs) as child:
            await to_the_end(cluster.nodes[0], await begun(cluster))
            assert await child.wait() == 0
            while b"deployed" not in read:
                await asyncio.sleep(0.01)
    finally:
        loop.remove_reader(ours)
        os.close(ours)
        os.close(theirs)
    plain = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", bytes(read)).decode()
    said = [line.rstrip() for line in re.split(r"[\r\n]+", plain)]
    kept = [line for line in said if line.startswith("  ") and "\u2501" not in line]
    assert kept == ["  pulling images...", "  web: scheduled on node-1", "  web: healthy (1.2s)",
                    "  deployed (0.0s)"]


async def test_cancelled_deploy(mill: Mill, cluster: Cluster) -> None:
    mill.write("mill.mill", "service web\n")
    async with asyncio.timeout(WAIT_S), running(mill, "deploy") as child:
        deploy_id = await begun(cluster)
        await cluster.nodes[0].deploys.schedule(deploy_id)
        cancelled = await mill.beside("cancel", deploy_id)
        assert (cancelled.code, cancelled.lines) == (
            0, [f"  {deploy_id}: rolling back; follow it with: mill deploy-show {deploy_id} -f"])
        await stopped(cluster.nodes[0], deploy_id, "cancelled")
        told = (await child.communicate())[0].decode().splitlines()
        assert (child.returncode, told[2:]) == (
            1, ["  rolling back...", "  cancelled (0.0s): nothing changed"])
    again = await mill.beside("cancel", deploy_id)
    assert (again.code, again.err.splitlines()[0]) == (
        6, f"error: {deploy_id} has ended: cancelled")


async def test_plan_is_readable_and_as_json_the_document(mill: Mill, cluster: Cluster) -> None:
    mill.write("mill.mill", "service web\n")
    assert (await mill.beside("plan")).lines == [
        "  web: create (surge: it fits)",
        "    image: registry.test/web:v1@sha256:aaaaaaaaaaaa…",
        "    on node-1",
        "  plan: 1 to create",
    ]
    document = json.loads((await mill.beside("--json", "plan")).out)
    assert document["services"][0]["placements"] == [{"node": "node-1", "kept": False}]
    assert not cluster.nodes[0].state.deploys


async def test_scale_and_rollback_carry_what_was_asked(mill: Mill, cluster: Cluster) -> None:
    await deployed(cluster)
    for arguments in (("scale", "web=3"), ("rollback", "web"), ("rollback", "web", "--to", "1")):
        assert (await mill.beside(*arguments)).lines == ["  no changes"]
    assert [ask[:3] for ask in cluster.nodes[0].deploys.asks] == [
        ("scale", "web", 3), ("rollback", "web", None), ("rollback", "web", 1)]


@pytest.mark.parametrize("command", ["restart", "rollback"])
async def test_service_that_is_not_there_is_exit_code_5(mill: Mill, command: str) -> None:
    result = await mill.beside(command, "nosuch")
    assert (result.code, result.err.splitlines()) == (
        5, ["error: no service nosuch", "hint: list them with: mill services"])
