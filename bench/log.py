"""How fast the log commits: three nodes in three processes, TLS and fsync, on this machine.

`python -m bench.log [--runs 5] [--seconds 3]`. The client sits inside the leader. Where an
`etcd` is on PATH (Debian: etcd-server), three of them do the same work in the same rounds,
through their HTTP gateway, which costs etcd a part of its speed. Figures of a shared machine
differ by 2x from run to run: compare within one run.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

from reconciler.log.replica import Replica
from tests.log.certificates import Authority
from tests.log.cluster import ROOT, Ledger, free_members
from tests.log.member import settings

VALUE_BYTES = 200
SNAPSHOT_BYTES = 64 << 20
PROBES = 200  # commits whose way to the followers is timed


class Counter(Ledger):
    """Keeps nothing, so that the log is what is measured."""

    def apply(self, index: int, command: bytes) -> object:
        return index

    def dump(self) -> bytes:
        return b""

    def load(self, snapshot: bytes) -> None:
        return None

    def reset(self) -> None:
        return None


async def closed_loop(
    clients: int, seconds: float, once: Callable[[], Awaitable[object]]
) -> dict[str, float]:
    """`clients` callers, each asking again as soon as it is answered."""
    took: list[float] = []
    began = time.perf_counter()

    async def client() -> None:
        while (start := time.perf_counter()) - began < seconds:
            await once()
            took.append(time.perf_counter() - start)

    await asyncio.gather(*(client() for _ in range(clients)))
    elapsed = time.perf_counter() - began
    took.sort()
    return {
        "per_s": len(took) / elapsed,
        "p50_ms": 1e3 * took[len(took) // 2],
        "p99_ms": 1e3 * took[int(len(took) * 0.99)],
    }


async def probe(replica: Replica) -> dict[int, float]:
    """When each of PROBES lone commits was known to its proposer, by index."""
    known = {}
    for _ in range(PROBES):
        index, _ = await replica.propose(bytes(VALUE_BYTES))
        known[index] = time.monotonic()
        await asyncio.sleep(0.003)  # so that each goes its way alone
    return known


async def member(folder: str, name: str, listed: str) -> None:
    """One node; answers the questions of the parent."""
    replica = Replica(settings(Path(folder), name, listed, SNAPSHOT_BYTES), Counter())
    applied: dict[int, float] = {}
    replica.on_applied(lambda index: applied.setdefault(index, time.monotonic()))
    await replica.start()
    reader = asyncio.StreamReader(limit=64 << 20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        applied.clear()
        reply: object
        match json.loads(line):
            case {"write": clients, "seconds": seconds}:
                reply = await closed_loop(
                    clients, seconds, lambda: replica.propose(bytes(VALUE_BYTES))
                )
            case {"read": clients, "seconds": seconds}:
                reply = await closed_loop(clients, seconds, replica.read_index)
            case {"probe": _}:
                reply = await probe(replica)
            case {"watch": _}:
                line = await reader.readline()  # the parent says when the probe is over
                reply = applied
            case _:
                reply = {"leading": replica.is_leader}
        print(json.dumps(reply), flush=True)
    await replica.stop()


class Node:
    """A member's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def tell(self, **question: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question).encode() + b"\n")
        await self.process.stdin.drain()

    async def hear(self) -> dict[str, float]:
        assert self.process.stdout is not None
        answer: dict[str, float] = json.loads(await self.process.stdout.readline())
        return answer

    async def ask(self, **question: object) -> dict[str, float]:
        await self.tell(**question)
        return await self.hear()


@contextlib.asynccontextmanager
async def our_nodes(folder: Path, count: int):  # type: ignore[no-untyped-def]  # a bench
    authority, members = Authority(folder), free_members(count)
    listed = ",".join(f"{each.name}={each.host}:{each.port}" for each in members)
    nodes = []
    try:
        for each in members:
            authority.issue(each.name)
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "bench.log", "--member", str(folder), each.name, listed,
                cwd=ROOT, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
                limit=64 << 20,
            )  # fmt: skip
            nodes.append(Node(process))
        leader = None
        while leader is None:
            for node in nodes:
                if (await node.ask(status=True))["leading"]:
                    leader = node
        yield leader, [node for node in nodes if node is not leader]
    finally:
        for node in nodes:
            node.process.kill()
            await node.process.wait()


async def to_followers(leader: Node, followers: list[Node]) -> dict[str, float]:
    """From the proposer's answer until each follower's loop was told."""
    for follower in followers:
        await follower.tell(watch=True)
    known = await leader.ask(probe=True)
    waits: list[float] = []
    for follower in followers:
        await follower.tell(over=True)
        applied = await follower.hear()
        waits += [1e3 * (applied[index] - at) for index, at in known.items() if index in applied]
    waits.sort()
    return {
        "p50_ms": waits[len(waits) // 2],
        "p99_ms": waits[int(len(waits) * 0.99)],
        "worst_ms": waits[-1],
        "seen": len(waits),
    }


@contextlib.asynccontextmanager
async def etcd_nodes(folder: Path, program: str):  # type: ignore[no-untyped-def]  # a bench
    members = free_members(6)
    peers = ",".join(f"e{n}=http://127.0.0.1:{members[n].port}" for n in range(3))
    processes = []
    try:
        for n in range(3):
            client = f"http://127.0.0.1:{members[3 + n].port}"
            peer = f"http://127.0.0.1:{members[n].port}"
            processes.append(
                await asyncio.create_subprocess_exec(
                    program,
                    "--name",
                    f"e{n}",
                    "--data-dir",
                    str(folder / f"e{n}"),
                    "--listen-client-urls",
                    client,
                    "--advertise-client-urls",
                    client,
                    "--listen-peer-urls",
                    peer,
                    "--initial-advertise-peer-urls",
                    peer,
                    "--initial-cluster",
                    peers,
                    "--log-level",
                    "error",
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                )
            )
        yield await etcd_leader([f"http://127.0.0.1:{members[3 + n].port}" for n in range(3)])
    finally:
        for process in processes:
            process.kill()
            await process.wait()


async def etcd_leader(urls: list[str]) -> str:
    """The client URL of the node that leads: ours is measured at its leader too."""
    deadline = time.monotonic() + 60
    async with httpx.AsyncClient() as client:
        while time.monotonic() < deadline:
            for url in urls:
                with contextlib.suppress(httpx.HTTPError, KeyError):
                    answer = (await client.post(f"{url}/v3/maintenance/status", json={})).json()
                    if answer["leader"] == answer["header"]["member_id"]:
                        return url
            await asyncio.sleep(0.1)
    raise TimeoutError("etcd elects no leader")


async def etcd_write(url: str, clients: int, seconds: float) -> dict[str, float]:
    """A closed loop of raw HTTP/1.1 over kept connections: no client library in the way."""
    host, _, port = url.removeprefix("http://").partition(":")
    value = base64.b64encode(bytes(VALUE_BYTES)).decode()
    body = json.dumps({"key": base64.b64encode(b"k").decode(), "value": value}).encode()
    request = (
        f"POST /v3/kv/put HTTP/1.1\r\nHost: e\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    idle = [await asyncio.open_connection(host, int(port)) for _ in range(clients)]

    async def put() -> None:
        reader, writer = connection = idle.pop()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        length = next(
            int(row.partition(b":")[2])
            for row in head.lower().split(b"\r\n")
            if row.startswith(b"content-length")
        )
        await reader.readexactly(length)
        idle.append(connection)

    figures = await closed_loop(clients, seconds, put)
    for _, writer in idle:
        writer.close()
    return figures


async def one_round(seconds: float, etcd: str | None) -> dict[str, dict[str, float]]:
    """Everything once, on fresh folders."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        async with our_nodes(Path(folder), 3) as (leader, followers):
            for clients in (1, 32):
                figures[f"write {clients:2}"] = await leader.ask(write=clients, seconds=seconds)
            for clients in (1, 32):
                figures[f"read  {clients:2}"] = await leader.ask(read=clients, seconds=seconds)
            figures["to followers"] = await to_followers(leader, followers)
    with tempfile.TemporaryDirectory() as folder:
        async with our_nodes(Path(folder), 1) as (leader, _):
            for clients in (1, 32):
                figures[f"alone {clients:2}"] = await leader.ask(write=clients, seconds=seconds)
    if etcd is not None:
        with tempfile.TemporaryDirectory() as folder:
            async with etcd_nodes(Path(folder), etcd) as url:
                for clients in (1, 32):
                    figures[f"etcd  {clients:2}"] = await etcd_write(url, clients, seconds)
    return figures


def report(rounds: list[dict[str, dict[str, float]]]) -> None:
    """Medians over the rounds, and the ratios of each round."""
    print(f"3 nodes, {VALUE_BYTES} bytes, TLS + fsync, client in the leader; {len(rounds)} rounds")
    for row in rounds[0]:
        cells = [
            f"{name} {statistics.median(each[row][name] for each in rounds):,.2f}"
            for name in rounds[0][row]
        ]
        print(f"  {row:13} {'  '.join(cells)}")
    for clients in (1, 32):
        if f"etcd  {clients:2}" not in rounds[0]:
            print("  etcd is not installed: no ratio (Debian: apt install etcd-server)")
            return
        ratios = [
            each[f"write {clients:2}"]["per_s"] / each[f"etcd  {clients:2}"]["per_s"]
            for each in rounds
        ]
        print(
            f"  ours / etcd (HTTP gateway), {clients} in flight: "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--member"]:
        asyncio.run(member(*arguments[1:]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args(arguments)
    etcd = shutil.which("etcd")
    rounds = [asyncio.run(one_round(options.seconds, etcd)) for _ in range(options.runs)]
    report(rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
