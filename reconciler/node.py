"""One node, put together: log, agent, edge, API, and, while it leads, the leader's loops.

`python -m reconciler.node CONFIG NAME` runs it until SIGTERM. Its containers, Envoy, DNS and log
process outlive it, and are found again by the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import string
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import structlog

from reconciler.api.server import Server
from reconciler.api.services import Backend
from reconciler.clock import RealClock
from reconciler.edge.ads import AdsServer
from reconciler.edge.certificates import load_identity
from reconciler.edge.dns_feed import DnsProcess, Listener
from reconciler.edge.envoy import EnvoyProcess
from reconciler.edge.follow import Edge
from reconciler.edge.listeners import Ingress
from reconciler.edge.resources import ResourceBuilder
from reconciler.errors import MillError
from reconciler.executor.admit import Admission
from reconciler.executor.agent.logs import LogStore
from reconciler.executor.agent.orders import Beat, Report
from reconciler.executor.agent.runtime import NodeRuntime
from reconciler.executor.agent.server import AgentServer
from reconciler.executor.agent.supervise import Supervisor
from reconciler.executor.confirm import confirm_from
from reconciler.executor.containerd import network
from reconciler.executor.containerd.client import Containerd
from reconciler.executor.containerd.registry import resolve
from reconciler.executor.front import Front
from reconciler.executor.history import History
from reconciler.executor.leader import Leader
from reconciler.executor.ledger import CommandRefused, Ledger, StateMachine
from reconciler.executor.links import Credentials, Links, LogReader
from reconciler.executor.reading import Reader
from reconciler.executor.requests import DeployRequest
from reconciler.fsm import commands as c
from reconciler.fsm.records import Origin, Secret, Source
from reconciler.fsm.seal import unseal
from reconciler.git.bring import Bring
from reconciler.git.findings import Commit
from reconciler.git.poll import Poller
from reconciler.git.source import Sources
from reconciler.log import rejoin
from reconciler.log.replica import Replica
from reconciler.log.settings import Member, Settings
from reconciler.node_backend import Deploys, GitSources, Logs, NodesView
from reconciler.node_config import NodeConfig, load

log = structlog.get_logger("mill.node")

TIDY_S = 60.0
SWITCH_S = 0.0005
ID_CHARS = string.ascii_lowercase + string.digits


def new_alloc_id(service: str) -> str:
    """`NAME-xxxxxx`, six of a-z and 0-9 (contracts: Words)."""
    return f"{service}-{''.join(secrets.choice(ID_CHARS) for _ in range(6))}"


class Node:
    """One node's parts. `run` starts them in the order in which they need each other."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.data = Path(config.data)
        self.clock = RealClock()
        self.identity = load_identity(self.data / "identity")
        self.cluster_key = (self.data / "cluster.key").read_bytes()
        self.machine = StateMachine()
        self.replica = Replica(self._log_settings(), self.machine)
        self.ledger = Ledger(self.replica, self.machine, self.clock)
        self.credentials = Credentials(
            self.identity.ca_pem, self.identity.cert_pem, self.identity.key_pem)
        self.links: Links | None = None
        self.sources: Sources | None = None
        self.reader = Reader()
        self.poller = Poller()
        self.front = Front(self.ledger, self._admission(), lambda: self.links)
        self.layout = config.layout
        self.logs = LogStore(self.data / "logs")
        self.runtime: NodeRuntime | None = None
        self.edge: Edge | None = None
        self.agent: AgentServer | None = None
        self._led = asyncio.Event()
        self._term: int | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set."""
        self.replica.on_closed(self._on_log_closed)
        await self.replica.start()
        self.replica.on_applied(self.ledger.woken)
        self.replica.on_leadership(self._on_leadership)
        await network.ensure_node(self.layout)
        await self.logs.ensure_running()
        config = self.config
        client = Containerd(Path(config.containerd), config.namespace,
                            runc_root=Path(config.runc_root))
        async with client, self.poller:
            await client.ensure_namespace()
            self.runtime = NodeRuntime(
                client, self.layout, self.logs, self.data / "mounts", f"/mill-{config.tag}",
                self.cluster_key)
            await self._serve(self.runtime, stop)

    async def _serve(self, runtime: NodeRuntime, stop: asyncio.Event) -> None:
        dns = DnsProcess(Path(self.config.run) / "dns", self._dns_listeners(),
                         self.config.dns_upstreams)
        self.edge = self._make_edge(dns)
        api = Server(self._backend())
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(runtime.watch())]
                supervisor = await self._start_agent(runtime, group)
                tasks.append(group.create_task(self._keep_edge(self.edge)))
                tasks.append(group.create_task(self._lead_when_elected()))
                tasks.append(group.create_task(self._tidy(runtime)))
                await api.start(host=self.config.me.host, port=self.config.me.api_port)
                log.info("serving", node=self.config.name, api=self.config.me.api_port)
                try:
                    await self._until_stopped(stop)
                finally:
                    await api.stop()
                await self.replica.stop()
                if self.agent is not None:
                    await self.agent.stop()
                for task in (*tasks, *supervisor.tasks()):
                    task.cancel()
        finally:
            await self.reader.close()

    async def _until_stopped(self, stop: asyncio.Event) -> None:
        stopped = asyncio.ensure_future(stop.wait())
        ends: list[asyncio.Future[object]] = [stopped, self.replica.fatal]  # type: ignore[list-item]  # futures are invariant
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if self.replica.fatal.done() and not self.replica.fatal.cancelled():
            error = self.replica.fatal.exception()
            log.error("log_failed", reason=str(error))
            raise MillError(f"the log of {self.config.name} has failed: {error}")

    # -- parts -----------------------------------------------------------------------------

    def _log_settings(self) -> Settings:
        members = tuple(Member(p.name, p.host, p.log_port) for p in self.config.peers)
        identity = self.data / "identity"
        me = next(member for member in members if member.name == self.config.name)
        return Settings(
            folder=self.data / "log", me=me, members=members, ca_file=identity / "ca.pem",
            cert_file=identity / "cert.pem", key_file=identity / "key.pem",
        )

    def _admission(self) -> Admission:
        return Admission(self.ledger.read, self.reader, resolve, self._open)

    def _open(self, secret: Secret) -> str:
        newest = secret.versions[-1]
        return unseal(self.cluster_key, newest.nonce, secret.name, newest.sealed)

    def _read_secret(self, name: str) -> str | None:
        secret = self.ledger.state.secrets.get(name)
        return self._open(secret) if secret else None

    def _dns_listeners(self) -> tuple[Listener, ...]:
        return (
            Listener(self.layout.gateway, 53, self.layout.node_path),
            Listener(self.config.me.host, self.config.dns_port),
        )

    def _make_edge(self, dns: DnsProcess) -> Edge:
        config = self.config
        ingress = Ingress(config.me.host, config.http_port, config.https_port,
                          netns_path=config.host_netns)
        envoy = EnvoyProcess(Path(config.run) / "envoy", self.layout.node_path,
                             node=str(config.me.number))
        return Edge(envoy, AdsServer(), ResourceBuilder(ingress, self.identity), dns,
                    self._edge_moved)

    def _edge_moved(self) -> None:
        if self.agent is not None:
            self.agent.beat_now()

    def _beat(self) -> Beat:
        edge = self.edge
        return Beat(
            at_ms=self.clock.wall_ms(), edge_index=edge.confirmed if edge else 0,
            edge_error=edge.last_error if edge else "",
            busy=tuple(sorted(edge.busy)) if edge else (), log_error=self.replica.closed,
        )

    def _on_log_closed(self, reason: str) -> None:
        """Agent, edge and stale reads go on; the leader is told which disk it is."""
        if reason:
            log.error("log_closed", node=self.config.name, reason=reason)
        else:
            log.info("log_open_again", node=self.config.name)
        if self.agent is not None:
            self.agent.beat_now()

    async def _start_agent(self, runtime: NodeRuntime, group: asyncio.TaskGroup) -> Supervisor:
        def tell(report: Report) -> None:
            agent.tell(report)

        supervisor = Supervisor(runtime, self.data / "allocs", tell, time.monotonic)
        agent = AgentServer(self.config.name, supervisor, runtime, runtime, self._beat,
                            lambda: self.replica.term)
        await supervisor.recover(group)
        me = self.config.me
        await agent.start(f"{me.host}:{me.agent_port}", self.identity.ca_pem,
                          self.identity.cert_pem, self.identity.key_pem)
        self.agent = agent
        return supervisor

    async def _keep_edge(self, edge: Edge) -> None:
        while True:
            try:
                await edge.run(self.ledger)
            except* MillError as group:
                for error in group.exceptions:
                    log.error("edge_failed", reason=str(error))
            await asyncio.sleep(1.0)

    def _backend(self) -> Backend:
        return Backend(
            node=self.config.name, ledger=self.ledger, history=History(self.replica),
            deploys=Deploys(self.front),
            logs=Logs(LogReader(self.ledger, self.credentials)),
            sources=GitSources(self.ledger, self.front, lambda: self.sources),
            health=NodesView(
                lambda: self.links, self.config.name, lambda: self.replica.closed),
            cluster_key=self.cluster_key,
            clock=self.clock, random_bytes=os.urandom,
        )

    # -- leading ---------------------------------------------------------------------------

    def _on_leadership(self, leading: bool, term: int) -> None:
        self._term = term if leading else None
        self._led.set()

    async def _lead_when_elected(self) -> None:
        current: asyncio.Task[None] | None = None
        if self.replica.is_leader:
            self._on_leadership(True, self.replica.term)
        try:
            while True:
                await self._led.wait()
                self._led.clear()
                if current is not None:
                    current.cancel()
                    await asyncio.gather(current, return_exceptions=True)
                    current, self.links, self.sources = None, None, None
                if self._term is not None:
                    current = asyncio.create_task(self._keep_leading(self._term))
        finally:
            if current is not None:
                current.cancel()
                await asyncio.gather(current, return_exceptions=True)

    async def _keep_leading(self, term: int) -> None:
        """A leader without its loops would be worse than none: what stumbles is begun again."""
        while True:
            try:
                await self._lead(term)
            except Exception:
                log.exception("leading_failed", term=term)
            await asyncio.sleep(1.0)

    async def _lead(self, term: int) -> None:
        self.links = Links(self.ledger, self.config.name, self.credentials, self.clock)
        bring = Bring(self.ledger, self._start_commit, self._count_services)
        self.sources = Sources(self.ledger, self.poller.look, bring, self._read_secret)
        sources = self.sources

        async def follow_sources(_term: int) -> None:
            await sources.run()

        leader = Leader(self.ledger, self.links, new_alloc_id,
                        others=(self._found, follow_sources),
                        confirm=confirm_from(self.layout.node_path))
        await leader.run(term)

    async def _start_commit(self, source: Source, commit: Commit) -> str:
        """A commit as one deploy, with prune for the services of its source. Without a key: a
        commit that is tried again is another deploy."""
        return await self.front.start(DeployRequest(
            files=commit.files, variables=dict(source.variables), prune=True, owner=source.name,
            origin=Origin(kind="git", source=source.name, commit=commit.sha,
                          author=commit.author, subject=commit.subject),
        ))

    async def _count_services(
        self, files: Mapping[str, bytes], variables: Mapping[str, str]
    ) -> int | None:
        reading = await self.reader.read(files, variables)
        return None if reading.problems else len(reading.manifest.services)

    async def _found(self, _term: int) -> None:
        """Put the cluster and its founding nodes in the log, where they are not there yet."""
        state = self.ledger.state
        if not state.cluster:
            with contextlib.suppress(CommandRefused):
                await self.ledger.propose(c.InitCluster(
                    self.config.cluster, self.config.token_id, self.config.token_sha256))
        for peer in self.config.peers:
            if not peer.is_as(self.ledger.state.nodes.get(peer.name)):
                await self.ledger.propose(c.RegisterNode(
                    name=peer.name, number=peer.number, api=peer.api, agent=peer.agent,
                    cpu_milli=peer.cpu_milli,
                    memory_bytes=peer.memory_bytes))
        await asyncio.Event().wait()

    # -- housekeeping ----------------------------------------------------------------------

    async def _tidy(self, runtime: NodeRuntime) -> None:
        """Logs stay as long as their allocation's record, images as long as a kept revision."""
        while True:
            await asyncio.sleep(TIDY_S)
            state = self.ledger.state
            if not state.cluster:
                continue  # a state that has not caught up says nothing about what is needed
            digests = {r.digest for s in state.services.values() for r in s.revisions}
            digests |= {a.digest for a in state.allocations.values()}
            deploy = state.running_deploy()
            digests |= {change.digest for change in (deploy.changes if deploy else ())}
            try:
                await runtime.tidy(set(state.allocations), digests)
            except (MillError, OSError) as error:
                log.warning("tidy_failed", reason=str(error))


async def serve(config: NodeConfig) -> None:
    """Run a node until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await Node(config).run(stop)


def _log_to(stream: object) -> None:
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(stream),  # type: ignore[arg-type]  # a text file
    )


def main(argv: list[str]) -> int:
    """`CONFIG NAME [--rejoin]`: 0 after a stop that was asked for, 1 with the reason logged.

    `--rejoin`: the log here is lost or damaged; move it aside and bring it back from the peers.
    """
    config = load(Path(argv[0]))
    _log_to(sys.stderr)
    # The raft thread must not wait 5 ms for the loop's thread to let go of the interpreter.
    sys.setswitchinterval(SWITCH_S)
    try:
        if "--rejoin" in argv[2:]:
            moved = rejoin.begin(Path(config.data) / "log")
            log.warning("log_moved_aside", node=config.name, to=", ".join(moved))
        asyncio.run(serve(config))
    except (MillError, OSError) as error:
        log.error("node_failed", node=config.name, reason=str(error))
        return 1
    except BaseExceptionGroup as group:
        ours, others = group.split((MillError, OSError))
        if others is not None:
            raise
        log.error("node_failed", node=config.name, reason=str(ours.exceptions[0] if ours else ""))
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
