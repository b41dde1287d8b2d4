"""Real replicas over loopback TLS: several in this process, or each in its own."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec

from reconciler.log.replica import Member, Replica, Settings
from tests.log.certificates import Authority

ROOT = Path(__file__).parents[2]
DEADLINE_S = 60.0  # generous: the machine may be busy with something else


class Ledger:
    """A machine that remembers every command; its result is how many there are."""

    def __init__(self) -> None:
        self.items: list[tuple[int, bytes]] = []

    @property
    def commands(self) -> list[bytes]:
        return [command for _, command in self.items]

    def apply(self, index: int, command: bytes) -> object:
        self.items.append((index, command))
        return len(self.items)

    def dump(self) -> bytes:
        return msgspec.msgpack.encode(self.items)

    def load(self, snapshot: bytes) -> None:
        self.items = msgspec.msgpack.decode(snapshot, type=list[tuple[int, bytes]])

    def reset(self) -> None:
        self.items = []


def free_members(count: int) -> tuple[Member, ...]:
    """Members on ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        members = []
        for number in range(1, count + 1):
            taken = stack.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            members.append(Member(f"node-{number}", "127.0.0.1", taken.getsockname()[1]))
        return tuple(members)


async def until(fact: Callable[[], object], what: str) -> None:
    """Wait for a fact of this process; fails the test after DEADLINE_S."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not fact():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never happened: {what}") from None


class Cluster:
    """Replicas in this process, their folders under `folder`."""

    def __init__(self, folder: Path, count: int, snapshot_bytes: int = 8 << 20) -> None:
        self.folder, self._snapshot_bytes = folder, snapshot_bytes
        self.authority = Authority(folder)
        self.members = free_members(count)
        self.founding: tuple[Member, ...] = ()  # all of them, where nothing else is said
        self.replicas: dict[str, Replica] = {}
        self.ledgers: dict[str, Ledger] = {}

    def settings(self, name: str) -> Settings:
        me = next(member for member in self.members if member.name == name)
        cert_file, key_file = self.authority.issue(name)
        founding = self.founding or self.members
        return Settings(
            self.folder / name, me, founding, self.authority.file, cert_file, key_file,
            snapshot_bytes=self._snapshot_bytes,
        )  # fmt: skip

    async def start(self, *names: str) -> None:
        for name in names or [member.name for member in self.members]:
            self.ledgers[name] = Ledger()
            self.replicas[name] = Replica(self.settings(name), self.ledgers[name])
            await self.replicas[name].start()

    async def stop(self, *names: str) -> None:
        for name in names or tuple(self.replicas):
            await self.replicas.pop(name).stop()

    async def leader(self) -> Replica:
        await until(self._leaders, "a leader")
        return self._leaders()[0]

    def _leaders(self) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.is_leader]

    def followers(self) -> list[Replica]:
        return [replica for replica in self.replicas.values() if not replica.is_leader]

    async def agree(self) -> list[bytes]:
        """Wait until every replica has applied the same; what that is."""
        await until(
            lambda: len({replica.applied_index for replica in self.replicas.values()}) == 1,
            "all replicas at one index",
        )
        commands = [self.ledgers[name].commands for name in self.replicas]
        assert all(each == commands[0] for each in commands)
        return commands[0]


@contextlib.asynccontextmanager
async def running(
    folder: Path, count: int, snapshot_bytes: int = 8 << 20
) -> AsyncIterator[Cluster]:
    """A cluster, started, and stopped whatever happens."""
    cluster = Cluster(folder, count, snapshot_bytes)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()


class Process:
    """One replica in a process of its own (`tests.log.member`), asked by lines of JSON."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.log.member", *self._arguments,
            cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            limit=64 << 20,
        )  # fmt: skip

    async def ask(self, **question: object) -> dict[str, object]:
        """One question, one answer; ConnectionError where the process is gone."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        async with self._lock, asyncio.timeout(DEADLINE_S):
            process.stdin.write(json.dumps(question).encode() + b"\n")
            await process.stdin.drain()
            line = await process.stdout.readline()
        if not line:
            raise ConnectionError("the process is gone")
        answer: dict[str, object] = json.loads(line)
        return answer

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def limit_files(self, size_bytes: int) -> None:
        """From now on no file of this process may grow beyond; a full disk in small."""
        assert self._process is not None
        limits = (size_bytes, resource.RLIM_INFINITY)
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, limits)

    async def end(self) -> None:
        """SIGKILL, if it still runs, and reap it."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            if process.stdin is not None:
                process.stdin.close()
                with contextlib.suppress(ConnectionError):
                    await process.stdin.wait_closed()


class ProcessCluster:
    """Real processes; the first `founding` of them found the log, or all."""

    def __init__(
        self, folder: Path, count: int = 3, snapshot_bytes: int = 8 << 20, founding: int = 0
    ) -> None:
        authority = Authority(folder)
        self.members = members = free_members(count)
        listed = ",".join(f"{each.name}={each.host}:{each.port}" for each in members)
        self.processes: dict[str, Process] = {}
        for member in members:
            authority.issue(member.name)
            arguments = [
                str(folder), member.name, listed, str(snapshot_bytes), str(founding or count)
            ]  # fmt: skip
            self.processes[member.name] = Process(arguments)

    async def __aenter__(self) -> ProcessCluster:
        await asyncio.gather(*(each.start() for each in self.processes.values()))
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(each.end() for each in self.processes.values()))

    async def leader(self) -> str:
        """The name of a node that leads, as it says itself."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for name, process in self.processes.items():
                    with contextlib.suppress(ConnectionError, AssertionError):
                        if (await process.ask(status=True))["leading"]:
                            return name
                await asyncio.sleep(0.02)

    async def write(self, command: bytes) -> bool:
        """Propose wherever a leader is; whether it was acknowledged."""
        leader = await self.leader()
        text = base64.b64encode(command).decode()
        answer = await self.processes[leader].ask(propose=text)
        return "index" in answer

    async def commands(
        self, name: str, at_least: int, holding: list[bytes] | None = None
    ) -> list[bytes]:
        """What a node's machine holds, once it holds so many, and all of `holding`: one whose
        outcome was open may be among them, so that their number alone does not tell."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                answer = await self.processes[name].ask(commands=True)
                commands = answer["commands"]
                assert isinstance(commands, list)
                found = [base64.b64decode(command) for command in commands]
                if len(found) >= at_least and set(holding or ()) <= set(found):
                    return found
                await asyncio.sleep(0.02)
