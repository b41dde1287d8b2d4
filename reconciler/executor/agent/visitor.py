"""One connection through the door: a stranger in its handshake, then a guest whose bytes pass.

TLS is done here over two memory buffers, because asyncio's own takes a quarter of a MiB for each
connection before the first byte of it has come, which a flood would have for nothing.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Mapping
from typing import Protocol, cast

HANDSHAKE_S = 5.0
"""From the first packet to a name."""
LINGER_S = 1.0
"""For the last bytes to a peer that does not read."""
PIECE_BYTES = 64 << 10
HEAD_BYTES = 5
HANDSHAKE_RECORD = 22
"""TLSPlaintext.type (RFC 8446, section 5.1): a client begins with one of these."""
MAX_RECORD_BYTES = 16 << 10


class NotTls(Exception):
    """What a peer began with is not the hello of a TLS client."""


class Doorkeeper(Protocol):
    """Whom a visitor tells how it goes."""

    def recognized(self, visitor: Visitor) -> None:
        """It has shown a certificate of the CA."""
        ...

    def refused(self, visitor: Visitor, why: str) -> None:
        """It is gone. Of one that was recognized, or told of before, nobody needs to know."""
        ...


class Visitor(asyncio.Protocol):
    """The outer side. `source` is its IP, `name` what its certificate says, once it has."""

    def __init__(self, keeper: Doorkeeper, tls: ssl.SSLContext, source: str) -> None:
        self.source = source
        self.name = ""
        self._keeper = keeper
        self._context = tls
        self._tls: ssl.SSLObject | None = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._hello = bytearray()
        self._transport: asyncio.Transport | None = None
        self._passage: Passage | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._left = False

    @property
    def greeted(self) -> bool:
        """It has sent the whole hello of a TLS client."""
        return self._tls is not None

    def leave(self) -> None:
        """Close at once."""
        self._left = True
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio has the socket."""
        self._transport = cast("asyncio.Transport", transport)
        if self._left:
            self._transport.abort()
            return
        self._deadline = asyncio.get_running_loop().call_later(
            HANDSHAKE_S, self._refuse, f"no handshake within {HANDSHAKE_S:g} s")

    def data_received(self, data: bytes) -> None:
        """Bytes of TLS, or of what is none."""
        if self._left:
            return
        try:
            if self._tls is None:
                self._hello += data
                if not _whole(self._hello):
                    return
                data = bytes(self._hello)
                self._tls = self._context.wrap_bio(
                    self._incoming, self._outgoing, server_side=True)
            self._incoming.write(data)
            if not self.name:
                self._shake_hands(self._tls)
            if self._passage is not None:
                self._read(self._tls, self._passage)
        except NotTls as error:
            self._refuse(str(error))
        except ssl.SSLError as error:
            self._flush()  # the alert that says why
            self._refuse(error.reason or str(error))

    def eof_received(self) -> None:
        """The other side has said all: so have we."""

    def connection_lost(self, _error: Exception | None) -> None:
        """The end of it."""
        self._left = True
        if self._deadline is not None:
            self._deadline.cancel()
        self._keeper.refused(self, "it went away")
        if self._passage is not None:
            self._passage.close()

    def pause_writing(self) -> None:
        """The peer reads slower than the server writes."""
        if self._passage is not None:
            self._passage.pause(True)

    def resume_writing(self) -> None:
        """It has caught up."""
        if self._passage is not None:
            self._passage.pause(False)

    # The inner side.

    def attach(self, passage: Passage) -> bool:
        """There is a way in: what waits goes through. False where the visitor has left."""
        if self._left:
            return False
        assert self._transport is not None
        assert self._tls is not None
        self._passage = passage
        self._transport.resume_reading()
        self.data_received(b"")
        return True

    def write(self, data: bytes) -> None:
        """To the peer."""
        if self._tls is not None and not self._left:
            rest = memoryview(data)
            try:
                while rest:  # a record at a time
                    rest = rest[self._tls.write(rest) :]
            except ssl.SSLError as error:
                self._refuse(str(error))
            self._flush()

    def pause(self, paused: bool) -> None:
        """Read no more of the peer until the server has."""
        if self._transport is not None and not self._left:
            if paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def close(self) -> None:
        """Close once the last bytes are out."""
        if self._transport is not None and not self._left:
            self._left = True
            self._transport.close()
            asyncio.get_running_loop().call_later(LINGER_S, self._transport.abort)

    def _shake_hands(self, tls: ssl.SSLObject) -> None:
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        self._flush()
        self.name = name_in(tls.getpeercert())
        if not self.name:
            self._refuse("a certificate without a name")
            return
        assert self._transport is not None
        assert self._deadline is not None
        self._deadline.cancel()
        self._transport.pause_reading()  # until there is a way in
        self._keeper.recognized(self)

    def _read(self, tls: ssl.SSLObject, passage: Passage) -> None:
        try:
            while piece := tls.read(PIECE_BYTES):
                passage.write(piece)
        except ssl.SSLWantReadError:
            self._flush()
        except ssl.SSLZeroReturnError:
            self.close()

    def _flush(self) -> None:
        if self._transport is not None and self._outgoing.pending:
            self._transport.write(self._outgoing.read())

    def _refuse(self, why: str) -> None:
        if not self._left:
            self._keeper.refused(self, why)
            self.close()


class Passage(asyncio.Protocol):
    """The inner side: a connection to the server behind, for one guest. `ended` is called once."""

    def __init__(self, visitor: Visitor, ended: Callable[[], object]) -> None:
        self._visitor = visitor
        self._ended = ended
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio has the socket."""
        self._transport = cast("asyncio.Transport", transport)
        if not self._visitor.attach(self):
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """The server speaks."""
        self._visitor.write(data)

    def connection_lost(self, _error: Exception | None) -> None:
        """The end of it, for both sides."""
        self._ended()
        self._visitor.close()

    def pause_writing(self) -> None:
        """The server reads slower than the peer writes."""
        self._visitor.pause(True)

    def resume_writing(self) -> None:
        """It has caught up."""
        self._visitor.pause(False)

    def write(self, data: bytes) -> None:
        """To the server."""
        if self._transport is not None:
            self._transport.write(data)

    def pause(self, paused: bool) -> None:
        """Take no more of the server until the peer has read."""
        if self._transport is not None:
            if paused:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def close(self) -> None:
        """The peer is gone."""
        if self._transport is not None:
            self._transport.abort()


def name_in(certificate: Mapping[str, object] | None) -> str:
    """The common name of a verified certificate, as `ssl` tells it; "" where it has none."""
    subject = cast("tuple[tuple[tuple[str, str], ...], ...]",
                   (certificate or {}).get("subject", ()))
    for part in subject:
        for key, value in part:
            if key == "commonName":
                return value
    return ""


def _whole(hello: bytearray) -> bool:
    """Whether the first record is there; NotTls where it is none."""
    if hello and hello[0] != HANDSHAKE_RECORD:
        raise NotTls("this is not TLS")
    if len(hello) < HEAD_BYTES:
        return False
    length = int.from_bytes(hello[3:5], "big")
    if length > MAX_RECORD_BYTES:
        raise NotTls(f"a first record of {length} bytes")
    return len(hello) >= HEAD_BYTES + length
