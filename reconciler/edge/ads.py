"""The delta ADS server of one node: what is published goes to the node's Envoy, in order.

A thin shell around `delta.DeltaStream`: grpc on a unix socket in a folder that is root's alone.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import msgspec
import structlog
from envoy.service.discovery.v3 import discovery_pb2

from reconciler.edge.delta import DeltaStream, Resources
from reconciler.errors import Conflict

log = structlog.get_logger("mill.ads")

ACK_DEADLINE_S = 5.0
"""How long a publication waits for Envoy; a silent edge is then a warning (contracts.md)."""

MAX_MESSAGE_BYTES = 64 << 20
"""One RouteConfiguration carries all hosts: 5000 of them take about 4 MB."""

STOP_GRACE_S = 0.2

_SERVICE = "envoy.service.discovery.v3.AggregatedDiscoveryService"


class Publication(msgspec.Struct, frozen=True):
    """What came of a publication. `nacks` are Envoy's own words; it keeps the last good object.

    `acked`: Envoy has taken all of this, or of something newer, within the deadline.
    """

    index: int
    acked: bool
    nacks: tuple[str, ...] = ()
    connected: bool = True

    @property
    def error(self) -> str:
        """Why it is not confirmed, as a person reads it; "" where it is."""
        if self.nacks:
            return "Envoy refused: " + "; ".join(self.nacks)
        if not self.connected:
            return "Envoy is not connected"
        return "" if self.acked else f"Envoy was silent for {ACK_DEADLINE_S:g} s"


class AdsServer:
    """Serves one Envoy. The newest publication wins; older ones that still wait count as done
    when it is taken."""

    def __init__(self) -> None:
        self._wanted: Resources = {}
        self._index = -1
        self._stream: DeltaStream | None = None
        self._outbox: asyncio.Queue[Any | None] = asyncio.Queue()
        self._moved = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._lock: int | None = None
        self._folder: int | None = None

    async def start(self, socket_path: Path, index: int, resources: Resources) -> None:
        """Open the socket. It takes the first resources, since a server that answers before it
        knows them would make Envoy drop every listener.

        Raises Conflict where another process serves this socket.
        """
        self._wanted, self._index = resources, index
        self._take_folder(socket_path)
        server = grpc.aio.server(
            options=[
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ]
        )
        method = grpc.stream_stream_rpc_method_handler(
            self._serve,
            request_deserializer=discovery_pb2.DeltaDiscoveryRequest.FromString,
            response_serializer=discovery_pb2.DeltaDiscoveryResponse.SerializeToString,
        )
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(_SERVICE, {"DeltaAggregatedResources": method}),)
        )
        # A unix socket's path ends at 107 bytes; by way of an open folder any path is short.
        server.add_insecure_port(f"unix:/proc/self/fd/{self._folder}/{socket_path.name}")
        await server.start()
        self._server = server

    async def stop(self) -> None:
        """Close the socket; Envoy goes on with what it has."""
        if self._server is not None:
            self._send(None)
            await self._server.stop(STOP_GRACE_S)
            self._server = None
        for descriptor in (self._lock, self._folder):
            if descriptor is not None:
                os.close(descriptor)
        self._lock = self._folder = None

    @property
    def connected(self) -> bool:
        """Envoy's stream is open."""
        return self._stream is not None

    async def publish(
        self, index: int, resources: Resources, deadline_s: float = ACK_DEADLINE_S
    ) -> Publication:
        """Make `resources` what Envoy should have, and wait until it has them, or has refused.

        Publishing the same again tries what was refused once more.
        """
        if index >= self._index:
            self._wanted, self._index = resources, index
            if self._stream is not None:
                self._stream.want(resources)
                self._advance(self._stream)
        try:
            async with asyncio.timeout(deadline_s):
                stream = await self._settled()
        except TimeoutError:
            nacks = self._stream.refusals if self._stream else ()
            return Publication(index, acked=False, nacks=nacks, connected=self.connected)
        return Publication(index, acked=not stream.refusals, nacks=stream.refusals)

    async def _settled(self) -> DeltaStream:
        while True:
            moved = self._moved
            if self._stream is not None and self._stream.settled:
                return self._stream
            await moved.wait()

    async def _serve(
        self, requests: AsyncIterator[Any], _context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        """One stream. A newer one ends the older: Envoy has given that up."""
        self._send(None)
        stream, outbox = DeltaStream(self._wanted), asyncio.Queue[Any | None]()
        self._stream, self._outbox = stream, outbox
        reader = asyncio.create_task(self._read(requests, stream, outbox))
        try:
            while (response := await outbox.get()) is not None:
                yield response
        finally:
            reader.cancel()
            if self._stream is stream:
                self._stream = None
                self._wake()
            log.info("envoy_disconnected")

    async def _read(
        self, requests: AsyncIterator[Any], stream: DeltaStream, outbox: asyncio.Queue[Any | None]
    ) -> None:
        try:
            async for request in requests:
                if request.HasField("error_detail"):
                    log.warning(
                        "envoy_refused", kind=request.type_url.rpartition(".")[2],
                        reason=request.error_detail.message,
                    )
                stream.receive(request)
                self._advance(stream)
        finally:
            outbox.put_nowait(None)

    def _advance(self, stream: DeltaStream) -> None:
        """Send what may go out; who waits looks again."""
        if stream is not self._stream:
            return
        for response in stream.outgoing():
            self._send(response)
        self._wake()

    def _send(self, response: Any | None) -> None:
        # Bounded by the stream itself: it has at most one response of each type out at a time.
        self._outbox.put_nowait(response)

    def _wake(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()

    def _take_folder(self, socket_path: Path) -> None:
        """Lock first: grpc takes a socket's path over even from a server that lives."""
        folder = socket_path.parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        lock = os.open(folder / f"{socket_path.name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise Conflict(
                "another process serves this node's Envoy", at=str(socket_path),
                hint="stop the other agent of this node first",
            ) from None
        self._lock = lock
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
