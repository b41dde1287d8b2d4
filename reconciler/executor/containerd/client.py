"""One channel to one containerd, in one of its namespaces: calls, deadlines, leases, errors."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from weakref import WeakValueDictionary

import grpc
from google.protobuf.empty_pb2 import Empty

from reconciler.errors import MillError
from reconciler.executor.containerd import rpc
from reconciler.executor.containerd.generated import leases_pb2, namespaces_pb2
from reconciler.executor.containerd.rpc import Answer, Ask, Method

UNARY_TIMEOUT_S = 20.0
"""A frozen daemon would hang a call for ever; the slowest honest answer seen took under 3 s."""

SLOW_TIMEOUT_S = 120.0
"""For calls that start or remove processes and mounts, or unpack a layer, on a busy disk."""

LEASE_S = 3600
"""A lease left behind by a crash expires after this; no pull or start takes longer."""

MESSAGE_BYTES = 16 << 20
"""Above containerd's own largest answer, the list of all containers with their specs."""

_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.default_authority", "localhost"),
    # gRPC's own backoff leaves a gap of 1 to 3 s after a restart of the daemon.
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    # One connection a client: a shared one would outlive the client that is closed first.
    ("grpc.use_local_subchannel_pool", 1),
]

T = TypeVar("T")
Metadata = tuple[tuple[str, str], ...]


class RuntimeFailed(MillError):
    """The container runtime refused or failed; `what` is its own text."""

    status = 502


class Absent(RuntimeFailed):
    """The container, task, image, snapshot or blob does not exist."""


class AlreadyThere(RuntimeFailed):
    """It exists already."""


class ShimGone(RuntimeFailed):
    """The container's shim died, the container with it; the daemon is about to notice."""


class Silent(RuntimeFailed):
    """The daemon is down or did not answer in time: whether it acted is open; look again."""

    status = 503


class Containerd:
    """A client of the daemon at `socket`, in `namespace`; `runc_root` holds runc's own records.

    Two daemons of a host would share runc's default root, so each instance brings its own.
    Close it with `close`, or use it as `async with`.
    """

    snapshotter = "overlayfs"

    def __init__(self, socket: Path, namespace: str, *, runc_root: Path) -> None:
        self.socket = socket
        self.namespace = namespace
        self.runc_root = runc_root
        self._metadata: Metadata = (("containerd-namespace", namespace),)
        self._channel = grpc.aio.insecure_channel(f"unix:{socket}", options=_OPTIONS)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.shared: dict[str, asyncio.Future[Any]] = {}
        """Waits that several callers share, by container id (`watch`)."""
        self._ongoing: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Containerd:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End what is under way (calls that must not be cut are awaited) and close the channel."""
        for work in self.shared.values():
            work.cancel()
        if self._ongoing:
            await asyncio.wait(self._ongoing, timeout=SLOW_TIMEOUT_S)
        await self._channel.close()

    async def version(self) -> str:
        """The daemon's version; any answer means that it serves."""
        return (await self.call(rpc.VERSION, Empty())).version

    async def ensure_namespace(self) -> None:
        """Create the namespace if it is not there."""
        wanted = namespaces_pb2.Namespace(name=self.namespace)
        ask = namespaces_pb2.CreateNamespaceRequest(namespace=wanted)
        with contextlib.suppress(AlreadyThere):
            await self.call(rpc.NAMESPACE_CREATE, ask)

    async def remove_namespace(self) -> None:
        """Delete the namespace; it has to be empty."""
        ask = namespaces_pb2.DeleteNamespaceRequest(name=self.namespace)
        with contextlib.suppress(Absent):
            await self.call(rpc.NAMESPACE_DELETE, ask)

    async def call(
        self,
        method: Method[Ask, Answer],
        ask: Ask,
        *,
        lease: str = "",
        timeout_s: float | None = UNARY_TIMEOUT_S,
    ) -> Answer:
        """Ask once and await the one answer; `timeout_s=None` waits for ever (Wait alone may).

        A daemon that is down is waited for within the time: most often it restarts.
        """
        bound: grpc.aio.UnaryUnaryMultiCallable[Ask, Answer] = self._channel.unary_unary(
            method.path,
            request_serializer=method.ask.SerializeToString,
            response_deserializer=method.answer.FromString,
        )
        try:
            return await bound(
                ask, metadata=self._headers(lease), timeout=timeout_s, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            raise_own(error, method)

    async def call_uncut(self, method: Method[Ask, Answer], ask: Ask, *, lease: str = "") -> Answer:
        """`call`, which goes on to its end when the caller is cancelled.

        containerd loses track of a task whose Create or Delete was cut short: its shim and mount
        stay, unlisted, until the daemon happens to clean up.
        """
        return await self.finish(self.call(method, ask, lease=lease, timeout_s=SLOW_TIMEOUT_S))

    async def finish(self, steps: Coroutine[Any, Any, T]) -> T:
        """Await steps that, once begun, go on to their end when the caller is cancelled."""
        work = asyncio.ensure_future(steps)
        self._ongoing.add(work)
        work.add_done_callback(self._ended)
        return await asyncio.shield(work)

    async def stream(self, method: Method[Ask, Answer], ask: Ask) -> AsyncGenerator[Answer, None]:
        """Ask once; yield every answer until the daemon ends the stream."""
        bound: grpc.aio.UnaryStreamMultiCallable[Ask, Answer] = self._channel.unary_stream(
            method.path,
            request_serializer=method.ask.SerializeToString,
            response_deserializer=method.answer.FromString,
        )
        calling = bound(ask, metadata=self._headers(""), wait_for_ready=True)
        try:
            async for answer in calling:
                yield answer
        except grpc.aio.AioRpcError as error:
            raise_own(error, method)
        finally:
            calling.cancel()

    def duplex(
        self, method: Method[Ask, Answer], *, lease: str = ""
    ) -> grpc.aio.StreamStreamCall[Ask, Answer]:
        """Open a stream both ways; the caller cancels it and translates errors (`raise_own`)."""
        bound: grpc.aio.StreamStreamMultiCallable[Ask, Answer] = self._channel.stream_stream(
            method.path,
            request_serializer=method.ask.SerializeToString,
            response_deserializer=method.answer.FromString,
        )
        return bound(metadata=self._headers(lease), wait_for_ready=True)

    def lock(self, name: str) -> asyncio.Lock:
        """The lock of that name: one writer at a time for a blob, one pull for an image."""
        return self._locks.setdefault(name, asyncio.Lock())

    @contextlib.asynccontextmanager
    async def lease(self, what: str) -> AsyncIterator[str]:
        """Keep what is made under this lease's id from collection until the block ends."""
        expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + LEASE_S))
        lease = f"{what}-{secrets.token_hex(6)}"
        labels = {"containerd.io/gc.expire": expires}
        await self.call(rpc.LEASE_CREATE, leases_pb2.CreateRequest(id=lease, labels=labels))
        try:
            yield lease
        finally:
            with contextlib.suppress(Absent):
                await self.call_uncut(rpc.LEASE_DELETE, leases_pb2.DeleteRequest(id=lease))

    def _headers(self, lease: str) -> Metadata:
        return (*self._metadata, ("containerd-lease", lease)) if lease else self._metadata

    def _ended(self, work: asyncio.Task[Any]) -> None:
        self._ongoing.discard(work)
        if not work.cancelled():
            work.exception()  # read, so that asyncio does not log what a cancelled caller left


def raise_own(error: grpc.aio.AioRpcError, method: Method[Ask, Answer]) -> NoReturn:
    """Raise containerd's refusal as one of this module's errors."""
    what = error.details() or error.code().name
    match error.code():
        case grpc.StatusCode.NOT_FOUND:
            raise Absent(what, at=method.path) from error
        case grpc.StatusCode.ALREADY_EXISTS:
            raise AlreadyThere(what, at=method.path) from error
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
            hint = "is containerd running? its log says why not"
            raise Silent(what, at=method.path, hint=hint) from error
        case _ if "ttrpc: closed" in what:
            raise ShimGone(what, at=method.path) from error
        case _:
            raise RuntimeFailed(what, at=method.path) from error
