"""One node of ours as a process of its own, asked by lines of JSON: `bench.log` starts three.

`python -m bench.log_member FOLDER NAME LISTED SNAPSHOT_BYTES [API_PORT…]`, LISTED as NAME=PORT,….
Without API ports it is the log alone under a machine that keeps nothing; with them (one a node, in
the order of LISTED) it is the real state machine, ledger and API server over that log.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import sys
import time
from pathlib import Path

from bench.log_loops import TOKEN, VALUE_BYTES, closed_loop
from reconciler.api.server import Server
from reconciler.api.services import Backend
from reconciler.clock import RealClock
from reconciler.executor.history import History
from reconciler.executor.ledger import Ledger, StateMachine
from reconciler.fsm import commands as c
from reconciler.fsm.seal import NONCE_BYTES, seal
from reconciler.log.replica import Replica
from reconciler.log.settings import Member as LogMember
from reconciler.log.settings import Settings
from tests.api.cluster import Seen, WrittenDeploys, WrittenLogs, WrittenSources

KEY = bytes(32)
PROBES = 200  # commits whose way to the followers is timed
FILLERS = 256  # proposals under way while entries are made


class Nothing:
    """A machine that keeps nothing, so that the log is what is measured."""

    def apply(self, index: int, command: bytes) -> object:
        return index

    def dump(self) -> bytes:
        return b""

    def load(self, snapshot: bytes) -> None:
        return None

    def reset(self) -> None:
        return None


class Member:
    """A replica, and with `ports` all that stands before it."""

    def __init__(
        self, folder: Path, name: str, listed: str, snapshot_bytes: int, ports: list[int]
    ) -> None:
        self.ports, self.names = ports, [each.partition("=")[0] for each in listed.split(",")]
        self.name, self.machine = name, StateMachine()
        self.replica = Replica(
            self._settings(folder, listed, snapshot_bytes), self.machine if ports else Nothing()
        )
        self.applied: dict[int, float] = {}
        self.replica.on_applied(self._note)

    def _settings(self, folder: Path, listed: str, snapshot_bytes: int) -> Settings:
        named = (each.split("=") for each in listed.split(","))
        members = tuple(LogMember(one, "127.0.0.1", int(port)) for one, port in named)
        return Settings(
            folder=folder / self.name, me=members[self.names.index(self.name)], members=members,
            ca_file=folder / "ca.pem", cert_file=folder / f"{self.name}.pem",
            key_file=folder / f"{self.name}.key", snapshot_bytes=snapshot_bytes,
        )  # fmt: skip

    def _note(self, index: int) -> None:
        self.applied[index] = time.monotonic()

    async def start(self) -> None:
        if self.ports:
            self.ledger = Ledger(self.replica, self.machine, RealClock())
            self.replica.on_applied(self.ledger.woken)
        await self.replica.start()
        if self.ports:
            self.server = Server(self._backend())
            await self.server.start(port=self.ports[self.names.index(self.name)])

    def _backend(self) -> Backend:
        # Of all these only the ledger is asked when a secret is set.
        return Backend(
            node=self.name, ledger=self.ledger, history=History(self.replica),
            deploys=WrittenDeploys(self.ledger), logs=WrittenLogs(),
            sources=WrittenSources(self.ledger), health=Seen(), cluster_key=KEY,
            clock=RealClock(), random_bytes=os.urandom,
        )  # fmt: skip

    async def answer(self, question: dict[str, float]) -> object:
        match question:
            case {"write": clients, "seconds": seconds}:
                return await closed_loop(
                    [functools.partial(self._write, each) for each in range(int(clients))], seconds
                )
            case {"read": clients, "seconds": seconds}:
                return await closed_loop([self.replica.read_index] * int(clients), seconds)
            case {"fill": count}:
                return await self._fill(int(count))
            case {"found": _}:
                return await self._found()
            case {"probe": _}:
                return await self._probe()
            case {"watch": _}:
                self.applied.clear()
                return True
            case {"watched": _}:
                return self.applied
            case _:
                return {"leading": self.replica.is_leader, "applied": self.replica.applied_index}

    async def _write(self, number: int = 0) -> None:
        if not self.ports:
            await self.replica.propose(bytes(VALUE_BYTES))
            return
        name, nonce = f"w{number}", os.urandom(NONCE_BYTES)
        sealed = seal(KEY, nonce, name, "v" * VALUE_BYTES)
        await self.ledger.propose(c.SetSecret(name, nonce, sealed))

    async def _fill(self, count: int) -> int:
        async def some(number: int) -> None:
            for _ in range(number, count, FILLERS):
                await self._write(number % 32)

        await asyncio.gather(*(some(number) for number in range(FILLERS)))
        return self.replica.applied_index

    async def _found(self) -> bool:
        digest = hashlib.sha256(TOKEN.encode()).hexdigest()
        await self.ledger.propose(c.InitCluster("mill-bench", "t-bench", digest))
        for number, (name, port) in enumerate(zip(self.names, self.ports, strict=True), 1):
            await self.ledger.propose(c.RegisterNode(
                name=name, number=number, api=f"127.0.0.1:{port}", agent="127.0.0.1:1",
                cpu_milli=4_000, memory_bytes=8_000_000_000,
            ))  # fmt: skip
        return True

    async def _probe(self) -> dict[int, float]:
        """When each of PROBES lone commits was known to its proposer, by index."""
        known = {}
        for _ in range(PROBES):
            index, _ = await self.replica.propose(bytes(VALUE_BYTES))
            known[index] = time.monotonic()
            await asyncio.sleep(0.003)  # so that each goes its way alone
        return known


async def main(folder: str, name: str, listed: str, snapshot: str, *ports: str) -> None:
    member = Member(Path(folder), name, listed, int(snapshot), [int(port) for port in ports])
    await member.start()
    reader = asyncio.StreamReader(limit=64 << 20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        print(json.dumps(await member.answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
