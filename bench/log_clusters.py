"""Three nodes of ours and three of etcd, each a process, in one shape: both are treated alike."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Self

from bench import log_loops as loops
from bench.etcd_generated import kv_pb2
from tests.log.certificates import Authority
from tests.log.cluster import ROOT, free_members

DEADLINE_S = 120.0
LOOK_S = 0.005  # between two looks at a node
NO_SNAPSHOT = 256 << 20  # bytes of journal that nobody here writes: a restart reads every entry
STREAMS = 64  # writes under way while etcd is filled


class Cluster(abc.ABC):
    """Nodes by name. `start` is the first start; `restart` any later one."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        self.folder = folder
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        taken = free_members(2 * count)
        self.inner = {each.name: each.port for each in taken[:count]}
        self.outer = {
            name: each.port for name, each in zip(self.inner, taken[count:], strict=True)
        }

    @property
    def names(self) -> list[str]:
        return list(self.inner)

    async def __aenter__(self) -> Self:
        try:
            await self.restart(*self.names)
            await self.founded(await self.leader())
        except BaseException:
            await self.kill(*self.names)
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.kill(*self.names)

    async def restart(self, *names: str) -> None:
        for name in names:
            self.processes[name] = await self.spawn(name)

    async def kill(self, *names: str) -> None:
        """SIGKILL to all before any is waited for."""
        gone = [self.processes.pop(name) for name in names if name in self.processes]
        for process in gone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for process in gone:
            await process.wait()

    def signal(self, name: str) -> None:
        """SIGKILL, and no waiting: the clock runs."""
        os.kill(self.processes[name].pid, signal.SIGKILL)

    async def leader(self) -> str:
        """The name of a node that says that it leads."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for name, process in list(self.processes.items()):
                    if process.returncode is not None:
                        raise RuntimeError(f"{name} ended by itself: {process.returncode}")
                    with contextlib.suppress(OSError, loops.Refused):
                        if (await self.status(name))[0]:
                            return name
                await asyncio.sleep(LOOK_S)

    async def reach(self, name: str, index: int) -> None:
        """Wait until a node has applied everything up to `index`."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with contextlib.suppress(OSError, loops.Refused):
                    if (await self.status(name))[1] >= index:
                        return
                await asyncio.sleep(LOOK_S)

    @abc.abstractmethod
    async def spawn(self, name: str) -> asyncio.subprocess.Process: ...

    @abc.abstractmethod
    async def founded(self, leader: str) -> None: ...

    @abc.abstractmethod
    async def status(self, name: str) -> tuple[bool, int]:
        """Whether it leads, and the index that it has applied; OSError where it is not there."""

    @abc.abstractmethod
    async def write(self, name: str) -> None:
        """One write over a connection of its own; raises where it is not acknowledged."""

    @abc.abstractmethod
    async def loop(self, leader: str, writers: int, seconds: float) -> loops.Figures:
        """Writers over the network, on kept connections."""

    @abc.abstractmethod
    async def nothing(self, leader: str, seconds: float) -> loops.Figures:
        """The same way there and back, without log and disk."""

    @abc.abstractmethod
    async def fill(self, leader: str, count: int) -> None:
        """So many entries more."""


class Mill(Cluster):
    """Our nodes: with `api` behind the HTTP API, else the log alone."""

    def __init__(
        self, folder: Path, count: int = 3, *, api: bool, snapshot_bytes: int = NO_SNAPSHOT
    ) -> None:
        super().__init__(folder, count)
        self._api, self._snapshot_bytes = api, snapshot_bytes
        authority = Authority(folder)
        for name in self.names:
            authority.issue(name)

    async def spawn(self, name: str) -> asyncio.subprocess.Process:
        listed = ",".join(f"{each}={port}" for each, port in self.inner.items())
        ports = [str(port) for port in self.outer.values()] if self._api else []
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.log_member", str(self.folder), name, listed,
            str(self._snapshot_bytes), *ports,
            cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            limit=64 << 20,
        )  # fmt: skip

    async def founded(self, leader: str) -> None:
        if self._api:
            await self.ask(leader, found=True)

    async def ask(self, name: str, **question: object) -> dict[str, float]:
        process = self.processes[name]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(question).encode() + b"\n")
        line = await process.stdout.readline()
        if not line:
            raise ConnectionError(f"{name} is gone")
        answer: dict[str, float] = json.loads(line)
        return answer

    async def inside(self, leader: str, kind: str, callers: int, seconds: float) -> loops.Figures:
        """A closed loop within the leader's own process."""
        found = await self.ask(leader, **{kind: callers, "seconds": seconds})
        return {
            "per_s": found["per_s"], "p50_ms": found["p50_ms"], "p99_ms": found["p99_ms"],
        }  # fmt: skip

    async def to_followers(self, leader: str) -> list[float]:
        """Milliseconds from the proposer's answer until each follower's loop was told, sorted."""
        followers = [name for name in self.names if name != leader]
        for name in followers:
            await self.ask(name, watch=True)
        known = await self.ask(leader, probe=True)
        for name in followers:
            await self.reach(name, max(int(index) for index in known))
        waits: list[float] = []
        for name in followers:
            applied = await self.ask(name, watched=True)
            waits += [1e3 * (applied[each] - at) for each, at in known.items() if each in applied]
        return sorted(waits)

    async def status(self, name: str) -> tuple[bool, int]:
        found = await self.ask(name, status=True)
        return bool(found["leading"]), int(found["applied"])

    async def write(self, name: str) -> None:
        connection = await loops.http(self.outer[name])
        try:
            await connection.call(loops.put_secret("w0"))
        finally:
            connection.close()

    async def loop(self, leader: str, writers: int, seconds: float) -> loops.Figures:
        requests = [loops.put_secret(f"w{number}") for number in range(writers)]
        return await self._requests(leader, requests, seconds)

    async def nothing(self, leader: str, seconds: float) -> loops.Figures:
        return await self._requests(leader, [loops.HEALTHZ], seconds)

    async def _requests(
        self, leader: str, requests: list[bytes], seconds: float
    ) -> loops.Figures:
        connections = [await loops.http(self.outer[leader]) for _ in requests]
        callers = [
            lambda each=each, request=request: each.call(request)
            for each, request in zip(connections, requests, strict=True)
        ]
        figures = await loops.closed_loop(callers, seconds)
        for each in connections:
            each.close()
        return figures

    async def fill(self, leader: str, count: int) -> None:
        await self.ask(leader, fill=count)


class Etcd(Cluster):
    """etcd as Debian brings it, with its defaults: heartbeat 100 ms, election 1000 ms, fsync."""

    async def spawn(self, name: str) -> asyncio.subprocess.Process:
        outer, inner = self._url(self.outer[name]), self._url(self.inner[name])
        peers = ",".join(f"{each}={self._url(port)}" for each, port in self.inner.items())
        options = {
            "name": name, "data-dir": str(self.folder / name),
            "listen-client-urls": outer, "advertise-client-urls": outer,
            "listen-peer-urls": inner, "initial-advertise-peer-urls": inner,
            "initial-cluster": peers, "logger": "zap", "log-level": "error",
        }  # fmt: skip
        return await asyncio.create_subprocess_exec(
            # It must not outlive a bench that is killed; our own nodes end with their stdin.
            "setpriv", "--pdeathsig", "KILL",
            "etcd", *(f"--{option}={value}" for option, value in options.items()),
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip

    @staticmethod
    def _url(port: int) -> str:
        return f"http://127.0.0.1:{port}"

    async def founded(self, leader: str) -> None:
        return None

    async def status(self, name: str) -> tuple[bool, int]:
        found = await self._status(name)
        leading = found.leader == found.header.member_id
        return leading, found.raftAppliedIndex

    async def version(self) -> str:
        return (await self._status(self.names[0])).version

    async def _status(self, name: str) -> kv_pb2.StatusResponse:
        connection = await loops.grpc(self.outer[name])
        try:
            async with asyncio.timeout(1.0):  # it may accept long before it answers
                return kv_pb2.StatusResponse.FromString(await connection.call(loops.STATUS, b""))
        finally:
            connection.close()

    async def write(self, name: str) -> None:
        connection = await loops.grpc(self.outer[name])
        try:
            await connection.call(loops.PUT, loops.put_key("w0"))
        finally:
            connection.close()

    async def loop(self, leader: str, writers: int, seconds: float) -> loops.Figures:
        connection = await loops.grpc(self.outer[leader])
        keys = [loops.put_key(f"w{number}") for number in range(writers)]
        callers = [lambda key=key: connection.call(loops.PUT, key) for key in keys]
        figures = await loops.closed_loop(callers, seconds)
        connection.close()
        return figures

    async def nothing(self, leader: str, seconds: float) -> loops.Figures:
        ask = kv_pb2.RangeRequest(key=b"none", serializable=True).SerializeToString()
        connection = await loops.grpc(self.outer[leader])
        figures = await loops.closed_loop([lambda: connection.call(loops.RANGE, ask)], seconds)
        connection.close()
        return figures

    async def fill(self, leader: str, count: int) -> None:
        connection = await loops.grpc(self.outer[leader])

        async def some(number: int) -> None:
            key = loops.put_key(f"w{number % 32}")
            for _ in range(number, count, STREAMS):
                await connection.call(loops.PUT, key)

        await asyncio.gather(*(some(number) for number in range(STREAMS)))
        connection.close()


async def until_written(cluster: Cluster, names: list[str], since: float, pause_s: float) -> float:
    """Seconds from `since` to the first acknowledged write at any of `names`.

    A try starts every `pause_s` at each, on a new connection, and none is waited for before the
    next: a write that went to a leader that is dead may never be answered.
    """
    acknowledged = asyncio.Event()
    tries: set[asyncio.Task[None]] = set()

    async def attempt(name: str) -> None:
        with contextlib.suppress(OSError, loops.Refused):
            await cluster.write(name)
            acknowledged.set()

    try:
        async with asyncio.timeout(DEADLINE_S):
            while not acknowledged.is_set():
                for name in names:
                    tries.add(task := asyncio.create_task(attempt(name)))
                    task.add_done_callback(tries.discard)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await acknowledged.wait()
        return time.monotonic() - since
    finally:
        for task in list(tries):
            task.cancel()
