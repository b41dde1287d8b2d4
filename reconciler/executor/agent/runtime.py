"""This node's containers as the supervisor wants them: image, network, logs and task together."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import structlog

from reconciler.errors import MillError, Unprocessable
from reconciler.executor.agent.logs import LogStore
from reconciler.executor.agent.orders import (
    LogLine,
    LogRequest,
    Piece,
    Plain,
    Pull,
    PullReport,
    Sealed,
    Start,
)
from reconciler.executor.agent.probe import Target
from reconciler.executor.agent.supervise import Exit, Found, StartFailed
from reconciler.executor.containerd import containers, network
from reconciler.executor.containerd.cgroups import oom_kills
from reconciler.executor.containerd.client import Absent, Containerd, RuntimeFailed
from reconciler.executor.containerd.network_namespace import socket_in
from reconciler.executor.containerd.probe import exec_probe
from reconciler.executor.containerd.pull import list_images, pull, remove_image
from reconciler.executor.containerd.registry import PullFailed
from reconciler.executor.containerd.spec import Bind, ContainerSpec, Tmpfs
from reconciler.executor.containerd.watch import OutOfMemory, events, wait
from reconciler.fsm.seal import unseal

log = structlog.get_logger("mill.agent")

KILLED = 137
OOM_PATIENCE_S = 0.3
"""The kernel's word on memory may come a moment after the exit."""
PROGRESS_S = 0.2
TMPFS_BYTES = 64 << 20
VERSIONS_FAULT = ("executable file not found", "no such file or directory", "permission denied",
                  "not a directory", "unable to find user", "is a directory")
"""What runc says where the image or the manifest is wrong, so that no other node does better."""


class Idle:
    """What nobody needed at two looks in a row. One is not enough: this node's state may be a
    moment behind the leader's orders, and what was just ordered looks like what is left over."""

    def __init__(self) -> None:
        self._before: set[str] = set()

    def take(self, unneeded: set[str]) -> list[str]:
        """Of what is unneeded now, what was so at the last look too."""
        both = sorted(unneeded & self._before)
        self._before = unneeded
        return both


class NodeRuntime:
    """Containers of one node. `folder` holds what is mounted into them; `cgroups` begins their
    cgroup paths, such as `/mill-ab12cd34`."""

    def __init__(
        self, client: Containerd, layout: network.Layout, logs: LogStore, folder: Path,
        cgroups: str, cluster_key: bytes,
    ) -> None:
        self._client = client
        self._layout = layout
        self._logs = logs
        self._folder = folder
        self._cgroups = cgroups
        self._key = cluster_key
        self._oom: set[str] = set()
        self._idle_logs, self._idle_images = Idle(), Idle()

    async def watch(self) -> None:
        """Remember who was killed for memory; run it beside everything else."""
        while True:
            try:
                async for event in events(self._client):
                    if isinstance(event, OutOfMemory):
                        self._oom.add(event.id)
            except RuntimeFailed as error:
                log.warning("containerd_away", reason=error.what)
            await asyncio.sleep(OOM_PATIENCE_S)

    # -- for the supervisor ------------------------------------------------------------------

    async def start(self, order: Start) -> None:
        """Image, network, logs, container; an earlier incarnation ends first."""
        try:
            if order.restarts:
                await containers.stop(self._client, order.alloc, order.stop_timeout_ms / 1000)
            image, netns, fifos = await asyncio.gather(
                pull(self._client, order.image, order.digest, self._clear(order.auth),
                     lambda *_: None),
                network.ensure_container(self._layout, order.alloc, order.address),
                self._logs.attach(order.alloc),
            )
            self._oom.discard(order.alloc)
            await containers.create_and_start(self._client, ContainerSpec(
                id=order.alloc, image=image, cgroup=f"{self._cgroups}/{order.alloc}",
                stdout=fifos[0], stderr=fifos[1], entrypoint=order.entrypoint,
                command=order.command, env=self._env(order), user=order.user or None,
                workdir=order.workdir or None, hostname=order.alloc,
                read_only=order.read_only,
                tmpfs=tuple(Tmpfs(path, TMPFS_BYTES) for path in order.tmpfs),
                binds=self._files(order), cpu_milli=order.cpu_milli,
                memory_bytes=order.memory_bytes, netns=netns,
                labels={"mill.service": order.service},
            ))
        except PullFailed as error:
            raise StartFailed(error.what, node_fault=False) from error
        except Unprocessable as error:
            raise StartFailed(str(error), node_fault=False) from error
        except (MillError, OSError) as error:
            what = str(error)
            ours = not any(words in what.lower() for words in VERSIONS_FAULT)
            raise StartFailed(what, node_fault=ours) from error

    async def wait(self, alloc: str) -> Exit:
        """Until it has ended; what is gone has ended as killed."""
        try:
            code = (await wait(self._client, alloc)).code
        except Absent:
            code = KILLED
        if code != KILLED:
            return Exit(code, oom=False)
        if alloc not in self._oom and not oom_kills(f"{self._cgroups}/{alloc}"):
            await asyncio.sleep(OOM_PATIENCE_S)
        return Exit(code, oom=alloc in self._oom or oom_kills(f"{self._cgroups}/{alloc}") > 0)

    async def stop(self, alloc: str, grace_s: float) -> None:
        """Nothing of it is left but its log, which stays as long as its record."""
        await containers.remove(self._client, alloc, grace_s)
        await self._logs.detach(alloc)
        await network.remove_container(self._layout, alloc)
        shutil.rmtree(self._folder / alloc, ignore_errors=True)
        self._oom.discard(alloc)

    async def found(self) -> list[Found]:
        """What is here from before; half-made things are swept, and logs are read again."""
        await containers.sweep(self._client)
        states = await containers.list_all(self._client)
        for state in states:
            await self._logs.attach(state.id)
        alive = {state.id for state in states}
        for alloc in await network.list_containers(self._layout):
            if alloc not in alive:
                await network.remove_container(self._layout, alloc)
        return [Found(state.id, state.status in ("running", "paused")) for state in states]

    def target(self, order: Start) -> Target:
        """Probes leave from this node's namespace."""

        async def make_socket() -> socket.socket:
            made = await asyncio.to_thread(
                socket_in, self._layout.node_path, socket.AF_INET, socket.SOCK_STREAM)
            made.setblocking(False)
            return made

        async def run(argv: tuple[str, ...], timeout_s: float) -> int:
            try:
                code = await exec_probe(self._client, order.alloc, argv, timeout_s)
            except RuntimeFailed as error:
                raise OSError(error.what) from error
            if code is None:
                raise TimeoutError
            return code

        return Target(order.address, order.port, make_socket, run)

    async def tail(self, alloc: str, lines: int) -> tuple[str, ...]:
        """The last lines of both streams, in the order they were read."""
        return tuple(line.line for line in await self._logs.tail(alloc, lines))

    # -- for the door ------------------------------------------------------------------------

    async def present(self) -> tuple[tuple[str, str], ...]:
        """(image, digest) of all that is unpacked here."""
        return tuple((i.image, i.digest) for i in await list_images(self._client))

    async def pull(self, order: Pull, tell: Callable[[PullReport], None]) -> None:
        """Have the image, telling bytes as they come."""
        image, digest = order.image, order.digest
        loop = asyncio.get_running_loop()
        told = loop.time() - PROGRESS_S

        def progress(received: int, total: int | None) -> None:
            nonlocal told
            if loop.time() - told >= PROGRESS_S:
                told = loop.time()
                tell(PullReport(image=image, digest=digest, state="pulling",
                                received_bytes=received,
                                total_bytes=total if total is not None else -1))

        try:
            had = await pull(self._client, image, digest, self._clear(order.auth), progress)
        except PullFailed as error:
            tell(PullReport(image=image, digest=digest, state="failed", error=error.reason,
                            final=error.final))
        except (MillError, OSError) as error:
            tell(PullReport(image=image, digest=digest, state="failed", error=str(error)))
        else:
            tell(PullReport(image=image, digest=digest, state="done", cached=had.cached))

    async def read(self, request: LogRequest) -> AsyncIterator[LogLine]:
        """An allocation's lines: the last ones, then as they come."""
        last = ""
        for line in await self._logs.tail(request.alloc, request.tail):
            last = line.ts
            yield _line(line.ts, line.stream, line.line)
        if request.follow:
            async for line in self._logs.follow(request.alloc, last):
                yield _line(line.ts, line.stream, line.line)

    async def tidy(self, keep_logs: set[str], keep_images: set[str]) -> None:
        """Drop logs of allocations that the log has forgotten, and images (by digest) that no
        kept revision needs."""
        for folder in self._idle_logs.take(set(self._logs.folders()) - keep_logs):
            await self._logs.remove(folder)
        there = await list_images(self._client)
        idle = self._idle_images.take({i.digest for i in there} - keep_images)
        for image in there:
            if image.digest in idle:
                await remove_image(self._client, image.image, image.digest)

    # -- pieces ------------------------------------------------------------------------------

    def _clear(self, auth: Sealed | None) -> str | None:
        return unseal(self._key, auth.nonce, auth.name, auth.sealed) if auth else None

    def _env(self, order: Start) -> tuple[str, ...]:
        return tuple(
            f"{variable.key}={''.join(self._piece(p) for p in variable.value)}"
            for variable in order.env
        )

    def _piece(self, piece: Piece) -> str:
        if isinstance(piece, Plain):
            return piece.text
        return unseal(self._key, piece.nonce, piece.name, piece.sealed)

    def _files(self, order: Start) -> tuple[Bind, ...]:
        """Name resolution by the node's own DNS, written in place before each start."""
        folder = self._folder / order.alloc
        self._folder.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        resolv = f"nameserver {self._layout.gateway}\noptions timeout:2 attempts:3\n"
        hosts = f"127.0.0.1 localhost\n::1 localhost\n{order.address} {order.alloc}\n"
        binds = []
        for name, text in (("resolv.conf", resolv), ("hosts", hosts)):
            (folder / name).write_text(text)
            binds.append(Bind(str(folder / name), f"/etc/{name}"))
        return tuple(binds)


def _line(ts: str, stream: str, line: str) -> LogLine:
    return LogLine(ts=ts, stream="stderr" if stream == "stderr" else "stdout", line=line)
