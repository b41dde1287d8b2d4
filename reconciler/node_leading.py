"""What runs on a node while it leads: begun with its leadership, ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import string
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from reconciler.clock import Clock
from reconciler.edge.certificates import load_authority
from reconciler.executor.authority import found_authority
from reconciler.executor.confirm import confirm_from
from reconciler.executor.front import Front
from reconciler.executor.leader import Leader
from reconciler.executor.ledger import CommandRefused, Ledger
from reconciler.executor.links import Credentials, Links
from reconciler.executor.membership import Membership
from reconciler.executor.reading import Reader
from reconciler.executor.requests import DeployRequest
from reconciler.fsm import commands as c
from reconciler.fsm.records import Origin, Source
from reconciler.git.bring import Bring
from reconciler.git.findings import Commit
from reconciler.git.poll import Poller
from reconciler.git.source import Sources
from reconciler.log.replica import Replica
from reconciler.node_config import NodeConfig
from reconciler.node_members import LogMembers

log = structlog.get_logger("mill.node")

AGAIN_S = 1.0
ID_CHARS = string.ascii_lowercase + string.digits


def new_alloc_id(service: str) -> str:
    """`NAME-xxxxxx`, six of a-z and 0-9 (contracts: Words)."""
    return f"{service}-{''.join(secrets.choice(ID_CHARS) for _ in range(6))}"


@dataclass
class Leading:
    """This node as the leader. `links` and `sources` are None while it does not lead."""

    config: NodeConfig
    replica: Replica
    ledger: Ledger
    clock: Clock
    credentials: Callable[[], Credentials]
    front: Front
    reader: Reader
    poller: Poller
    read_secret: Callable[[str], str | None]
    cluster_key: bytes
    links: Links | None = None
    sources: Sources | None = None
    _led: asyncio.Event = field(default_factory=asyncio.Event)
    _term: int | None = None

    def changed(self, leading: bool, term: int) -> None:
        """The log says that this node leads, or no longer does."""
        self._term = term if leading else None
        self._led.set()

    async def run(self) -> None:
        """Until cancelled: lead whenever elected."""
        current: asyncio.Task[None] | None = None
        if self.replica.is_leader:
            self.changed(True, self.replica.term)
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
            await asyncio.sleep(AGAIN_S)

    async def _lead(self, term: int) -> None:
        self.links = Links(self.ledger, self.config.name, self.credentials(), self.clock,
                           led=lambda: self.replica.is_followed)
        bring = Bring(self.ledger, self._start_commit, self._count_services)
        sources = Sources(self.ledger, self.poller.look, bring, self.read_secret)
        self.sources = sources

        async def follow_sources(_term: int) -> None:
            await sources.run()

        members = LogMembers(self.replica)
        others: tuple[Callable[[int], Awaitable[None]], ...] = (
            self._found, follow_sources,
            Membership(self.ledger, members, self.config.name).run)
        leader = Leader(self.ledger, self.links, new_alloc_id, others=others,
                        confirm=confirm_from(self.config.layout.node_path),
                        transfer=members.transfer)
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
        """Put the founding nodes and, last, the cluster in the log, where they are not there.

        Later only what a founding node says of itself is kept up: one that was removed stays so.
        """
        founders = () if self.config.members else self.config.peers
        founding = not self.ledger.state.cluster
        for peer in founders:
            known = self.ledger.state.nodes.get(peer.name)
            if not peer.is_as(known) and (known or founding):
                await self.ledger.propose(c.RegisterNode(
                    name=peer.name, number=peer.number, api=peer.api, agent=peer.agent,
                    log=peer.log, cpu_milli=peer.cpu_milli, memory_bytes=peer.memory_bytes))
        if founding and founders:
            with contextlib.suppress(CommandRefused):
                await self.ledger.propose(c.InitCluster(
                    self.config.cluster, self.config.token_id, self.config.token_sha256))
        if founders and self.config.authority and self.ledger.state.authority is None:
            authority = load_authority(Path(self.config.authority))
            await found_authority(self.ledger, authority.cert_pem, authority.key_pem,
                                  self.cluster_key)
        if founders and self.config.overlay == "vxlan" and self.ledger.state.authority is not None:
            # Sealed in the log by now: on a machine it lies in clear no longer than it must.
            (Path(self.config.authority) / "ca-key.pem").unlink(missing_ok=True)
        await asyncio.Event().wait()
