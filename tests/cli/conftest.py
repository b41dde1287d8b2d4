"""Commands run as the program runs them, against a real API in this process."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import structlog

from reconciler.cli.main import run
from tests.api.cluster import TOKENS, Cluster


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


@dataclass
class Mill:
    """The command line in a folder and a home of its own; `address` is where it asks."""

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    folder: Path
    address: str = ""

    def __call__(self, *arguments: str, stdin: bytes = b"") -> Result:
        self.capsys.readouterr()
        self.monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        reach = ("--address", self.address, "--token", TOKENS["admin"]) if self.address else ()
        code = run([*reach, *arguments])
        out, err = self.capsys.readouterr()
        return Result(code, out, err)

    async def beside(self, *arguments: str, stdin: bytes = b"") -> Result:
        """The same, while this test's own loop goes on (the API is served by it)."""
        return await asyncio.to_thread(self, *arguments, stdin=stdin)

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path


@pytest.fixture
def offline(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Mill]:
    """No cluster."""
    logging = structlog.get_config()
    home, folder = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    folder.mkdir()
    for name in ("MILL_ADDRESS", "MILL_TOKEN", "MILL_CA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(folder)
    yield Mill(capsys, monkeypatch, folder)
    structlog.configure(**logging)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    try:
        await made.start(1)
        yield made
    finally:
        await made.stop()


@pytest.fixture
async def pair() -> AsyncIterator[Cluster]:
    """node-1 leads, node-2 follows."""
    made = Cluster()
    try:
        await made.start(2)
        yield made
    finally:
        await made.stop()


@pytest.fixture
def mill(offline: Mill, cluster: Cluster) -> Mill:
    """With a cluster of one node."""
    offline.address = cluster.nodes[0].url
    return offline
