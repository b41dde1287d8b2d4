"""A machine joins: tokens count, end, are revoked, and never let a second machine in."""

from __future__ import annotations

import base64
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from msgspec.structs import replace

from reconciler.edge.certificates import (
    create_key_and_csr,
    fingerprint,
    public_key_sha256,
)
from reconciler.errors import MillError, Unavailable, Unprocessable
from reconciler.executor.authority import open_authority
from reconciler.executor.joining import JOIN_TOKEN_MS, create_join_token
from reconciler.executor.ledger import CommandRefused
from reconciler.executor.requests import JoinRequest, JoinTokenOver, UnknownJoinToken
from reconciler.fsm import commands as c
from reconciler.fsm.codec import encode_state
from tests.door.cluster import KEY, Cluster, cluster


@pytest.fixture
async def one(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path) as it:
        yield it


def request(token: tuple[str, str], name: str, csr: bytes, host: str = "192.0.2.7") -> JoinRequest:
    return JoinRequest(
        token=token[1], id=token[0], name=name, csr=csr.decode(), api=f"{host}:4400",
        agent=f"{host}:4402", log=f"{host}:4401", cpu_milli=2000, memory_bytes=1_000_000_000)


async def test_a_machine_gets_a_number_a_certificate_and_whom_to_dial(one: Cluster) -> None:
    token = await create_join_token(one.ledger)
    key, csr = create_key_and_csr("node-2", ("203.0.113.1",))
    answer = await one.joining.join(request(token, "node-2", csr))
    assert (answer.cluster, answer.number, answer.ca) == ("test", 2, one.ca.cert_pem.decode())
    assert [node.name for node in answer.nodes] == ["node-1", "node-2"]
    assert [(m.name, m.voter) for m in answer.members] == [("node-1", True)]
    certificate = x509.load_pem_x509_certificate(answer.certificate.encode())
    certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(one.ca.cert_pem))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["node-2", "localhost"]
    # Where it is reached is what the log says, not what the request asked to be signed.
    assert [str(ip) for ip in names.get_values_for_type(x509.IPAddress)] \
        == ["192.0.2.7", "127.0.0.1"]
    assert public_key_sha256(answer.certificate.encode()) == public_key_sha256(csr)
    (one.folder / "pair.pem").write_bytes(answer.certificate.encode() + key)
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(one.folder / "pair.pem")


async def test_a_lost_answer_is_asked_for_again_with_the_same_key_and_costs_no_use(
    one: Cluster,
) -> None:
    token = await create_join_token(one.ledger)
    _, csr = create_key_and_csr("node-2")
    first = await one.joining.join(request(token, "node-2", csr))
    again = await one.joining.join(request(token, "node-2", csr))
    assert (first.number, again.number) == (2, 2)
    assert len(one.ledger.state.tokens[token[0]].joined) == 1


async def test_a_spent_token_lets_no_other_key_in_under_any_name(one: Cluster) -> None:
    token = await create_join_token(one.ledger)
    await one.joining.join(request(token, "node-2", create_key_and_csr("node-2")[1]))
    for name in ("node-2", "node-3"):
        replayed = request(token, name, create_key_and_csr(name)[1], "192.0.2.8")
        with pytest.raises(JoinTokenOver) as refused:
            await one.joining.join(replayed)
        assert "1 of 1 uses" in refused.value.what
        assert refused.value.hint
    assert sorted(one.ledger.state.nodes) == ["node-1", "node-2"]


async def test_a_token_for_two_lets_two_in_and_no_third(one: Cluster) -> None:
    token = await create_join_token(one.ledger, uses=2)
    for number in (2, 3):
        name = f"node-{number}"
        csr = create_key_and_csr(name)[1]
        answer = await one.joining.join(request(token, name, csr, f"192.0.2.{number}"))
        assert answer.number == number
    with pytest.raises(JoinTokenOver):
        await one.joining.join(
            request(token, "node-4", create_key_and_csr("node-4")[1], "192.0.2.4"))


async def test_a_wrong_secret_an_unknown_id_and_another_kind_of_token_are_one_answer(
    one: Cluster,
) -> None:
    token_id, secret = await create_join_token(one.ledger)
    _, csr = create_key_and_csr("node-2")
    told = set()
    for wrong in ((token_id, secret[:-1]), ("join-00000000", secret), ("t", secret), ("t", "")):
        with pytest.raises(UnknownJoinToken) as refused:
            await one.joining.join(request(wrong, "node-2", csr))
        told.add((refused.value.what, refused.value.hint))
    assert len(told) == 1


async def test_a_token_ends_after_an_hour(one: Cluster) -> None:
    token = await create_join_token(one.ledger)
    one.clock.step_ms = JOIN_TOKEN_MS
    with pytest.raises(JoinTokenOver, match="expired"):
        await one.joining.join(request(token, "node-2", create_key_and_csr("node-2")[1]))
    assert list(one.ledger.state.nodes) == ["node-1"]


async def test_a_revoked_token_is_unknown(one: Cluster) -> None:
    token = await create_join_token(one.ledger)
    await one.ledger.propose(c.RevokeToken(token[0]))
    with pytest.raises(UnknownJoinToken):
        await one.joining.join(request(token, "node-2", create_key_and_csr("node-2")[1]))


async def test_a_name_that_is_taken_is_refused_and_costs_no_use(one: Cluster) -> None:
    token = await create_join_token(one.ledger)
    with pytest.raises(CommandRefused, match="taken") as refused:
        await one.joining.join(request(token, "node-1", create_key_and_csr("node-1")[1]))
    assert refused.value.status == 409
    assert "mill remove node-1" in refused.value.hint
    assert one.ledger.state.tokens[token[0]].joined == ()


def _rsa_csr(name: str) -> bytes:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.PEM)


def _forged_csr() -> bytes:
    """A request whose last byte of signature was changed."""
    lines = create_key_and_csr("node-2")[1].splitlines()
    der = bytearray(base64.b64decode(b"".join(lines[1:-1])))
    der[-1] ^= 1
    return b"\n".join([lines[0], base64.b64encode(der), lines[-1], b""])


@pytest.mark.parametrize(("csr", "told"), [
    (b"", "cannot be read"),
    (b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n", "read"),
    (b"x" * 20_000, "20000 bytes"),
    (create_key_and_csr("node-3")[1], "for node-3, not for node-2"),
    (_rsa_csr("node-2"), "P-256"),
    (_forged_csr(), "not signed with its own key"),
])
async def test_a_bad_request_for_a_certificate_is_refused_and_costs_no_use(
    one: Cluster, csr: bytes, told: str
) -> None:
    token = await create_join_token(one.ledger)
    with pytest.raises(MillError, match=told) as refused:
        await one.joining.join(request(token, "node-2", csr))
    assert refused.value.status == 422
    assert one.ledger.state.tokens[token[0]].joined == ()
    assert list(one.ledger.state.nodes) == ["node-1"]


@pytest.mark.parametrize(("field", "value"), [
    ("agent", "192.0.2.7"), ("agent", "0.0.0.0:4402"), ("agent", "host.example:4402"),
    ("log", "192.0.2.7:0"), ("log", "192.0.2.7:70000"), ("api", "192.0.2.8:4400"),
    ("api", "239.0.0.1:4400"), ("api", "192.0.2.7:४"), ("cpu_milli", 0), ("memory_bytes", -1),
    ("name", "localhost"),
])
async def test_a_node_that_nobody_could_reach_is_refused_and_costs_no_use(
    one: Cluster, field: str, value: object
) -> None:
    token = await create_join_token(one.ledger)
    name = str(value) if field == "name" else "node-2"
    asked = request(token, name, create_key_and_csr(name)[1])
    with pytest.raises(Unprocessable):
        await one.joining.join(replace(asked, **{field: value}))
    assert one.ledger.state.tokens[token[0]].joined == ()


async def test_an_address_of_another_node_is_refused(one: Cluster) -> None:
    token = await create_join_token(one.ledger, uses=2)
    await one.joining.join(request(token, "node-2", create_key_and_csr("node-2")[1]))
    with pytest.raises(CommandRefused, match="is an address of node-2"):
        await one.joining.join(request(token, "node-3", create_key_and_csr("node-3")[1]))


async def test_a_deposed_leader_lets_nobody_in(one: Cluster) -> None:
    token = await create_join_token(one.ledger)
    one.replica.leading = False
    with pytest.raises(Unavailable):
        await one.joining.join(request(token, "node-2", create_key_and_csr("node-2")[1]))
    assert list(one.ledger.state.nodes) == ["node-1"]


async def test_the_authority_lies_in_the_log_sealed_and_opens_with_the_clusters_key_alone(
    one: Cluster,
) -> None:
    state = one.ledger.state
    assert open_authority(state, KEY) == (one.ca.cert_pem, one.ca.key_pem)
    assert b"PRIVATE KEY" not in encode_state(state) + b"".join(one.replica.entries)
    with pytest.raises(MillError, match="does not open"):
        open_authority(state, bytes(32))
    assert state.authority is not None
    other = replace(state, authority=replace(state.authority, cert_pem=b"another"))
    with pytest.raises(MillError, match="does not open"):
        open_authority(other, KEY)
    assert fingerprint(state.authority.cert_pem) == fingerprint(one.ca.cert_pem)
