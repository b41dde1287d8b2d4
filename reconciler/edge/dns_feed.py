"""The node's door to its DNS process: start it, feed it every new zone, notice that it took it."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

import reconciler
from reconciler.edge import dnsserver
from reconciler.edge.dns import Zone
from reconciler.edge.dnsserver import Ack, Config, Hello, Listener, NotBound, Publish, Stop
from reconciler.errors import MillError, Unavailable

__all__ = ["DnsFailed", "DnsNotBound", "DnsProcess", "DnsSilent", "Listener"]

START_DEADLINE_S = 20.0  # a cold interpreter on a busy machine
ANSWER_DEADLINE_S = 5.0
RETRY_S, RETRY_MOST_S = 0.05, 2.0

log = structlog.get_logger("mill.dns")
_LOST = (OSError, ValueError, asyncio.IncompleteReadError, msgspec.MsgspecError)
_Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class DnsFailed(MillError):
    """The DNS process does not start or does not answer; `at` is its folder."""


class DnsNotBound(DnsFailed):
    """A listener's address cannot be bound; `at` is the address."""


class DnsSilent(Unavailable):
    """The newest zone is not acknowledged yet; it will be delivered when the process is back."""


class DnsProcess:
    """The DNS process of one node, which keeps its sockets' files in `folder`.

    Once `ensure_running` has succeeded, a task of this object brings the process back when it dies
    and gives it the newest zone; `close` ends that task and leaves the process running.
    """

    def __init__(
        self, folder: Path, listeners: tuple[Listener, ...], upstreams: tuple[str, ...] = ()
    ) -> None:
        self._folder = folder.absolute()
        self._listeners = listeners
        self._upstreams = upstreams
        self._connecting = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self._served = ""  # the fingerprint of what the keeper feeds
        self._changed = asyncio.Condition()
        self._newest: Publish | None = None
        self._published = 0  # counts the zones given to us
        self._acked = 0  # the count of the newest that the process took

    async def ensure_running(self) -> None:
        """The process runs with these listeners; one with others, or in a former namespace, ends.

        Errors: DnsNotBound with address and reason; DnsFailed.
        """
        async with self._connecting:
            fingerprint = await asyncio.to_thread(self._fingerprint)
            if self._keeper is not None and fingerprint == self._served:
                return
            await self._end_keeper()
            connection = await self._connected()
            self._served = fingerprint
            self._keeper = asyncio.create_task(self._keep(connection), name="dns-feed")

    async def publish(
        self, index: int, zone: Zone, *, timeout_s: float = ANSWER_DEADLINE_S
    ) -> None:
        """Return once `zone`, or a newer one, is what the process answers from.

        Errors: DnsSilent after `timeout_s`; the newest zone goes out all the same when it can.
        """
        async with self._changed:
            if self._newest is None or index >= self._newest.index:
                self._newest = Publish(index, zone)
                self._published += 1
                self._changed.notify_all()
            mine = self._published
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait_for(lambda: self._acked >= mine)
            except TimeoutError as error:
                raise DnsSilent(
                    f"the DNS process did not take the names of index {index} in {timeout_s} s",
                    at=str(self._folder),
                ) from error

    async def close(self) -> None:
        """Stop feeding; the process goes on answering from the last zone."""
        async with self._connecting:
            await self._end_keeper()

    async def stop(self) -> None:
        """End the process and wait until it is gone; not running is fine."""
        await self.close()
        with suppress(OSError, asyncio.IncompleteReadError):
            _, writer = await self._dial()
            await self._end(writer)

    async def _end_keeper(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait([keeper])

    async def _keep(self, connection: _Connection) -> None:
        wait_s = RETRY_S
        while True:
            try:
                await self._feed(*connection)
            except* _LOST as group:
                log.warning("dns_process_gone", reason=str(group.exceptions[0]))
            finally:
                connection[1].close()
            while True:
                await asyncio.sleep(wait_s)
                try:
                    connection = await self._connected()
                except (DnsFailed, OSError) as error:
                    wait_s = min(wait_s * 2, RETRY_MOST_S)
                    log.warning("dns_process_not_started", reason=str(error))
                else:
                    wait_s = RETRY_S
                    break

    async def _feed(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent: deque[int] = deque()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send(writer, sent))
            group.create_task(self._take_acks(reader, sent))

    async def _send(self, writer: asyncio.StreamWriter, sent: deque[int]) -> None:
        last = 0
        while True:
            async with self._changed:
                while self._published == last:
                    await self._changed.wait()
                last, newest = self._published, self._newest
            assert newest is not None
            sent.append(last)
            writer.write(dnsserver.framed(newest))
            await writer.drain()

    async def _take_acks(self, reader: asyncio.StreamReader, sent: deque[int]) -> None:
        while True:
            msgspec.msgpack.decode(await dnsserver.read_frame(reader), type=Ack)
            async with self._changed:
                self._acked = sent.popleft()
                self._changed.notify_all()

    async def _connected(self) -> _Connection:
        """A connection to a process with our fingerprint; starts it where there is none."""
        fingerprint = await asyncio.to_thread(self._fingerprint)
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            try:
                reader, writer = await self._dial()
                async with asyncio.timeout(ANSWER_DEADLINE_S):
                    hello = msgspec.msgpack.decode(await dnsserver.read_frame(reader), type=Hello)
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                await self._start(fingerprint)
                await asyncio.sleep(RETRY_S)
                continue
            if hello.fingerprint == fingerprint:
                return reader, writer
            await self._end(writer)
        raise DnsFailed("the DNS process does not answer", at=str(self._folder))

    def _fingerprint(self) -> str:
        """Of the configuration and the namespaces: in one made anew the sockets are missing."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(msgspec.json.encode((self._listeners, self._upstreams)))
        for listener in self._listeners:
            with suppress(OSError):
                digest.update(str(os.stat(listener.netns or "/proc/self/ns/net").st_ino).encode())
        return digest.hexdigest()

    async def _dial(self) -> _Connection:
        home = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Through /proc/self/fd: a unix socket's path may not be longer than 107 bytes.
            path = f"/proc/self/fd/{home}/{dnsserver.CONTROL}"
            return await asyncio.open_unix_connection(path)
        finally:
            os.close(home)

    async def _end(self, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            writer.write(dnsserver.framed(Stop()))
            await writer.drain()
        await asyncio.to_thread(_wait_until_gone, self._folder / dnsserver.LOCK)
        writer.close()

    async def _start(self, fingerprint: str) -> None:
        root = Path(reconciler.__file__).parents[1]
        path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
        config = Config(str(self._folder), fingerprint, self._listeners, self._upstreams)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            dnsserver.__name__,
            env={**os.environ, "PYTHONPATH": path},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(START_DEADLINE_S):
                _, told = await process.communicate(msgspec.json.encode(config))
        except TimeoutError as error:
            process.kill()
            await process.wait()
            raise DnsFailed("the DNS process does not start", at=str(self._folder)) from error
        if process.returncode:
            raise self._refusal(told)

    def _refusal(self, told: bytes) -> DnsFailed:
        try:
            refused = msgspec.json.decode(told, type=NotBound)
        except msgspec.MsgspecError:
            why = told.decode(errors="replace").strip().splitlines() or ["no reason given"]
            return DnsFailed(f"the DNS process does not start: {why[-1]}", at=str(self._folder))
        listener = refused.listener
        inside = f" in {listener.netns}" if listener.netns else ""
        return DnsNotBound(
            f"DNS cannot listen there: {refused.reason}",
            at=f"{listener.address}:{listener.port}{inside}",
            hint="find who holds the port with `ss -lunpt`, or choose another",
        )


def _wait_until_gone(lock: Path) -> None:
    """Its lock goes with the process."""
    file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + ANSWER_DEADLINE_S
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise DnsFailed("the DNS process does not end", at=str(lock)) from error
                time.sleep(RETRY_S)
    finally:
        os.close(file)
