"""A client on a machine of the lab: HTTP/1.1 to that machine's own node, one connection.

It reaches a node that is cut off from all others, as somebody does who sits before it. What a
failure means is said by its type: only what was never sent is known not to have happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from dataclasses import dataclass

import h11
import msgspec

from reconciler.executor.containerd.network_namespace import socket_in


class NotSent(Exception):
    """No connection was made: nothing was asked."""


class NoAnswer(Exception):
    """It was asked, and no whole answer came."""


@dataclass(frozen=True)
class Address:
    """Where a node's API answers; `tls` None is plain HTTP."""

    netns: str
    host: str
    port: int
    token: str
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True)
class Answer:
    """A whole answer; `body` is its JSON."""

    status: int
    body: dict[str, object]


class Door:
    """One keep-alive connection, dialled again where it is gone. One request at a time."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._http = h11.Connection(h11.CLIENT)

    async def call(
        self, method: str, path: str, body: object = None, timeout_s: float = 5.0
    ) -> Answer:
        """Ask; NotSent or NoAnswer, within about `timeout_s` (once for dialling, once for all)."""
        content = b"" if body is None else msgspec.json.encode(body)
        reader, writer = await self._dialled(timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                writer.write(self._request(method, path, content))
                await writer.drain()
                return await self._answer(reader)
        except (OSError, TimeoutError, h11.ProtocolError, ssl.SSLError) as error:
            self.close()
            raise NoAnswer(f"{type(error).__name__}: {error}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    async def _dialled(self, timeout_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is not None and self._streams[0].at_eof():
            self.close()
        if self._streams is None:
            self._http = h11.Connection(h11.CLIENT)
            at = self._address
            sock = await asyncio.to_thread(
                socket_in, at.netns, socket.AF_INET, socket.SOCK_STREAM)
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                async with asyncio.timeout(timeout_s):
                    loop = asyncio.get_running_loop()
                    await loop.sock_connect(sock, (at.host, at.port))
                    self._streams = await asyncio.open_connection(
                        sock=sock, ssl=at.tls, server_hostname=at.host if at.tls else None)
            except (OSError, TimeoutError, ssl.SSLError) as error:
                sock.close()
                raise NotSent(f"{type(error).__name__}: {error}") from error
        return self._streams

    def _request(self, method: str, path: str, content: bytes) -> bytes:
        at = self._address
        headers = [("host", f"{at.host}:{at.port}"), ("authorization", f"Bearer {at.token}"),
                   ("content-length", str(len(content)))]
        if content:
            headers.append(("content-type", "application/json"))
        head = self._http.send(h11.Request(method=method, target=path, headers=headers))
        body = self._http.send(h11.Data(content))
        end = self._http.send(h11.EndOfMessage())
        return (head or b"") + (body or b"") + (end or b"")

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        status, content = 0, bytearray()
        while True:
            event = self._http.next_event()
            match event:
                case h11.NEED_DATA:
                    self._http.receive_data(await reader.read(65536))
                case h11.Response():
                    status = event.status_code
                case h11.Data():
                    content += event.data
                case h11.EndOfMessage():
                    break
                case _:
                    raise h11.RemoteProtocolError(f"{event!r} in the middle of an answer")
        if self._http.their_state is h11.MUST_CLOSE or self._http.our_state is h11.MUST_CLOSE:
            self.close()
        else:
            self._http.start_next_cycle()
        body: dict[str, object] = {}
        with contextlib.suppress(msgspec.DecodeError):
            body = msgspec.json.decode(bytes(content), type=dict[str, object])
        return Answer(status, body)
