"""Certificates: accepted by a real TLS handshake, refused where they should be."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import os
import ssl
from pathlib import Path

import pytest

from reconciler.edge.certificates import (
    Authority,
    CertificateError,
    Identity,
    RequestRefused,
    create_ca,
    create_key_and_csr,
    csr_for,
    expires,
    fingerprint,
    issue,
    load_authority,
    load_identity,
    public_key_sha256,
    sign,
    write_authority,
    write_identity,
)


def context(folder: Path, purpose: ssl.Purpose) -> ssl.SSLContext:
    made = ssl.create_default_context(purpose, cafile=str(folder / "ca.pem"))
    made.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    made.verify_mode = ssl.CERT_REQUIRED
    return made


async def handshake(server: Path, client: Path, name: str) -> bytes:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello")
        writer.close()

    listening = await asyncio.start_server(
        answer, "127.0.0.1", 0, ssl=context(server, ssl.Purpose.CLIENT_AUTH)
    )
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", port, ssl=context(client, ssl.Purpose.SERVER_AUTH), server_hostname=name
        )
        try:
            return await reader.read()
        finally:
            writer.close()


def written(folder: Path, authority: Authority, name: str, *ips: str) -> Path:
    write_identity(folder, issue(authority, name, ips))
    return folder


async def test_two_nodes_of_a_cluster_trust_each_other_by_name_and_by_address(
    tmp_path: Path,
) -> None:
    authority = create_ca()
    one = written(tmp_path / "1", authority, "node-1", "127.0.0.1", "::1")
    two = written(tmp_path / "2", authority, "node-2")
    assert await handshake(one, two, "node-1") == b"hello"
    assert await handshake(one, two, "127.0.0.1") == b"hello"
    with pytest.raises(ssl.SSLCertVerificationError):
        await handshake(one, two, "node-3")


async def test_a_node_of_another_cluster_is_refused_both_ways(tmp_path: Path) -> None:
    ours = written(tmp_path / "1", create_ca(), "node-1")
    theirs = written(tmp_path / "2", create_ca(), "node-2")
    with pytest.raises(ssl.SSLError):
        await handshake(ours, theirs, "node-1")


def test_what_was_written_is_loaded_and_open_to_its_owner_alone(tmp_path: Path) -> None:
    authority = create_ca()
    identity = issue(authority, "node-1")
    write_authority(tmp_path / "ca", authority)
    write_identity(tmp_path / "node", identity)
    assert load_authority(tmp_path / "ca") == authority
    assert load_identity(tmp_path / "node") == identity
    for folder in ("ca", "node"):
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700
        for name in os.listdir(tmp_path / folder):
            assert (tmp_path / folder / name).stat().st_mode & 0o777 == 0o600, name


def test_a_key_beside_another_certificate_is_an_error_that_names_the_folder(
    tmp_path: Path,
) -> None:
    authority = create_ca()
    one, two = issue(authority, "node-1"), issue(authority, "node-1")
    write_identity(tmp_path, Identity(one.cert_pem, two.key_pem, one.ca_pem))
    with pytest.raises(CertificateError) as caught:
        load_identity(tmp_path)
    assert caught.value.at == str(tmp_path)
    for wrong in (one.cert_pem, b"nothing", b""):
        (tmp_path / "cert.pem").write_bytes(wrong)
        with pytest.raises(CertificateError):
            load_identity(tmp_path)
    (tmp_path / "cert.pem").unlink()
    with pytest.raises(CertificateError):
        load_identity(tmp_path)


def test_keys_are_never_shown() -> None:
    authority = create_ca()
    identity = issue(authority, "node-1")
    for secret in (authority, identity):
        assert "PRIVATE" not in repr(secret)
        assert "***" in repr(secret)


def test_an_identity_never_outlives_its_authority_and_has_its_own_fingerprint() -> None:
    authority = create_ca()
    identity = issue(authority, "node-1", days=100_000)
    assert expires(identity.cert_pem) <= expires(authority.cert_pem)
    now = datetime.datetime.now(datetime.UTC)
    assert expires(issue(authority, "node-1", days=10).cert_pem) > now
    prints = {fingerprint(pem) for pem in (identity.cert_pem, authority.cert_pem)}
    assert len(prints) == 2
    assert all(len(text) == 64 for text in prints)


async def test_a_signed_request_serves_by_the_names_and_addresses_of_its_signer(
    tmp_path: Path,
) -> None:
    authority = create_ca()
    key, csr = create_key_and_csr("node-1", ("203.0.113.1",))
    cert = sign(authority, csr, "node-1", ("127.0.0.2",))
    write_identity(tmp_path / "1", Identity(cert, key, authority.cert_pem))
    two = written(tmp_path / "2", authority, "node-2")
    for name in ("node-1", "localhost", "127.0.0.1", "127.0.0.2"):
        assert await handshake(tmp_path / "1", two, name) == b"hello"
    with pytest.raises(ssl.SSLCertVerificationError):
        await handshake(tmp_path / "1", two, "203.0.113.1")


def test_a_request_for_another_name_is_not_signed() -> None:
    authority = create_ca()
    key, csr = create_key_and_csr("node-1")
    for name in ("node-2", "", "node-11", "NODE-1"):
        with pytest.raises(RequestRefused, match="is for node-1, not for"):
            sign(authority, csr, name, ())
    with pytest.raises(RequestRefused, match="cannot be read"):
        sign(authority, key, "node-1", ())


def test_the_digest_is_that_of_the_key_wherever_the_key_is() -> None:
    authority = create_ca()
    key, csr = create_key_and_csr("node-1")
    again = csr_for(key, "node-1", ("127.0.0.1",))
    cert = sign(authority, csr, "node-1", ())
    assert {public_key_sha256(pem) for pem in (csr, again, cert)} == {public_key_sha256(csr)}
    assert public_key_sha256(create_key_and_csr("node-1")[1]) != public_key_sha256(csr)
    assert len(public_key_sha256(csr)) == 64
    # What is fixed elsewhere too: the log knows a node by it.
    der = ssl.PEM_cert_to_DER_cert(cert.decode())
    assert public_key_sha256(cert) != hashlib.sha256(der).hexdigest()


def test_a_certificate_and_its_key_are_one_file_that_tools_read_by_either_name(
    tmp_path: Path,
) -> None:
    folder = written(tmp_path / "1", create_ca(), "node-1")
    assert (folder / "key.pem").readlink() == Path("cert.pem")
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
        folder / "cert.pem", folder / "key.pem")
    before = load_identity(folder)
    write_identity(folder, issue(create_ca(), "node-1"))
    assert load_identity(folder) != before
