"""One node's edge: follows the state and keeps Envoy and DNS to it.

Level-triggered: whatever happened in between, the newest state says what should be served. The
node reports `confirmed`, `busy` and `last_error` to the leader.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import structlog

from reconciler.edge.ads import AdsServer
from reconciler.edge.certificates import Identity
from reconciler.edge.dns import Zone
from reconciler.edge.envoy import EnvoyError, EnvoyProcess
from reconciler.edge.resources import ResourceBuilder
from reconciler.edge.table import EdgeTable, edge_table, zone
from reconciler.errors import MillError
from reconciler.fsm.state import State

log = structlog.get_logger("mill.edge")

RETRY_S, RETRY_LIMIT_S = 1.0, 30.0
"""What was refused is tried again: the port that was taken may be free by then."""

RESTART_S, RESTART_LIMIT_S = 0.1, 5.0
CHECK_S = 60.0
"""How often a running Envoy's log and network namespace are looked at."""

DRAIN_LOOK_S = 0.1
"""How often endpoints that drain are asked for their requests; and how long each counts as busy
at least: Envoy acknowledges a moment before its worker has taken a change over."""


class Ledger(Protocol):
    """What an edge needs of the log: the newest state, and to be woken when it moved."""

    @property
    def state(self) -> State:
        """The newest state that is applied here."""
        ...

    async def changed(self, seen: State) -> State:
        """Wait until the state is another than `seen`; the newest one."""
        ...


class Dns(Protocol):
    """What an edge needs of `dns_feed.DnsProcess`. All of it raises MillError."""

    async def ensure_running(self) -> None:
        """The process runs, whoever started it."""
        ...

    async def publish(self, index: int, zone: Zone) -> None:
        """Return when this zone, or a newer one, is served."""
        ...

    async def close(self) -> None:
        """Stop feeding; the process goes on."""
        ...


class Edge:
    """The traffic side of one node. `on_change` is called when what it reports has changed."""

    def __init__(
        self,
        envoy: EnvoyProcess,
        ads: AdsServer,
        builder: ResourceBuilder,
        dns: Dns,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._envoy = envoy
        self._ads = ads
        self._builder = builder
        self._dns = dns
        self._on_change = on_change
        self._table = EdgeTable()
        self._zone: Zone | None = None
        self._confirmed = 0
        self._busy: frozenset[str] = frozenset()
        self._draining: dict[tuple[str, int], str] = {}
        self._error = ""
        self._traffic_error = ""
        self._names_error = ""
        self._envoy_error = ""
        self._retry_s, self._retry_at = RETRY_S, 0.0
        self._drains = asyncio.Event()
        self._again = asyncio.Event()

    @property
    def confirmed(self) -> int:
        """The greatest index whose traffic and names are served here; 0 at first."""
        return self._confirmed

    @property
    def busy(self) -> frozenset[str]:
        """IPs of draining endpoints that still have requests or connections through this node.
        At least as new as `confirmed`."""
        return self._busy

    @property
    def last_error(self) -> str:
        """Why the newest state is not served, or "" where it is."""
        return self._envoy_error or self._error

    def rotate(self, certificate: Identity) -> None:
        """Serve another certificate from now on; open connections go on with the old one."""
        self._builder.certificate = certificate
        self._again.set()

    async def run(self, ledger: Ledger) -> None:
        """Serve until cancelled. Envoy goes on without us; the socket it asks at is closed."""
        state = await self._recovered(ledger)
        self._table = edge_table(state)
        self._remember(state.index)
        resources = self._builder.build(self._table)
        await self._ads.start(self._envoy.xds_socket, state.index, resources)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_envoy())
                group.create_task(self._watch_drains())
                group.create_task(self._follow(ledger, state))
        finally:
            await self._ads.stop()
            await self._dns.close()

    async def _recovered(self, ledger: Ledger) -> State:
        """The first state to serve. Where an Envoy has served a newer one than this node has
        applied since its own restart, wait: going back would route to what has long stopped."""
        state = ledger.state
        served = self._remembered() if self._envoy.pid is not None else 0
        while state.index < served:
            self._tell(f"waiting for the log to reach {served}, which this edge serves already")
            state = await ledger.changed(state)
        return state

    async def _follow(self, ledger: Ledger, state: State) -> None:
        tried, served = state, await self._publish_all(state)
        while True:
            if served:
                self._confirm(state.index)
            state = await self._next(ledger, state)
            if self._again.is_set() or (not served and self._due()):
                self._again.clear()
                tried, served = state, await self._publish_all(state)
            elif not _same_inputs(tried, state):
                tried, served = state, await self._publish_changes(state)

    async def _publish_all(self, state: State) -> bool:
        """Tell Envoy and DNS even what they should know: it was refused, or is the first time."""
        self._table = edge_table(state)
        return await self._serve(state, self._traffic(state))

    async def _publish_changes(self, state: State) -> bool:
        """Tell Envoy what differs from what it was told last."""
        table = edge_table(state)
        if table == self._table:
            return await self._serve(state, None)
        self._table = table
        return await self._serve(state, self._traffic(state))

    async def _serve(self, state: State, traffic: Coroutine[Any, Any, None] | None) -> bool:
        """Names and traffic side by side; True when both are served."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._serve_names(state))
            if traffic is not None:
                group.create_task(traffic)
        self._mark_drains()
        problem = "; ".join(filter(None, (self._traffic_error, self._names_error)))
        if not problem:
            self._retry_s = RETRY_S
        elif problem != self._error:
            log.warning("edge_not_confirmed", index=state.index, reason=problem)
        self._tell(problem)
        return not problem

    async def _traffic(self, state: State) -> None:
        self._remember(state.index)
        publication = await self._ads.publish(state.index, self._builder.build(self._table))
        self._traffic_error = publication.error

    async def _serve_names(self, state: State) -> None:
        try:
            names = zone(state)
            if names != self._zone or self._names_error:
                await self._dns.ensure_running()
                await self._dns.publish(state.index, names)
            self._zone, self._names_error = names, ""
        except (MillError, OSError) as error:
            self._names_error = f"DNS: {error}"

    async def _next(self, ledger: Ledger, state: State) -> State:
        """The newest state: when it moved, when a retry is due, when something else changed."""
        timeout_s = None
        if self._error:
            self._retry_at = self._retry_at or monotonic() + self._retry_s
            timeout_s = max(0.0, self._retry_at - monotonic())
        moved = asyncio.create_task(ledger.changed(state))
        again = asyncio.create_task(self._again.wait())
        try:
            await asyncio.wait(
                {moved, again}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            moved.cancel()
            again.cancel()
        return ledger.state

    def _due(self) -> bool:
        """Time to try again what was refused; each time twice as late."""
        if monotonic() < self._retry_at:
            return False
        self._retry_at, self._retry_s = 0.0, min(self._retry_s * 2, RETRY_LIMIT_S)
        return True

    async def _keep_envoy(self) -> None:
        """Start Envoy, and start it again whenever it is gone."""
        wait_s = RESTART_S
        while True:
            try:
                await self._envoy.ensure_running()
                await self._envoy.ready()
                self._tell_envoy("")
                wait_s = RESTART_S
                while not await self._exited():
                    await self._envoy.ensure_running()
                self._tell_envoy("Envoy ended and is started again")
            except (EnvoyError, OSError) as error:
                self._tell_envoy(str(error))
            log.warning("envoy_down", reason=self._envoy_error)
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, RESTART_LIMIT_S)

    async def _exited(self) -> bool:
        """Wait for Envoy's end for a while; True if it came."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CHECK_S):
                await self._envoy.exited()
        return self._envoy.pid is None

    def _mark_drains(self) -> None:
        """What began to drain counts as busy until it was looked at."""
        draining = {
            (endpoint.ip, endpoint.port): cluster.service
            for cluster in self._table.clusters for endpoint in cluster.endpoints
            if endpoint.draining
        }
        new = {ip for ip, port in draining if (ip, port) not in self._draining}
        old = {ip for ip, _ in draining if ip in self._busy}
        self._draining = draining
        self._tell_busy(new | old)
        if draining:
            self._drains.set()
        else:
            self._drains.clear()

    async def _watch_drains(self) -> None:
        """Look which draining endpoints still have requests. While that cannot be known, they
        stay as they were; the leader's own deadline bounds the wait."""
        while True:
            await self._drains.wait()
            await asyncio.sleep(DRAIN_LOOK_S)
            looked = self._draining
            with contextlib.suppress(EnvoyError):
                busy = await self._envoy.requests_by_endpoint(looked, set(looked.values()))
                if looked is self._draining:
                    self._tell_busy({ip for ip, _ in busy})

    def _tell_busy(self, ips: set[str]) -> None:
        if ips != self._busy:
            self._busy = frozenset(ips)
            self._on_change()

    def _confirm(self, index: int) -> None:
        if index > self._confirmed:
            self._confirmed = index
            self._on_change()

    def _tell(self, error: str) -> None:
        if error != self._error:
            self._error = error
            self._on_change()

    def _tell_envoy(self, error: str) -> None:
        if error != self._envoy_error:
            self._envoy_error = error
            self._on_change()

    @property
    def _memory(self) -> Path:
        return self._envoy.folder / "edge.index"

    def _remember(self, index: int) -> None:
        """Before it is served, so that the file is never behind. Lost power may lose it: then
        Envoy is gone too."""
        temporary = self._memory.with_suffix(".new")
        try:
            temporary.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_text(str(index))
            temporary.replace(self._memory)
        except OSError as error:
            # A full disk must not stop traffic; a restart then may begin a little too early.
            log.warning("edge_index_not_kept", reason=str(error), at=str(self._memory))

    def _remembered(self) -> int:
        try:
            return int(self._memory.read_text())
        except (FileNotFoundError, ValueError):
            return 0


def _same_inputs(a: State, b: State) -> bool:
    """Nothing that a table or a zone is made of has changed: states share what is the same."""
    return (
        a.services is b.services and a.allocations is b.allocations
        and a.specs is b.specs and a.active_deploy == b.active_deploy
    )
