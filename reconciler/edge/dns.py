"""Names to addresses inside `.mill`: one pure function from a zone and a query to an answer.

    NAME.mill            A     the service's virtual address; a worker (no port) has none
    _any._tcp.NAME.mill  SRV   its port, target NAME.mill, with the A record beside it
    ALLOC.NAME.mill      A     an allocation's own address; a task's is at ID.mill

What exists but has no such record is NODATA, what does not is NXDOMAIN, both with the SOA whose
minimum is the negative TTL (RFC 2308). A name outside `.mill` is somebody else's: forward it.
"""

from __future__ import annotations

from dataclasses import dataclass

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset
import msgspec

TTL_S = 5
DROPPED = b""  # the answer to what is no query at all
UDP_BYTES = 1232  # fits an IPv6 packet of minimum size: no fragments (DNS flag day 2020)
PLAIN_UDP_BYTES = 512  # RFC 1035, 4.2.1: without EDNS
TCP_BYTES = 65535
CACHED_ANSWERS = 8192  # of about 200 bytes: 2 MB
_SOA = "ns.mill. hostmaster.mill. {serial} 3600 600 86400 5"

_MILL = b"mill"
_APEX = dns.name.from_text("mill.")
_HEADER = 12
_QR, _OPCODE = 0x80, 0x78  # in the third byte of a message
_OPT = b"\0\0\x29"  # the root name and type 41 (RFC 6891)
_OPT_FIXED = 11

_Labels = tuple[bytes, ...]


class Service(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A service's virtual address and port; a worker has no port."""

    vip: str
    port: int | None = None


class Allocation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An allocation's own address, and its service; None for a task's."""

    address: str
    service: str | None = None


class Zone(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that `.mill` holds: services by name, allocations by id."""

    services: dict[str, Service] = {}
    allocations: dict[str, Allocation] = {}


def answer(zone: Zone | None, query: bytes, tcp: bool) -> bytes | None:
    """What to send back for a message in wire form; None: forward it; DROPPED: send nothing.

    Without a zone, names in `.mill` are SERVFAIL. One that answers many: `Authority`.
    """
    return Authority(zone, 0).answer(query, tcp)


@dataclass(frozen=True)
class _Node:
    """What a name has; neither field for a name that only has names below it."""

    address: str | None = None
    port: int | None = None


class Authority:
    """Answers for one zone, and remembers the last CACHED_ANSWERS of them in wire form.

    `serial` goes into the SOA (its lower 32 bits).
    """

    def __init__(self, zone: Zone | None, serial: int) -> None:
        self._nodes = None if zone is None else _nodes(zone)
        self._soa = dns.rrset.from_text(
            _APEX, TTL_S, "IN", "SOA", _SOA.format(serial=serial & 0xFFFFFFFF)
        )
        self._cache: dict[tuple[bytes, bytes, bytes, bool], bytes] = {}

    def answer(self, query: bytes, tcp: bool) -> bytes | None:
        """See `answer`."""
        if len(query) < _HEADER or query[2] & _QR:
            return DROPPED
        asked = _asked(query)
        if asked is None:
            return self._respond(query, tcp)
        if asked.labels[-1:] != (_MILL,):
            return None
        if asked.options is None:
            return self._respond(query, tcp)
        key = (asked.question, query[2:4], asked.options, tcp)
        known = self._cache.get(key)
        if known is None:
            known = self._respond(query, tcp)
            if known is None or len(known) < asked.end:  # an error without the question
                return known
            if len(self._cache) >= CACHED_ANSWERS:
                del self._cache[next(iter(self._cache))]
            self._cache[key] = known
        # The asker's own id and spelling; names in the answer point to the spelling.
        end = asked.end
        return query[:2] + known[2:_HEADER] + query[_HEADER:end] + known[end:]

    def _respond(self, wire: bytes, tcp: bool) -> bytes | None:
        if wire[2] & _OPCODE:
            return _error(wire, dns.rcode.NOTIMP)
        try:
            query = dns.message.from_wire(wire)
        except (dns.exception.DNSException, ValueError):
            return _error(wire, dns.rcode.FORMERR)
        if len(query.question) != 1:
            return _error(wire, dns.rcode.FORMERR)
        if not query.question[0].name.is_subdomain(_APEX):
            return None
        response = dns.message.make_response(query, recursion_available=True, our_payload=UDP_BYTES)
        self._fill(query, response)
        limit = TCP_BYTES if tcp else max(PLAIN_UDP_BYTES, min(query.payload, UDP_BYTES))
        return _fitted(response, limit)

    def _fill(self, query: dns.message.Message, response: dns.message.Message) -> None:
        asked = query.question[0]
        if query.edns > 0:
            response.set_rcode(dns.rcode.BADVERS)
        elif asked.rdclass != dns.rdataclass.IN or asked.rdtype in _TRANSFERS:
            response.set_rcode(dns.rcode.REFUSED)
        elif self._nodes is None:
            response.set_rcode(dns.rcode.SERVFAIL)
        else:
            response.flags |= dns.flags.AA
            self._look_up(self._nodes, asked, response)

    def _look_up(
        self,
        nodes: dict[_Labels, _Node],
        asked: dns.rrset.RRset,
        response: dns.message.Message,
    ) -> None:
        name = asked.name
        labels = tuple(label.lower() for label in name.labels[:-1])
        node = nodes.get(labels)
        of_service = nodes.get(labels[2:]) if _is_port_name(labels) else None
        if node is not None and node.address and asked.rdtype in _ADDRESS:
            response.answer.append(_record(name, "A", node.address))
        elif name == _APEX and asked.rdtype in (dns.rdatatype.SOA, dns.rdatatype.ANY):
            response.answer.append(self._soa)
        elif of_service and of_service.port is not None and asked.rdtype in _SERVICE:
            target = dns.name.Name(name.labels[2:])
            record = f"0 0 {of_service.port} {target}"
            response.answer.append(_record(name, "SRV", record))
            response.additional.append(_record(target, "A", of_service.address or ""))
        else:
            response.authority.append(self._soa)
            if node is None and not (of_service and of_service.port is not None):
                response.set_rcode(dns.rcode.NXDOMAIN)


_TRANSFERS = (dns.rdatatype.AXFR, dns.rdatatype.IXFR)
_ADDRESS = (dns.rdatatype.A, dns.rdatatype.ANY)
_SERVICE = (dns.rdatatype.SRV, dns.rdatatype.ANY)


def _nodes(zone: Zone) -> dict[_Labels, _Node]:
    nodes: dict[_Labels, _Node] = {}
    for alloc, allocation in zone.allocations.items():
        above = () if allocation.service is None else (_label(allocation.service),)
        nodes[(_label(alloc), *above, _MILL)] = _Node(allocation.address)
    for name, service in zone.services.items():
        own = (_label(name), _MILL)
        if service.port is None:
            nodes[own] = _Node()
            continue
        nodes[own] = _Node(service.vip, service.port)
        nodes[(b"_tcp", *own)] = _Node()
    for labels in list(nodes):
        for depth in range(1, len(labels)):
            nodes.setdefault(labels[depth:], _Node())
    nodes.setdefault((_MILL,), _Node())
    return nodes


def _label(name: str) -> bytes:
    return name.lower().encode()


def _is_port_name(labels: _Labels) -> bool:
    """`_http._tcp.NAME.mill`: any name for the port, because a service has just one."""
    return len(labels) == 4 and labels[0].startswith(b"_") and labels[1] == b"_tcp"


def _record(name: dns.name.Name, kind: str, text: str) -> dns.rrset.RRset:
    return dns.rrset.from_text(name, TTL_S, "IN", kind, text)


def _fitted(response: dns.message.Message, limit: int) -> bytes:
    """The wire form; over `limit` only the question, with TC: ask again over TCP."""
    wire = response.to_wire(max_size=TCP_BYTES)
    if len(wire) <= limit:
        return wire
    response.answer.clear()
    response.authority.clear()
    response.additional.clear()
    response.flags |= dns.flags.TC
    return response.to_wire(max_size=limit)


def _error(query: bytes, rcode: dns.rcode.Rcode) -> bytes:
    """A bare header for what could not be read far enough to say more (RFC 1035, 4.1.1)."""
    return query[:2] + bytes([_QR | query[2] & (_OPCODE | 1), 0x80 | rcode]) + bytes(8)


def servfail(query: bytes) -> bytes:
    """The answer to a query that was forwarded in vain: its question, and SERVFAIL."""
    asked = _asked(query)
    if asked is None:
        return _error(query, dns.rcode.SERVFAIL)
    header = _error(query, dns.rcode.SERVFAIL)[:4] + b"\0\1" + bytes(6)
    return header + query[_HEADER : asked.end]


@dataclass(frozen=True)
class _Asked:
    """The one question of an ordinary query, read without a parser.

    `question` is name (lower case), type and class; it ends at `end`. `options` is what of the
    rest changes an answer: nothing, or the fixed part of EDNS; None where only a parser can tell.
    """

    labels: _Labels
    question: bytes
    end: int
    options: bytes | None


def _asked(query: bytes) -> _Asked | None:
    """None for anything but one question with a plain name and opcode QUERY."""
    if query[2] & _OPCODE or query[4:6] != b"\0\1":
        return None
    labels, at = [], _HEADER
    while at < len(query) and query[at]:
        length = query[at]
        if length > 63 or at - _HEADER > 253:  # a pointer, or a name that is too long
            return None
        labels.append(query[at + 1 : at + 1 + length].lower())
        at += 1 + length
    end = at + 5
    if end > len(query):
        return None
    question = query[_HEADER : end - 4].lower() + query[end - 4 : end]
    return _Asked(tuple(labels), question, end, _options(query, end))


def _options(query: bytes, end: int) -> bytes | None:
    counts, rest = query[6:_HEADER], query[end:]
    if counts == bytes(6) and not rest:
        return b""
    if counts != b"\0\0\0\0\0\1" or not rest.startswith(_OPT) or len(rest) < _OPT_FIXED:
        return None
    # A cookie or padding differs in each query, and we answer neither.
    length = int.from_bytes(rest[_OPT_FIXED - 2 : _OPT_FIXED])
    return rest[: _OPT_FIXED - 2] if len(rest) == _OPT_FIXED + length else None
