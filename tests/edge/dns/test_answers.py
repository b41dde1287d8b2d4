"""From a zone and a query to an answer, in wire form."""

from collections.abc import Iterable

import dns.edns
import dns.flags
import dns.message
import dns.opcode
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.edge import dns as mill_dns
from reconciler.edge.dns import DROPPED, Allocation, Authority, Service, Zone, answer, servfail
from reconciler.edge.dns_forward import parsed

ZONE = Zone(
    services={"web": Service("10.97.0.1", 8080), "worker": Service("10.97.0.2")},
    allocations={
        "web-aaaaaa": Allocation("10.77.1.5", "web"),
        "worker-bbbbbb": Allocation("10.77.1.6", "worker"),
        "old-cccccc": Allocation("10.77.2.7", "old"),
        "job-dddddd": Allocation("10.77.3.8"),
    },
)


def ask(
    name: str, kind: str = "A", zone: Zone | None = ZONE, tcp: bool = False
) -> dns.message.Message:
    query = dns.message.make_query(name, kind)
    wire = answer(zone, query.to_wire(), tcp)
    assert wire
    response = dns.message.from_wire(wire)
    assert query.is_response(response)
    return response


def texts(rrsets: Iterable[object]) -> list[str]:
    return [str(rrset) for rrset in rrsets]


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("web.mill", "10.97.0.1"),
        ("WEB.Mill", "10.97.0.1"),
        ("web-aaaaaa.web.mill", "10.77.1.5"),
        ("worker-bbbbbb.worker.mill", "10.77.1.6"),
        ("old-cccccc.old.mill", "10.77.2.7"),
        ("job-dddddd.mill", "10.77.3.8"),
    ],
)
def test_a_name_has_its_address_for_five_seconds(name: str, address: str) -> None:
    response = ask(name)
    assert texts(response.answer) == [f"{name}. 5 IN A {address}"]
    assert response.rcode() == dns.rcode.NOERROR
    assert response.flags & dns.flags.AA
    assert response.flags & dns.flags.RA


def test_a_port_is_found_with_the_address_beside_it() -> None:
    response = ask("_http._tcp.web.mill", "SRV")
    assert texts(response.answer) == ["_http._tcp.web.mill. 5 IN SRV 0 0 8080 web.mill."]
    assert texts(response.additional) == ["web.mill. 5 IN A 10.97.0.1"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("web.mill", "AAAA"),
        ("web.mill", "TXT"),
        ("web-aaaaaa.web.mill", "AAAA"),
        ("worker.mill", "A"),
        ("worker.mill", "AAAA"),
        ("old.mill", "A"),  # only has names below it
        ("_tcp.web.mill", "A"),
        ("_http._tcp.web.mill", "A"),
        ("mill", "A"),
    ],
)
def test_a_known_name_without_such_a_record_is_no_error(name: str, kind: str) -> None:
    response = ask(name, kind)
    assert response.rcode() == dns.rcode.NOERROR
    assert response.answer == []
    (soa,) = response.authority
    assert str(soa.name) == "mill."
    assert soa.ttl == soa[0].minimum == 5


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("api.mill", "A"),
        ("api.mill", "AAAA"),
        ("web-zzzzzz.web.mill", "A"),
        ("web-aaaaaa.mill", "A"),
        ("web-aaaaaa.worker.mill", "A"),
        ("job-dddddd.web.mill", "A"),
        ("a.web-aaaaaa.web.mill", "A"),
        ("_http._udp.web.mill", "SRV"),
        ("_http._tcp.worker.mill", "SRV"),
        ("_http._tcp.api.mill", "SRV"),
        ("http._tcp.web.mill", "SRV"),
    ],
)
def test_an_unknown_name_does_not_exist(name: str, kind: str) -> None:
    response = ask(name, kind)
    assert response.rcode() == dns.rcode.NXDOMAIN
    assert response.answer == []
    assert [rrset.rdtype for rrset in response.authority] == [dns.rdatatype.SOA]


def test_the_soa_carries_the_index() -> None:
    wire = Authority(ZONE, 2**32 + 7).answer(dns.message.make_query("mill", "SOA").to_wire(), False)
    assert wire
    assert dns.message.from_wire(wire).answer[0][0].serial == 7


@pytest.mark.parametrize("name", ["example.com", "mill.example.com", "xmill", ".", "a\\004mill"])
def test_a_name_outside_is_forwarded(name: str) -> None:
    query = dns.message.make_query(name, "A").to_wire()
    assert answer(ZONE, query, False) is None
    assert answer(None, query, True) is None


def test_before_the_first_zone_nothing_is_denied() -> None:
    assert ask("web.mill", zone=None).rcode() == dns.rcode.SERVFAIL
    assert ask("web.mill", zone=Zone()).rcode() == dns.rcode.NXDOMAIN


def test_what_is_not_asked_like_a_name_is_refused() -> None:
    assert ask("mill", "AXFR", tcp=True).rcode() == dns.rcode.REFUSED
    chaos = dns.message.make_query("web.mill", "TXT", dns.rdataclass.CH)
    assert dns.message.from_wire(answer(ZONE, chaos.to_wire(), False)).rcode() == dns.rcode.REFUSED
    update = bytearray(dns.message.make_query("web.mill", "A").to_wire())
    update[2] |= dns.opcode.UPDATE << 3
    assert dns.message.from_wire(answer(ZONE, bytes(update), False)).rcode() == dns.rcode.NOTIMP
    newer = dns.message.make_query("web.mill", "A", use_edns=1)
    assert dns.message.from_wire(answer(ZONE, newer.to_wire(), False)).rcode() == dns.rcode.BADVERS


def test_edns_is_answered_only_where_it_was_asked() -> None:
    plain = dns.message.make_query("web.mill", "A", use_edns=False).to_wire()
    assert dns.message.from_wire(answer(ZONE, plain, False)).edns == -1
    edns = dns.message.make_query("web.mill", "A", use_edns=0, payload=4096).to_wire()
    response = dns.message.from_wire(answer(ZONE, edns, False))
    assert (response.edns, response.payload) == (0, 1232)


def test_over_the_limit_only_the_question_comes_with_tc() -> None:
    query = dns.message.make_query("web.mill", "A", use_edns=0)
    response = dns.message.make_response(query)
    for number in range(100):
        response.answer.append(mill_dns._record(query.question[0].name, "A", f"10.0.0.{number}"))
    cut = dns.message.from_wire(mill_dns._fitted(response, 512))
    assert cut.flags & dns.flags.TC
    assert cut.answer == []
    assert cut.question == query.question
    assert cut.edns == 0


def test_a_reply_is_never_answered() -> None:
    reply = dns.message.make_response(dns.message.make_query("web.mill", "A")).to_wire()
    assert answer(ZONE, reply, False) == DROPPED
    assert answer(ZONE, b"", False) == DROPPED
    assert answer(ZONE, b"\0" * 11, True) == DROPPED


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
def test_no_bytes_are_an_error(noise: bytes) -> None:
    for wire in (noise, dns.message.make_query("web.mill", "A").to_wire()[:12] + noise):
        reply = answer(ZONE, wire, False)
        assert reply is None or reply == DROPPED or reply[:2] == wire[:2]
        if len(wire) >= 12:
            assert servfail(wire)[:2] == wire[:2]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_query_is_never_an_error(data: st.DataObject) -> None:
    wire = bytearray(dns.message.make_query("web.mill", "A", use_edns=0).to_wire())
    for _ in range(data.draw(st.integers(1, 4))):
        wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    authority = Authority(ZONE, 1)
    first = authority.answer(bytes(wire), False)
    assert authority.answer(bytes(wire), False) == first


LABELS = ["web", "WEB", "worker", "api", "web-aaaaaa", "_http", "_tcp", "_x", "job-dddddd", "old"]
QUERIES = st.builds(
    lambda labels, kind, flags, edns, payload, cookie, number: dns.message.make_query(
        ".".join([*labels, "mill"]),
        kind,
        use_edns=edns,
        payload=payload,
        options=[dns.edns.CookieOption(cookie, b"")] if edns is not None and cookie else None,
        id=number,
        flags=flags,
    ),
    st.lists(st.sampled_from(LABELS), max_size=4),
    st.sampled_from(["A", "AAAA", "SRV", "ANY", "SOA", "TYPE65", "TYPE97"]),
    st.sampled_from([0, dns.flags.RD, dns.flags.RD | dns.flags.CD]),
    st.sampled_from([None, 0]),
    st.sampled_from([512, 1232, 4096]),
    st.none() | st.binary(min_size=8, max_size=8),
    st.integers(0, 65535),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(QUERIES, st.booleans()), min_size=1, max_size=30))
def test_a_remembered_answer_is_the_one_that_would_be_made(
    asked: list[tuple[dns.message.Message, bool]],
) -> None:
    authority = Authority(ZONE, 0)
    for query, tcp in asked:
        wire = query.to_wire()
        got, fresh = authority.answer(wire, tcp), answer(ZONE, wire, tcp)
        assert got
        assert fresh
        assert got[:2] == wire[:2]
        assert dns.message.from_wire(got).to_text() == dns.message.from_wire(fresh).to_text()
        assert dns.message.from_wire(got).question == query.question
        assert len(got) <= 512


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mill_dns, "CACHED_ANSWERS", 16)
    authority = Authority(ZONE, 0)
    for number in range(100):
        assert authority.answer(dns.message.make_query(f"x{number}.mill", "A").to_wire(), False)
    for _ in range(100):  # a cookie makes no new entry
        cookie = dns.edns.CookieOption(number.to_bytes(8), b"")
        query = dns.message.make_query("web.mill", "A", use_edns=0, options=[cookie])
        assert authority.answer(query.to_wire(), False)
    assert len(authority._cache) == 16


def test_name_servers_are_read_as_the_c_library_does() -> None:
    lines = ["# c", "nameserver 10.0.0.1", "search x", "nameserver", " nameserver ::1 # y"]
    more = ["nameserver 10.0.0.2", "nameserver 10.0.0.3"]
    assert parsed("\n".join(lines + more)) == (("10.0.0.1", 53), ("::1", 53), ("10.0.0.2", 53))
