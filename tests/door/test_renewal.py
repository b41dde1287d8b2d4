"""Certificates that last seconds renew themselves, and nothing that uses them stops."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import os
import signal
import ssl
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from reconciler.edge.certificates import (
    CertificateError,
    CsrSigner,
    create_ca,
    expires,
    issue,
    load_identity,
    write_identity,
)
from reconciler.edge.identity import NodeIdentity
from reconciler.errors import Unavailable
from reconciler.executor.agent.authority import CLUSTER_KEY, Nothing, fetch_cluster_key
from reconciler.executor.agent.orders import SERVICE, encode
from reconciler.executor.links import Credentials, Links
from reconciler.executor.renewal import Renewal
from tests.door.cluster import HOST, KEY, Agent, Cluster, cluster, credentials, days, until

LIFE_S = 15.0


def renewal(it: Cluster, agent: Agent) -> Renewal:
    return Renewal(it.ledger, agent.identity, agent.credentials,
                   (agent.credentials.renew, agent.server.reload))


async def shown(agent: Agent, with_: Credentials) -> str:
    """SHA-256 of the certificate that an agent shows to a new connection."""
    context = ssl.create_default_context(cadata=with_.ca.decode())
    pair = agent.identity._folder.parent / f"pair-{os.urandom(4).hex()}.pem"
    pair.write_bytes(with_.certificate + with_.key)
    context.load_cert_chain(pair)
    host, port = agent.address.split(":")
    reader, writer = await asyncio.open_connection(
        host, int(port), ssl=context, server_hostname=agent.name)
    with contextlib.suppress(OSError):
        await reader.read(1)
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return hashlib.sha256(der).hexdigest()


def connected(links: Links, it: Cluster) -> bool:
    return all(link is not None and link.connected for link in map(links.get, it.agents))


def print_of(pem: bytes) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.decode())).hexdigest()


@pytest.mark.timeout(240)
async def test_certificates_of_seconds_renew_while_sessions_go_on(tmp_path: Path) -> None:
    async with cluster(tmp_path, 2, days(LIFE_S)) as it, asyncio.TaskGroup() as group:
        first = {name: agent.identity.identity for name, agent in it.agents.items()}
        one, two = it.agents["node-1"], it.agents["node-2"]
        links = Links(it.ledger, "node-1", one.credentials, it.clock)
        running = [group.create_task(links.run(1))]
        await until(lambda: connected(links, it), "sessions to both")
        sessions = {name: agent.server._current for name, agent in it.agents.items()}
        running += [group.create_task(renewal(it, agent).run()) for agent in it.agents.values()]
        await until(lambda: all(a.credentials.serial for a in it.agents.values()), "renewals")
        for name, agent in it.agents.items():
            # In time: the former one is still good.
            assert expires(first[name].cert_pem) > datetime.datetime.now(datetime.UTC)
            renewed = load_identity(tmp_path / name)
            assert renewed == agent.identity.identity
            assert renewed.key_pem != first[name].key_pem
            assert renewed.cert_pem == agent.credentials.certificate
        # What was open goes on, and what is new shows the new certificate.
        assert connected(links, it)
        assert await shown(two, one.credentials) == print_of(two.credentials.certificate)
        ended = max(expires(i.cert_pem) for i in first.values()) + datetime.timedelta(seconds=1)
        await until(lambda: datetime.datetime.now(datetime.UTC) > ended, "their end")
        # The former ones have ended: they open nothing, and everything still works.
        with pytest.raises(Unavailable):
            await fetch_cluster_key(two.address, "node-2", credentials(first["node-1"]), 0.0)
        assert await fetch_cluster_key(two.address, "node-2", one.credentials) == KEY
        assert connected(links, it)
        assert sessions == {name: agent.server._current for name, agent in it.agents.items()}
        await until(lambda: all(a.credentials.serial > 1 for a in it.agents.values()), "again")
        # A leader dials anew, after its agent was away, with what it has now.
        await two.server.stop()
        await until(lambda: not links["node-2"].connected, "the session's end")
        fresh = two.identity.identity
        await two.server.start(two.address, fresh.ca_pem, fresh.cert_pem, fresh.key_pem)
        await until(lambda: links["node-2"].connected, "a session with new certificates")
        for task in running:
            task.cancel()


async def test_without_a_leader_the_node_keeps_what_it_has_and_renews_once_there_is_one(
    tmp_path: Path,
) -> None:
    async with cluster(tmp_path, 1, days(LIFE_S)) as it:
        agent = it.agents["node-1"]
        kept = (tmp_path / "node-1" / "cert.pem").read_bytes()
        it.replica.leading = False
        with pytest.raises(Unavailable):
            await renewal(it, agent).renew_now()
        assert (tmp_path / "node-1" / "cert.pem").read_bytes() == kept
        it.replica.leading = True
        await renewal(it, agent).renew_now()
        assert (tmp_path / "node-1" / "cert.pem").read_bytes() != kept
        assert agent.credentials.serial == 1


def test_it_is_due_when_less_than_a_third_of_the_life_is_left(tmp_path: Path) -> None:
    write_identity(tmp_path, issue(create_ca(), "node-1", days=30))
    begins = datetime.datetime.now(datetime.UTC)
    for after_days, due in ((0, False), (19.9, False), (20.1, True), (31, True)):
        now = begins + datetime.timedelta(days=after_days)
        kept = NodeIdentity("node-1", tmp_path, lambda now=now: now)  # type: ignore[misc]  # the default binds it
        assert (kept.due_in_s() < 0) is due
    assert kept.left_s() < 0


def test_what_was_not_asked_for_is_not_kept(tmp_path: Path) -> None:
    ca = create_ca()
    write_identity(tmp_path, issue(ca, "node-1"))
    before = (tmp_path / "cert.pem").read_bytes()
    kept = NodeIdentity("node-1", tmp_path)
    csr = kept.request()
    other, own = create_ca(), CsrSigner()
    for wrong in (
        own.sign(other.cert_pem, other.key_pem, csr, "node-1", ()),  # another authority's
        issue(ca, "node-1").cert_pem,  # another key's
        issue(ca, "node-2").cert_pem,
        CsrSigner(days(-1)).sign(ca.cert_pem, ca.key_pem, csr, "node-1", ()),  # over already
        b"nothing",
    ):
        with pytest.raises(CertificateError):
            kept.keep(wrong)
    assert (tmp_path / "cert.pem").read_bytes() == before
    good = own.sign(ca.cert_pem, ca.key_pem, csr, "node-1", ())
    kept.keep(good)
    assert load_identity(tmp_path).cert_pem == good


_WRITER = """
import sys
from pathlib import Path
from reconciler.edge.certificates import create_ca, issue, write_identity
ca = create_ca()
pair = [issue(ca, "node-1"), issue(ca, "node-1")]
write_identity(Path(sys.argv[1]), pair[0])
print("begins", flush=True)
while True:
    for identity in pair:
        write_identity(Path(sys.argv[1]), identity)
"""


def test_a_kill_in_the_middle_of_a_renewal_leaves_a_pair_that_loads(tmp_path: Path) -> None:
    for number in range(8):
        folder = tmp_path / str(number)
        with subprocess.Popen([sys.executable, "-c", _WRITER, str(folder)], cwd=Path.cwd(),
                              stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"begins\n"
            for _ in range(20):  # while it is being replaced, it always is a pair
                load_identity(folder)
            os.kill(writer.pid, signal.SIGKILL)
            writer.wait()
        assert load_identity(folder).cert_pem
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(
            folder / "cert.pem", folder / "key.pem")


async def test_a_certificate_that_ended_opens_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path) as it:
        agent = it.agents["node-1"]
        ended = credentials(issue(it.ca, "node-1", (HOST,), days=days(-5)))
        async with ended.channel(agent.address, "node-1") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await channel.unary_unary(
                    f"/{SERVICE}/{CLUSTER_KEY}", request_serializer=encode)(Nothing())
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
