"""One node as a process: log, agent and API on loopback. Lines of JSON in, lines of JSON out.

`python -m tests.door.member FOLDER NAME NAME=LOG:AGENT:API:TLS,…`
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, cast

import structlog

from reconciler.api.server import Server
from reconciler.api.services import Backend
from reconciler.api.tls import server_context
from reconciler.clock import RealClock
from reconciler.edge.certificates import CsrSigner, load_identity
from reconciler.executor.agent.orders import Beat
from reconciler.executor.agent.server import AgentServer
from reconciler.executor.agent.supervise import Supervisor
from reconciler.executor.authority import ClusterAuthority
from reconciler.executor.history import History
from reconciler.executor.ledger import Ledger, StateMachine
from reconciler.fsm import commands as c
from reconciler.log.replica import Member, Replica, Settings
from tests.door.cluster import HOST, KEY
from tests.executor.world import MemoryImages, MemoryRuntime, NoLines


class Door:
    """The parts of a node that listen."""

    def __init__(
        self, folder: Path, name: str, ports: dict[str, tuple[int, int, int, int]]
    ) -> None:
        members = tuple(Member(each, HOST, port[0]) for each, port in ports.items())
        me = next(member for member in members if member.name == name)
        files = folder / name
        machine = StateMachine()
        self.replica = Replica(Settings(
            files / "log", me, members, files / "ca.pem", files / "cert.pem", files / "key.pem",
        ), machine)
        self.ledger = Ledger(self.replica, machine, RealClock())
        self.identity = load_identity(files)
        self.files, (_, self.agent_port, self.api_port, self.tls_port) = files, ports[name]
        supervisor = Supervisor(
            MemoryRuntime(), files / "allocs",
            lambda r: self.agent.tell(r),  # noqa: PLW0108  made below
            time.monotonic)
        self.agent = AgentServer(
            name, supervisor, MemoryImages(), NoLines(), lambda: Beat(at_ms=0), lambda: 0,
            lambda: self.ledger.state.nodes, ClusterAuthority(self.ledger, CsrSigner(), KEY))
        absent = cast("Any", None)  # nobody asks for it here
        self.api = Server(Backend(
            node=name, ledger=self.ledger, history=History(self.replica), deploys=absent,
            logs=absent, sources=absent, health=absent, cluster_key=KEY, clock=RealClock(),
            random_bytes=os.urandom))

    async def start(self) -> None:
        await self.replica.start()
        self.replica.on_applied(self.ledger.woken)
        i = self.identity
        await self.agent.start(f"{HOST}:{self.agent_port}", i.ca_pem, i.cert_pem, i.key_pem,
                               behind=self.files / "agent.sock")
        await self.api.start(
            host=HOST, port=self.tls_port,
            tls=server_context(self.files / "cert.pem", self.files / "key.pem"),
            plain=[socket.create_server((HOST, self.api_port), backlog=1024)])

    async def stop(self) -> None:
        await self.api.stop()
        await self.agent.stop()
        await self.replica.stop()

    async def found(self, token_sha256: str, names: list[str]) -> None:
        await self.ledger.propose(c.InitCluster("flooded", "t", token_sha256))
        for number, name in enumerate(names, 1):
            await self.ledger.propose(c.RegisterNode(
                name=name, number=number, api=f"{HOST}:1", agent=f"{HOST}:2", cpu_milli=1,
                memory_bytes=1))

    async def commit(self, count: int) -> float:
        """Seconds that so many commits took, one after the other."""
        begun = time.perf_counter()
        for _ in range(count):
            await self.ledger.propose(c.SetSecret("s", b"nonce", b"sealed"), timeout_s=30.0)
        return time.perf_counter() - begun

    def status(self) -> dict[str, object]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "leading": self.replica.is_leader, "term": self.replica.term,
            "applied": self.replica.applied_index,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "rss_mib": pages * os.sysconf("SC_PAGE_SIZE") >> 20,
        }


async def answer(node: Door, question: dict[str, Any]) -> object:
    match question:
        case {"found": token, "names": names}:
            await node.found(token, names)
            return {}
        case {"commit": count}:
            return {"seconds": await node.commit(count)}
        case {"status": _}:
            return node.status()
        case other:
            raise AssertionError(f"not a question: {other}")


async def main() -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    folder, name, listed = sys.argv[1:]
    ports = {}
    for each in listed.split(","):
        member, _, numbers = each.partition("=")
        log, agent, api, tls = map(int, numbers.split(":"))
        ports[member] = (log, agent, api, tls)
    node = Door(Path(folder), name, ports)
    await node.start()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    print("{}", flush=True)
    while line := await reader.readline():
        print(json.dumps(await answer(node, json.loads(line))), flush=True)
    await node.stop()


if __name__ == "__main__":
    asyncio.run(main())
