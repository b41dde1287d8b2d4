"""Small real HTTP/1.1 servers and clients, as raw as the tests need them."""

from __future__ import annotations

import asyncio
import itertools
import json
import os

_HOSTS = itertools.count(2)


def next_address() -> str:
    """A loopback address that no other test and no other run beside this one uses."""
    number = next(_HOSTS)
    return f"127.{80 + os.getpid() % 100}.{os.getpid() // 100 % 250}.{number % 250 + 1}"


class Backend:
    """Answers every request with what it saw, as JSON; `/reset` cuts the connection instead;
    a WebSocket upgrade is taken and its bytes are sent back."""

    def __init__(self, name: str, delay_s: float = 0.0) -> None:
        self.name = name
        self.delay_s = delay_s
        self.address = next_address()
        self.port = 0
        self.served = 0
        self.resets = 0
        self.last_at = 0.0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, port: int = 0) -> Backend:
        self._server = await asyncio.start_server(self._connection, self.address, port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def kill(self) -> None:
        """As SIGKILL would: everything open is reset."""
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _connection(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._writers.add(writer)
        try:
            while await self._request(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *rows = head.strip().split("\r\n")
        method, path, _ = line.split(" ")
        headers = {k.strip().lower(): v.strip() for k, _, v in (r.partition(":") for r in rows)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        if headers.get("upgrade") == "websocket":
            writer.write(b"HTTP/1.1 101 Switching\r\nupgrade: websocket\r\n"
                         b"connection: Upgrade\r\n\r\n")
            while data := await reader.read(1000):
                writer.write(data)
            return False
        if path.startswith("/reset"):
            self.resets += 1
            writer.transport.abort()
            return False
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        self.served += 1
        self.last_at = asyncio.get_running_loop().time()
        answer = json.dumps({
            "name": self.name, "method": method, "path": path, "headers": headers,
            "body": body.decode(),
        }).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(answer), answer))
        await writer.drain()
        return True


class Client:
    """One kept connection. `ask` returns the status and who answered."""

    def __init__(self, address: str, port: int, host: str) -> None:
        self._address, self._port, self._host = address, port, host
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str = "GET", path: str = "/") -> tuple[int, str]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._address, self._port)
        reader, writer = self._streams
        body = "hello" if method == "POST" else ""
        writer.write(
            f"{method} {path} HTTP/1.1\r\nhost: {self._host}\r\n"
            f"content-length: {len(body)}\r\n\r\n{body}".encode()
        )
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        answer = await reader.readexactly(length)
        if b"connection: close" in head:
            self.close()
        status = int(head[9:12])
        return status, json.loads(answer)["name"] if status == 200 else answer.decode()

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
