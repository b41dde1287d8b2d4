"""Closed loops, and the two clients that drive them over bare sockets.

No client library stands in the way of either side: HTTP/1.1 on kept connections for mill, one
connection of HTTP/2 with gRPC's framing for etcd. Python's own gRPC gets half as much out of etcd.
"""

from __future__ import annotations

import asyncio
import itertools
import struct
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypedDict

from bench.etcd_generated import kv_pb2

VALUE_BYTES = 200
TOKEN = "mill-bench-token"  # of a cluster that lives as long as its bench


class Figures(TypedDict):
    """What one closed loop measured."""

    per_s: float
    p50_ms: float
    p99_ms: float


Once = Callable[[], Awaitable[object]]


async def closed_loop(callers: Sequence[Once], seconds: float) -> Figures:
    """Each caller asks again as soon as it is answered."""
    took: list[float] = []
    began = time.perf_counter()

    async def call(once: Once) -> None:
        while (start := time.perf_counter()) - began < seconds:
            await once()
            took.append(time.perf_counter() - start)

    await asyncio.gather(*(call(once) for once in callers))
    elapsed = time.perf_counter() - began
    took.sort()
    return {
        "per_s": len(took) / elapsed,
        "p50_ms": 1e3 * took[len(took) // 2],
        "p99_ms": 1e3 * took[int(len(took) * 0.99)],
    }


class Refused(Exception):
    """The other side answered, but not with what was asked for."""


class _Connection(asyncio.Protocol):
    """Bytes in and out; whoever waits is told when the connection is lost."""

    def __init__(self) -> None:
        self.waiting: dict[int, asyncio.Future[bytes]] = {}
        self._held = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        for each in self.waiting.values():
            if not each.done():
                each.set_exception(ConnectionError("the connection is lost"))

    def ask(self, number: int, request: bytes) -> asyncio.Future[bytes]:
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.waiting[number] = answer
        if self.transport.is_closing():
            answer.set_exception(ConnectionError("the connection is lost"))
        else:
            self.transport.write(request)
        return answer

    def answered(self, number: int, body: bytes | None) -> None:
        future = self.waiting.pop(number)
        if future.done():
            return  # whoever asked has given up
        if body is None:
            future.set_exception(Refused(self._held[:300]))
        else:
            future.set_result(body)

    def close(self) -> None:
        self.transport.close()


class Http(_Connection):
    """HTTP/1.1 with one request at a time; anything but a 200 is Refused."""

    def call(self, request: bytes) -> asyncio.Future[bytes]:
        return self.ask(0, request)

    def data_received(self, data: bytes) -> None:
        held = self._held = self._held + data
        head = held.find(b"\r\n\r\n")
        if head < 0:
            return
        at = held.find(b"content-length: ") + 16
        end = head + 4 + int(held[at : held.find(b"\r\n", at)])
        if len(held) < end:
            return
        self.answered(0, held[head + 4 : end] if held.startswith(b"HTTP/1.1 200") else None)
        self._held = held[end:]


def put_secret(name: str) -> bytes:
    """A write as a client sends it: one entry of the log."""
    body = b'{"value":"' + b"v" * VALUE_BYTES + b'"}'
    return (
        f"PUT /v1/secrets/{name} HTTP/1.1\r\nhost: mill\r\nauthorization: Bearer {TOKEN}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


HEALTHZ = b"GET /healthz HTTP/1.1\r\nhost: mill\r\n\r\n"

# HTTP/2 (RFC 9113): frame types and flags that a unary call of gRPC meets.
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM = _ACK = 1
_END_HEADERS = 4
_WINDOW_BYTES = 1 << 30  # so large that no answer ever waits for more
_INITIAL_WINDOW = 4


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: bytes, value: bytes) -> bytes:
    """A header field that enters no table (RFC 7541, 6.2.2), both parts under 127 bytes."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


class Grpc(_Connection):
    """Unary calls over one HTTP/2 connection; an answer without a message is Refused."""

    def __init__(self) -> None:
        super().__init__()
        self._streams = itertools.count(1, 2)
        self._bodies: dict[int, bytes] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        window = struct.pack(">I", _WINDOW_BYTES)
        self.transport.write(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, struct.pack(">H", _INITIAL_WINDOW) + window)
            + _frame(_WINDOW, 0, 0, window)
        )

    def call(self, head: bytes, body: bytes) -> asyncio.Future[bytes]:
        stream = next(self._streams)
        message = b"\0" + struct.pack(">I", len(body)) + body
        return self.ask(
            stream,
            _frame(_HEADERS, _END_HEADERS, stream, head)
            + _frame(_DATA, _END_STREAM, stream, message),
        )

    def data_received(self, data: bytes) -> None:
        held = self._held = self._held + data
        at = 0
        while len(held) - at >= 9:
            length = int.from_bytes(held[at : at + 3], "big")
            if len(held) - at < 9 + length:
                break
            kind, flags = held[at + 3], held[at + 4]
            stream = int.from_bytes(held[at + 5 : at + 9], "big")
            self._take(kind, flags, stream, held[at + 9 : at + 9 + length])
            at += 9 + length
        self._held = held[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _DATA:
            self._bodies[stream] = self._bodies.get(stream, b"") + payload
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self.transport.write(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
        elif kind == _GOAWAY:
            self.transport.close()
        if stream and (kind == _RESET or (kind in (_DATA, _HEADERS) and flags & _END_STREAM)):
            message = self._bodies.pop(stream, None)
            self.answered(stream, message[5:] if message else None)


def _head(method: str) -> bytes:
    """`:method: POST` and `:scheme: http` are entries 3 and 6 of HPACK's static table."""
    return (
        b"\x83\x86" + _literal(b":path", method.encode()) + _literal(b":authority", b"etcd")
        + _literal(b"content-type", b"application/grpc") + _literal(b"te", b"trailers")
    )  # fmt: skip


PUT = _head("/etcdserverpb.KV/Put")
RANGE = _head("/etcdserverpb.KV/Range")
STATUS = _head("/etcdserverpb.Maintenance/Status")


def put_key(name: str) -> bytes:
    """A write as large as `put_secret`'s value."""
    return kv_pb2.PutRequest(key=name.encode(), value=b"v" * VALUE_BYTES).SerializeToString()


async def http(port: int) -> Http:
    return (await asyncio.get_running_loop().create_connection(Http, "127.0.0.1", port))[1]


async def grpc(port: int) -> Grpc:
    return (await asyncio.get_running_loop().create_connection(Grpc, "127.0.0.1", port))[1]
