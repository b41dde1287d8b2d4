"""`mill dev` as a person runs it: a process, its words, its cluster, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from reconciler.dev import tag_of
from tests.cli.conftest import Mill
from tests.end_to_end.conftest import eventually, free_base, needs_containers, registry

__all__ = ["registry"]

PROGRAM = (sys.executable, "-m", "reconciler.cli.main")
START_S = 90.0
SERVICE = """service "{name}" {{
  image  = "{registry}/web:{tag}"
  port   = 3000
  cpu    = 0.1
  memory = "64M"
  env {{ TOLD = "${{secret(word)}}" }}
  health {{ path = "/health"; interval = "1s"; deadline = "{deadline}" }}
}}
"""


@dataclass
class Running:
    """A `mill dev`, and what it has said."""

    process: asyncio.subprocess.Process
    said: list[str] = field(default_factory=list)

    async def listen(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.said.append(line.decode().rstrip("\n"))

    def has(self, start: str) -> bool:
        return any(line.startswith(start) for line in self.said)


@contextlib.asynccontextmanager
async def running_dev(mill: Mill, *arguments: str) -> AsyncIterator[Running]:
    process = await asyncio.create_subprocess_exec(
        *PROGRAM, "dev", *arguments, cwd=mill.folder, stdout=PIPE, stderr=STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    running = Running(process)
    listener = asyncio.create_task(running.listen())
    try:
        yield running
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()
        await listener
        await mill.beside("dev", "--reset", "--data", "data")


def left_of(data: Path) -> list[str]:
    """What of a data folder's cluster is on this machine: processes, namespaces, links, files."""
    tag, found = tag_of(data), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
                if f"{data}/" in words or f"mill-{tag}" in words:
                    found.append(words.replace("\0", " "))
    found += [line for words in (("netns",), ("-o", "link"))
              for line in subprocess.run(("ip", *words), check=True, capture_output=True,
                                         text=True).stdout.splitlines() if tag in line]
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    found += [line for line in mounts if f"{data}/" in line or tag in line]
    return found + [str(path) for path in Path("/run").glob(f"mill-{tag}*")]


def commit(repo: Path, text: str, message: str) -> str:
    git = ("git", "-C", str(repo), "-c", "user.name=Ada", "-c", "user.email=ada@example.com")
    (repo / "app.mill").write_text(text)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", message], check=True)
    found = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    return found.stdout[:7]


@pytest.fixture
def short(offline: Mill) -> Iterator[Mill]:
    """In a folder with a short name, as people have them: sockets lie below it."""
    with tempfile.TemporaryDirectory(prefix="mill-cli-") as folder:
        offline.folder = Path(folder)
        offline.monkeypatch.chdir(folder)
        yield offline
        offline.monkeypatch.undo()


@pytest.mark.containers
async def test_cluster_of_one_node_from_ready_to_nothing_left(short: Mill, registry: str) -> None:
    offline = short
    if shutil.which("git") is None:
        pytest.skip("needs git")
    repo, base = offline.folder / "repo", free_base()
    subprocess.run(["git", "init", "-q", "-b", "trunk", str(repo)], check=True)
    good = SERVICE.format(name="followed", registry=registry, tag="v1", deadline="30s")
    first = commit(repo, good.replace("secret(word)", "service.followed.address"), "one")
    data = offline.folder / "data"
    arguments = ("--nodes", "1", "--data", "data", "--base-port", str(base), "--cpu", "2",
                 "--memory", "1G", "--repo", "repo")
    async with running_dev(offline, *arguments) as dev:
        await eventually(lambda: dev.has("ready") or dev.process.returncode is not None, START_S)
        assert dev.has("ready "), dev.said
        assert dev.has(f"  node-1  api http://127.0.0.1:{base}  "
                       f"ingress http://127.0.0.1:{base + 4} https://127.0.0.1:{base + 5}  dns ")
        await eventually(lambda: dev.has(f"{first} deployed"))
        await _commands(offline, registry)
        bad = commit(repo, 'service "followed" {}\n', "two")
        await eventually(lambda: dev.has(f"{bad} failing: app.mill:1:1: "))
        broken = commit(repo, good.replace("secret(word)", "service.followed.address")
                        .replace("v1", "vbad").replace("30s", "2s"), "three")
        await eventually(lambda: dev.has(f"{broken} rolled back: followed-"))
        dev.process.send_signal(signal.SIGINT)
        assert await dev.process.wait() == 0
        assert dev.said[-2] == "stopping the nodes and their containers..."
        assert dev.said[-1].startswith("stopped; ")
        assert left_of(data) == []
    assert not data.exists()
    assert (await offline.beside("ps")).code == 3, "its context is forgotten with it"


async def _commands(mill: Mill, registry: str) -> None:
    """What a person does next, through the context that `mill dev` has written."""
    text = SERVICE.format(name="web", registry=registry, tag="v1", deadline="30s")
    mill.write("web.mill", text)
    refused = await mill.beside("deploy", "-f", "web.mill")
    assert (refused.code, "word" in refused.err) == (2, True)
    assert (await mill.beside("secret", "set", "word", "-", stdin=b"hush\n")).code == 0
    deployed = await mill.beside("deploy", "-f", "web.mill")
    assert (deployed.code, deployed.err) == (0, "")
    assert deployed.lines[:2] == ["  pulling images...", "  web: scheduled on node-1"]
    assert deployed.lines[2].startswith("  web: healthy (")
    assert deployed.lines[3].startswith("  deployed (")
    assert (await mill.beside("deploy", "-f", "web.mill")).lines == ["  no changes"]
    rows = json.loads((await mill.beside("ps", "--json")).out)["allocations"]
    assert {(row["service"], row["status"]) for row in rows} == {
        ("web", "healthy"), ("followed", "healthy")}
    assert "web v1: serving on port 3000" in (await mill.beside("logs", "web")).lines
    assert (await mill.beside("secret", "get", "word")).out == "hush\n"
    status = await mill.beside("status")
    assert (status.code, "led by node-1" in status.lines[0]) == (0, True)
    mill.write("broken.mill", text.replace(":v1", ":vbad").replace("30s", "2s"))
    broken = await mill.beside("deploy", "-f", "broken.mill")
    assert broken.code == 1
    assert broken.lines[2].startswith("  web: failed: web-")
    assert "    web vbad: serving on port 3000" in broken.err.splitlines()
    assert broken.lines[-2] == "  rolling back..."
    assert broken.lines[-1].endswith("nothing changed")


@pytest.mark.containers
def test_what_cannot_start_says_why_in_one_line(offline: Mill) -> None:
    if needs_containers():
        pytest.skip(needs_containers())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = offline("dev", "--base-port", str(port))
        assert (result.code, result.err.splitlines()) == (6, [
            f"error: port {port} is in use: node-1 needs it for its API",
            "hint: choose others with --base-port"])
    assert offline("dev", "--repo", ".").err.splitlines() == [
        "error: . is no git repository", "hint: make it one with: git init"]
    assert offline("dev", "--memory", "lots").code == 2
    offline.write("mine.txt", "precious")
    foreign = offline("dev", "--reset", "--data", ".")
    assert (foreign.code, foreign.err[:7]) == (1, "error: ")
    assert [path.name for path in Path().iterdir()] == ["mine.txt"]


def test_failures_are_tried_on_a_cluster_that_runs(offline: Mill) -> None:
    for words in (("dev", "kill", "node-1", "--data", "none"), ("dev", "start", "node-1")):
        result = offline(*words)
        assert (result.code, result.err.splitlines()[1]) == (3, "hint: start one with: mill dev")
