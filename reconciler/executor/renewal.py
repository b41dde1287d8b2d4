"""A node renews its certificate long before it ends: new key, signed by the leader, no restart.

While a third of its life is still left, so that weeks without a leader cost nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog

from reconciler.errors import MillError, Unavailable
from reconciler.executor.agent.authority import Dialler, renew
from reconciler.executor.ledger import Ledger

log = structlog.get_logger("mill.renewal")

LOOK_S = 3_600.0
"""The longest sleep: clocks are set, and machines are suspended."""
AGAIN_S = 60.0
"""Between two tries; sooner where little is left."""
LEAST_S = 0.5

Reload = Callable[[bytes, bytes, bytes], None]
"""Takes up CA, certificate and key (PEM) for connections from now on."""


class Kept(Protocol):
    """The node's identity: `reconciler.edge.identity.NodeIdentity`."""

    def due_in_s(self) -> float:
        """Seconds until it is to be renewed; negative after."""
        ...

    def left_s(self) -> float:
        """Seconds until it ends; negative after."""
        ...

    def request(self) -> bytes:
        """A request for a new key."""
        ...

    def keep(self, certificate: bytes) -> tuple[bytes, bytes, bytes]:
        """Put it in place of the former; CA, certificate, key."""
        ...


class Renewal:
    """Keeps one node's certificate fresh. `reload` are told of each new one, in their order."""

    def __init__(
        self, ledger: Ledger, kept: Kept, dialler: Dialler, reload: tuple[Reload, ...],
    ) -> None:
        self._ledger = ledger
        self._kept = kept
        self._dialler = dialler
        self._reload = reload

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            due_s = self._kept.due_in_s()
            if due_s > 0:
                await asyncio.sleep(min(due_s, LOOK_S))
                continue
            try:
                await self.renew_now()
            except (MillError, OSError) as error:
                left_s = self._kept.left_s()
                log.warning("renewal_failed", reason=str(error), left_s=round(left_s), hint=(
                    "" if left_s > 0 else "it has ended, and no node speaks to this one: "
                    "mill leave --force here, mill remove on another, then join again"))
                await asyncio.sleep(max(LEAST_S, min(AGAIN_S, left_s / 20)))

    async def renew_now(self) -> None:
        """One renewal. Raises MillError or OSError with the former certificate in place."""
        leader = self._ledger.leader
        node = self._ledger.state.nodes.get(leader or "")
        if node is None:
            raise Unavailable("no leader is known that could sign")
        csr_pem = self._kept.request()
        certificate = await renew(node.agent, node.name, csr_pem, self._dialler, within_s=0.0)
        renewed = self._kept.keep(certificate)
        for reload in self._reload:
            try:
                reload(*renewed)
            except Exception:
                # What took it up must not be told twice because another could not.
                log.exception("reload_failed")
        log.info("certificate_renewed", left_s=round(self._kept.left_s()))
