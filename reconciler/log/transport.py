"""The log's wire: TLS 1.3 with certificates on both sides, framed msgpack, bounds on all of it.

Of each pair of members the one with the greater name dials. Who speaks is what its
certificate says (a DNS subject alternative name), never what it claims; whoever is not a
member is closed before its first byte is read. Everything here runs in the raft thread.
"""

from __future__ import annotations

import errno
import logging
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable

import msgspec

from reconciler.log import pinned, wire
from reconciler.log.core import Peer, PeerTransport
from reconciler.log.errors import LogFailed
from reconciler.log.poller import ERROR, READ, WRITE, EpollPoller
from reconciler.log.replication import ProtocolBroken
from reconciler.log.settings import Member, Settings

MAX_BUFFERED_BYTES = 16 << 20  # for a peer that does not read; then its connection is closed
ROOM_BYTES = 2 << 20  # up to here bulk may be queued
MAX_STRANGERS = 64  # connections without a finished handshake; the oldest goes first
FULL_S = 0.5  # without a descriptor to spare, so long nobody is accepted
ACCEPTS_PER_EVENT = 16  # so that a flood of connections leaves time for the members
RECEIVES_PER_EVENT = 64  # of up to one TLS record (16 KiB) each
_RECEIVE_BYTES = 64 << 10
_SEND_BYTES = 256 << 10
_LENGTH = struct.Struct("<I")

_log = logging.getLogger(__name__)


class TlsTransport(PeerTransport):
    """The connections of one node."""

    def __init__(self, settings: Settings, poller: EpollPoller) -> None:
        super().__init__()
        self._settings = settings
        self._me, self._timing = settings.me, settings.timing
        self._members: dict[str, Member] = {}
        self.poller = poller
        self.reload_identity()
        self._listener: socket.socket | None = None
        self._accepts_at = float("inf")  # when to listen again
        self._strangers: deque[Connection] = deque()
        self._connected: dict[Peer, Connection] = {}
        self._dialled: dict[str, Connection] = {}
        self._dialled_at: dict[str, float] = {}
        self._unread: set[Connection] = set()  # stopped at RECEIVES_PER_EVENT

    def reload_identity(self) -> None:
        """Read the CA, certificate and key again, for connections from now on; from any thread.

        Raises LogFailed where they cannot be read; then the former ones stay.
        """
        settings = self._settings
        try:
            server = _context(ssl.PROTOCOL_TLS_SERVER, settings)
            client = _context(ssl.PROTOCOL_TLS_CLIENT, settings)
        except OSError as error:  # ssl.SSLError is one
            raise LogFailed(
                f"the node's certificate cannot be used: {error}", at=str(settings.cert_file)
            ) from error
        self.server_tls, self.client_tls = server, client

    def follow(self, members: dict[str, Member]) -> None:
        """Reach these, by name, and let in nobody else; an address may be new."""
        former, self._members = self._members, members
        for name, member in former.items():
            if members.get(name) != member:
                self._dialled_at.pop(name, None)
                if name in self._dialled:
                    self._dialled[name].close("no member, or at another address")
        for peer in [peer for peer in self._connected if peer.id not in members]:
            self._connected[peer].close("no member any more")

    @property
    def ready(self) -> bool:
        """Whether it listens."""
        return self._listener is not None

    def tryGetReady(self) -> None:
        """Listen; raises LogFailed where the address is not to be had."""
        family = socket.AF_INET6 if ":" in self._me.host else socket.AF_INET
        address = (self._me.host, self._me.port)
        try:
            listener = socket.create_server(address, family=family, backlog=128)
        except OSError as error:
            raise LogFailed(
                f"cannot listen: {error.strerror or error}",
                at=f"{self._me.host}:{self._me.port}",
                hint="another process may hold the port; `ss -ltnp` names it",
            ) from error
        listener.setblocking(False)
        self._listener = listener
        self.poller.subscribe(listener.fileno(), self._accept, READ)

    def tick(self) -> None:
        """Dial who is missing, close who is silent, read on where reading was cut short."""
        now = pinned.now()
        if self._listener is not None and self._accepts_at <= now:
            self._accepts_at = float("inf")
            self.poller.subscribe(self._listener.fileno(), self._accept, READ)
        for connection in [*self._strangers, *self._dialled.values(), *self._connected.values()]:
            if now - connection.heard_at > self._timing.silence_s:
                connection.close("silent")
        for name, member in self._members.items():
            due = now - self._dialled_at.get(name, float("-inf")) >= self._timing.redial_s
            if self._me.name > name and name not in self._dialled and due:
                self._dialled_at[name] = now
                self._dial(member)
        unread, self._unread = self._unread, set()
        for connection in sorted(unread, key=lambda each: each.descriptor):
            connection.on_ready(connection.descriptor, READ)

    def transmit(self, peer: Peer, message: wire.Message) -> bool:
        """Queue and send what the socket takes."""
        connection = self._connected.get(peer)
        return connection is not None and connection.send(message)

    def has_room(self, peer: Peer) -> bool:
        """Whether less than ROOM_BYTES wait for this peer."""
        connection = self._connected.get(peer)
        return connection is not None and connection.buffered_bytes < ROOM_BYTES

    def soon(self) -> None:
        """The next poll must not wait."""
        self.poller.soon = True

    def destroy(self) -> None:
        """Close everything."""
        for connection in [*self._strangers, *self._dialled.values(), *self._connected.values()]:
            connection.close("stopping")
        if self._listener is not None:
            self.poller.unsubscribe(self._listener.fileno())
            self._listener.close()
            self._listener = None

    # What connections report.

    def established(self, connection: Connection, names: frozenset[str]) -> None:
        """The handshake is done; `names` is what the certificate says."""
        member = sorted(names & self._members.keys())
        if connection.dialled is not None:
            member = [name for name in member if name == connection.dialled]
        if len(member) != 1:
            raise ProtocolBroken(f"a certificate for {sorted(names)} is not the expected member's")
        peer = Peer(member[0])
        if connection in self._strangers:
            self._strangers.remove(connection)
        former = self._connected.get(peer)
        if former is not None:
            former.close("replaced by a newer connection")
        connection.peer = peer
        self._connected[peer] = connection
        self._onNodeConnected(peer)

    def closed(self, connection: Connection, why: str) -> None:
        """A connection ended."""
        if connection in self._strangers:
            self._strangers.remove(connection)
        if connection.dialled is not None and self._dialled.get(connection.dialled) is connection:
            del self._dialled[connection.dialled]
        self._unread.discard(connection)
        peer = connection.peer
        if peer is not None and self._connected.get(peer) is connection:
            del self._connected[peer]
            _log.info("log_peer_lost peer=%s why=%s", peer.id, why)
            self._onNodeDisconnected(peer)
        elif peer is None:
            _log.debug("log_connection_refused why=%s", why)

    def unread(self, connection: Connection) -> None:
        """More may wait inside TLS, where epoll does not see it."""
        self._unread.add(connection)
        self.soon()

    def _accept(self, _descriptor: int, _mask: int) -> None:
        assert self._listener is not None
        for _ in range(ACCEPTS_PER_EVENT):
            try:
                accepted, _address = self._listener.accept()
            except OSError as error:  # nobody waits, or whoever did is gone
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    # epoll would say at once, and for ever, that somebody waits.
                    self.poller.unsubscribe(self._listener.fileno())
                    self._accepts_at = pinned.now() + FULL_S
                return
            if len(self._strangers) >= MAX_STRANGERS:
                self._strangers[0].close("too many handshakes at once")
            self._strangers.append(Connection(self, accepted, None))

    def _dial(self, member: Member) -> None:
        dialling = socket.socket(socket.AF_INET6 if ":" in member.host else socket.AF_INET)
        dialling.setblocking(False)
        code = dialling.connect_ex((member.host, member.port))
        if code not in (0, errno.EINPROGRESS):
            dialling.close()
            return
        self._dialled[member.name] = Connection(self, dialling, member.name)


class Connection:
    """One TLS connection: connecting, then in the handshake, then carrying frames."""

    def __init__(self, transport: TlsTransport, raw: socket.socket, dialled: str | None) -> None:
        self._transport, self._raw, self.dialled = transport, raw, dialled
        self.peer: Peer | None = None
        self.heard_at = pinned.now()
        self._tls: ssl.SSLSocket | None = None
        self._incoming, self._outgoing = bytearray(), bytearray()
        self._closed = False
        raw.setblocking(False)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.descriptor = raw.fileno()
        self._mask = 0
        self._want(READ | WRITE)

    @property
    def buffered_bytes(self) -> int:
        """How much waits for the peer to read."""
        return len(self._outgoing)

    def send(self, message: wire.Message) -> bool:
        """Queue one frame; False where the connection is or gets closed."""
        data = wire.encode(message)
        self._outgoing += _LENGTH.pack(len(data))
        self._outgoing += data
        if len(self._outgoing) > MAX_BUFFERED_BYTES:
            self.close("the peer does not read")
        elif not self._mask & WRITE:  # else the socket is full already
            self._guarded(self._flush)
        return not self._closed

    def on_ready(self, _descriptor: int, mask: int) -> None:
        """The socket can be read or written."""
        self._guarded(lambda: self._advance(mask))

    def close(self, why: str) -> None:
        """Close at once; what is buffered is lost."""
        if self._closed:
            return
        self._closed = True
        self._transport.poller.unsubscribe(self.descriptor)
        (self._tls or self._raw).close()
        self._transport.closed(self, why)

    def _guarded(self, step: Callable[[], None]) -> None:
        """Whatever a peer does wrong ends its connection, and nothing else."""
        try:
            step()
        except (OSError, ProtocolBroken, msgspec.MsgspecError) as error:
            self.close(f"{type(error).__name__}: {error}")

    def _advance(self, mask: int) -> None:
        if self._tls is None:
            self._connected(mask)
        elif self.peer is None:
            self._shake_hands()
        if self.peer is not None and not self._closed:
            self._receive()
            if not self._closed:
                self._flush()

    def _connected(self, mask: int) -> None:
        if self.dialled is not None:
            code = self._raw.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, "cannot connect")
            if not mask & WRITE:
                return
        context = self._transport.server_tls if self.dialled is None else self._transport.client_tls
        self._tls = context.wrap_socket(
            self._raw, server_side=self.dialled is None, do_handshake_on_connect=False
        )
        self._shake_hands()

    def _shake_hands(self) -> None:
        assert self._tls is not None
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._want(READ)
            return
        except ssl.SSLWantWriteError:
            self._want(READ | WRITE)
            return
        subject = (self._tls.getpeercert() or {}).get("subjectAltName", ())
        names = frozenset(str(item[1]) for item in subject if item[0] == "DNS")
        self._want(READ)
        self.heard_at = pinned.now()
        self._transport.established(self, names)

    def _receive(self) -> None:
        assert self._tls is not None
        for _ in range(RECEIVES_PER_EVENT):
            try:
                data = self._tls.recv(_RECEIVE_BYTES)
            except ssl.SSLWantReadError:
                return
            if not data:
                self.close("closed by the peer")
                return
            self.heard_at = pinned.now()
            self._incoming += data
            self._take_frames()
            if self._closed:
                return
        self._transport.unread(self)

    def _take_frames(self) -> None:
        assert self.peer is not None
        start, data = 0, self._incoming
        while len(data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, start)
            if length > wire.MAX_FRAME_BYTES:
                raise ProtocolBroken(f"a frame of {length} bytes")
            begin = start + _LENGTH.size
            if len(data) < begin + length:
                break
            message = wire.decode(bytes(data[begin : begin + length]))
            start = begin + length
            self._transport.receive(self.peer, message)
            if self._closed:
                return
        del data[:start]

    def _flush(self) -> None:
        assert self._tls is not None
        while self._outgoing:
            try:
                with memoryview(self._outgoing) as view:
                    sent = self._tls.send(view[:_SEND_BYTES])
            except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                break
            del self._outgoing[:sent]
        self._want(READ | WRITE if self._outgoing else READ)

    def _want(self, mask: int) -> None:
        if mask != self._mask and not self._closed:
            self._mask = mask
            self._transport.poller.subscribe(self.descriptor, self.on_ready, mask | ERROR)


def _context(protocol: ssl._SSLMethod, settings: Settings) -> ssl.SSLContext:
    """TLS 1.3 only, the peer's certificate required and signed by the cluster's CA.

    The host name is not compared: `established` compares the member's name instead.
    """
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(settings.ca_file)
    context.load_cert_chain(settings.cert_file, settings.key_file)
    return context
