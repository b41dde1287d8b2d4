"""One node, put together: log, agent, edge, API, and, while it leads, the leader's loops.

`python -m reconciler.node CONFIG NAME` runs it until SIGTERM. Its containers, Envoy, DNS and log
process outlive it, and are found again by the next one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from pathlib import Path

import structlog

from reconciler.api.address import is_loopback
from reconciler.api.server import Server
from reconciler.api.services import Backend
from reconciler.api.tls import server_context
from reconciler.clock import RealClock
from reconciler.edge.ads import AdsServer
from reconciler.edge.certificates import CsrSigner, Identity
from reconciler.edge.dns_feed import DnsProcess, Listener
from reconciler.edge.envoy import EnvoyProcess
from reconciler.edge.follow import Edge
from reconciler.edge.identity import NodeIdentity
from reconciler.edge.listeners import Ingress
from reconciler.edge.resources import ResourceBuilder
from reconciler.errors import MillError
from reconciler.executor.admit import Admission
from reconciler.executor.agent.logs import LogStore
from reconciler.executor.agent.orders import Beat, Report
from reconciler.executor.agent.runtime import NodeRuntime
from reconciler.executor.agent.server import AgentServer
from reconciler.executor.agent.supervise import Supervisor
from reconciler.executor.agent.terms import Terms
from reconciler.executor.authority import ClusterAuthority
from reconciler.executor.containerd import network
from reconciler.executor.containerd.client import Containerd
from reconciler.executor.containerd.registry import resolve
from reconciler.executor.drain import leave
from reconciler.executor.drains import Nodes
from reconciler.executor.front import Front
from reconciler.executor.history import History
from reconciler.executor.joining import Joining
from reconciler.executor.ledger import Ledger, StateMachine
from reconciler.executor.links import Credentials, LogReader
from reconciler.executor.reading import Reader
from reconciler.executor.renewal import Reload, Renewal
from reconciler.fsm.records import Secret
from reconciler.fsm.seal import unseal
from reconciler.git.poll import Poller
from reconciler.log import rejoin
from reconciler.log.replica import Replica
from reconciler.log.settings import Member, Settings
from reconciler.node_backend import Deploys, GitSources, Logs, NodesView
from reconciler.node_config import NodeConfig, load
from reconciler.node_following import follow_peers
from reconciler.node_leading import Leading
from reconciler.node_members import LogMembers
from reconciler.node_removal import keep_known, until_out

log = structlog.get_logger("mill.node")

TIDY_S = 60.0
SWITCH_S = 0.0005
LOOPBACK = "127.0.0.1"


class Node:
    """One node's parts. `run` starts them in the order in which they need each other."""

    def __init__(self, config: NodeConfig) -> None:
        self.config = config
        self.data = Path(config.data)
        self.clock = RealClock()
        self.kept = NodeIdentity(config.name, self.data / "identity")
        self.cluster_key = (self.data / "cluster.key").read_bytes()
        self.machine = StateMachine()
        self.replica = Replica(self._log_settings(), self.machine)
        self.ledger = Ledger(self.replica, self.machine, self.clock)
        identity = self.kept.identity
        self.credentials = Credentials(identity.ca_pem, identity.cert_pem, identity.key_pem)
        self.authority = ClusterAuthority(self.ledger, CsrSigner(), self.cluster_key)
        self.members = LogMembers(self.replica)
        self.reader = Reader()
        self.poller = Poller()
        self.front = Front(self.ledger, self._admission(), lambda: self.leading.links)
        self.leading = Leading(
            config, self.replica, self.ledger, self.clock, lambda: self.credentials, self.front,
            self.reader, self.poller, self._read_secret, self.cluster_key)
        self.layout = config.layout
        self.logs = LogStore(self.data / "logs")
        self.runtime: NodeRuntime | None = None
        self.edge: Edge | None = None
        self.agent: AgentServer | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set."""
        self.replica.on_closed(self._on_log_closed)
        await self.replica.start()
        self.replica.on_applied(self.ledger.woken)
        self.replica.on_leadership(self.leading.changed)
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
        identity = self.kept.identity
        self.edge = self._make_edge(dns, identity)
        api = Server(self._backend(identity.ca_pem))
        renewal = Renewal(self.ledger, self.kept, self.credentials, self._reloads(api))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(runtime.watch())]
                supervisor = await self._start_agent(runtime, group)
                tasks.append(group.create_task(self._keep_edge(self.edge)))
                tasks.append(group.create_task(self.leading.run()))
                tasks.append(group.create_task(self._tidy(runtime)))
                tasks.append(group.create_task(renewal.run()))
                tasks.append(group.create_task(follow_peers(self.ledger, self.layout)))
                tasks.append(group.create_task(keep_known(self.ledger, self.config)))
                await self._open_api(api)
                log.info("serving", node=self.config.name, api=self.config.me.api_port)
                try:
                    await self._until_stopped(stop)
                    # While the API still answers: what it is asked meanwhile waits for the next.
                    await leave(self.ledger, self.replica.transfer, self.config.name)
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
        removed = asyncio.ensure_future(
            until_out(self.ledger, self.config, lambda: self.replica.leader))
        ends: list[asyncio.Future[object]] = [stopped, removed, self.replica.fatal]  # type: ignore[list-item]  # futures are invariant
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if removed.done():
            log.warning("removed", node=self.config.name, cluster=self.config.cluster,
                        hint="clean this machine: mill leave")
        removed.cancel()
        if self.replica.fatal.done() and not self.replica.fatal.cancelled():
            error = self.replica.fatal.exception()
            log.error("log_failed", reason=str(error))
            raise MillError(f"the log of {self.config.name} has failed: {error}")

    # -- parts -----------------------------------------------------------------------------

    def _log_settings(self) -> Settings:
        founders = tuple(Member(p.name, p.host, p.log_port) for p in self.config.peers)
        identity = self.data / "identity"
        me = next(member for member in founders if member.name == self.config.name)
        members = tuple(Member(m.name, m.host, m.port) for m in self.config.members) or founders
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
        inside = Listener(self.layout.gateway, 53, self.layout.node_path)
        if not self.config.dns_port:
            return (inside,)
        return (inside, Listener(self.config.me.host, self.config.dns_port))

    async def _open_api(self, api: Server) -> None:
        """TLS on an address that others reach, and plain HTTP on loopback."""
        me = self.config.me
        if is_loopback(me.host):
            await api.start(host=me.host, port=me.api_port)
            return
        folder = self.data / "identity"
        inside = socket.create_server((LOOPBACK, me.api_port), backlog=1024)
        await api.start(host=me.host, port=me.api_port, plain=[inside],
                        tls=server_context(folder / "cert.pem", folder / "key.pem"))

    def _reloads(self, api: Server) -> tuple[Reload, ...]:
        """Whoever shows this node's certificate, told of each new one."""
        folder = self.data / "identity"

        def edge(_ca: bytes, _certificate: bytes, _key: bytes) -> None:
            if self.edge is not None:
                self.edge.rotate(self.kept.identity)

        def agent(ca: bytes, certificate: bytes, key: bytes) -> None:
            if self.agent is not None:
                self.agent.reload(ca, certificate, key)

        return (
            self.credentials.renew, agent, edge,
            lambda *_: self.replica.reload_identity(),
            lambda *_: api.take_certificate(folder / "cert.pem", folder / "key.pem"),
        )

    def _make_edge(self, dns: DnsProcess, identity: Identity) -> Edge:
        config = self.config
        ingress = Ingress(config.ingress_host, config.http_port, config.https_port,
                          netns_path=config.host_netns)
        envoy = EnvoyProcess(Path(config.run) / "envoy", self.layout.node_path,
                             node=str(config.me.number))
        return Edge(envoy, AdsServer(), ResourceBuilder(ingress, identity), dns,
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
        agent = AgentServer(
            self.config.name, supervisor, runtime, runtime, self._beat, lambda: self.replica.term,
            nodes=lambda: self.ledger.state.nodes, custody=self.authority,
            kept=Terms(self.data / "agent.term"), confirm=self.replica.confirm_leader)
        await supervisor.recover(group)
        me, identity = self.config.me, self.kept.identity
        await agent.start(f"{me.host}:{me.agent_port}", identity.ca_pem, identity.cert_pem,
                          identity.key_pem, behind=Path(self.config.run) / "agent.sock")
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

    def _backend(self, ca_pem: bytes) -> Backend:
        return Backend(
            node=self.config.name, ledger=self.ledger, history=History(self.replica),
            deploys=Deploys(self.front),
            logs=Logs(LogReader(self.ledger, self.credentials)),
            sources=GitSources(self.ledger, self.front, lambda: self.leading.sources),
            health=NodesView(
                lambda: self.leading.links, self.config.name, lambda: self.replica.closed,
                self.members.votes),
            nodes=Nodes(self.ledger, self.members.out),
            joining=Joining(self.ledger, self.authority, CsrSigner(), self.members.told, ca_pem),
            ca=None if is_loopback(self.config.me.host) else ca_pem,
            cluster_key=self.cluster_key,
            clock=self.clock, random_bytes=os.urandom,
        )

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


def log_to(stream: object) -> None:
    """Log to a text file, as `key=value` lines."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.LogfmtRenderer(key_order=["timestamp", "level", "event"]),
        ],
        logger_factory=structlog.PrintLoggerFactory(stream),  # type: ignore[arg-type]  # a text file
    )


def run_until_stopped(config: NodeConfig) -> int:
    """Run a node to its end: 0 after a stop that was asked for, 1 with the reason logged."""
    try:
        asyncio.run(serve(config))
    except (MillError, OSError) as error:
        log_failure(config, error)
        return 1
    except BaseExceptionGroup as group:
        ours, others = group.split((MillError, OSError))
        if others is not None:
            raise
        log_failure(config, ours.exceptions[0] if ours else group)
        return 1
    return 0


def log_failure(config: NodeConfig, error: BaseException) -> None:
    """Say why a node cannot run, and what to do about it."""
    more = {"hint": error.hint} if isinstance(error, MillError) and error.hint else {}
    log.error("node_failed", node=config.name, reason=str(error), **more)


def main(argv: list[str]) -> int:
    """`CONFIG NAME [--rejoin]`: a node of `mill dev`.

    `--rejoin`: the log here is lost or damaged; move it aside and bring it back from the peers.
    """
    config = load(Path(argv[0]))
    log_to(sys.stderr)
    # The raft thread must not wait 5 ms for the loop's thread to let go of the interpreter.
    sys.setswitchinterval(SWITCH_S)
    if "--rejoin" in argv[2:]:
        try:
            moved = rejoin.begin(Path(config.data) / "log")
        except (MillError, OSError) as error:
            log_failure(config, error)
            return 1
        log.warning("log_moved_aside", node=config.name, to=", ".join(moved))
    return run_until_stopped(config)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
