"""The DNS process, asked by `dig`: from the host, from a namespace, over UDP and TCP."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import cast

import dns.flags
import dns.message
import pytest

from reconciler.edge.dns import Allocation, Service, Zone
from reconciler.edge.dns_feed import DnsFailed, DnsNotBound, DnsProcess, DnsSilent, Listener

DEADLINE_S = 30.0
HOST = "127.0.0.1"

FEEDER = """
import asyncio, sys
from pathlib import Path
from reconciler.edge.dns import Service, Zone
from reconciler.edge.dns_feed import DnsProcess, Listener
async def main():
    listener = Listener("127.0.0.1", int(sys.argv[2]))
    process = DnsProcess(Path(sys.argv[1]), (listener,), (sys.argv[3],))
    await process.ensure_running()
    await process.publish(1, Zone({"web": Service("10.97.0.9", 80)}))
    print("fed", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def zone(vip: str) -> Zone:
    return Zone({"web": Service(vip, 8080)}, {"web-aaaaaa": Allocation("10.77.1.5", "web")})


def free_port() -> int:
    """A port that is free for UDP and TCP on the loopback addresses."""
    with socket.socket() as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        tcp.bind((HOST, 0))
        udp.bind((HOST, tcp.getsockname()[1]))
        return int(tcp.getsockname()[1])


def processes(served: Path) -> list[int]:
    """The DNS processes of a folder: each has it as its working directory."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if b"reconciler.edge.dnsserver" in words:
                found += [int(entry.name)] if os.readlink(entry / "cwd") == str(served) else []
        except OSError:
            continue
    return found


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


async def dig(port: int, *question: str, at: str = HOST, netns: str = "") -> str:
    """dig's output; each question once, with patience."""
    inside = ["nsenter", f"--net=/run/netns/{netns}"] if netns else []
    process = await asyncio.create_subprocess_exec(
        *inside, "dig", f"@{at}", "-p", str(port), "+tries=1", "+time=20", *question,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    return (await process.communicate())[0].decode()


async def short(port: int, *question: str, at: str = HOST, netns: str = "") -> str:
    return (await dig(port, "+short", *question, at=at, netns=netns)).strip()


def status(answer: str) -> str:
    found = re.search(r"status: (\w+)", answer)
    return found[1] if found else ""


async def until(fact: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not fact():  # a fact about another process sets no event
            await asyncio.sleep(0.005)


class Upstream(asyncio.DatagramProtocol):
    """Somebody else's name server: any A is 192.0.2.1, `big.*` needs TCP, `silent.*` nothing."""

    def __init__(self) -> None:
        self.sources: list[int] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.sources.append(addr[1])
        reply = self.reply(data, truncate=True)
        if reply:
            forged = reply.replace(bytes((192, 0, 2, 1)), bytes((203, 0, 113, 6)))
            self.transport.sendto(bytes((reply[0] ^ 1, reply[1])) + forged[2:], addr)
            self.transport.sendto(reply, addr)

    async def stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        data = await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
        reply = self.reply(data, truncate=False)
        writer.write(len(reply).to_bytes(2) + reply)
        await writer.drain()
        writer.close()

    def reply(self, data: bytes, truncate: bool) -> bytes:
        query = dns.message.from_wire(data)
        name = str(query.question[0].name)
        if name.startswith("silent."):
            return b""
        response = dns.message.make_response(query)
        if name.startswith("big.") and truncate:
            response.flags |= dns.flags.TC
        else:
            response.answer.append(dns.rrset.from_text(name, 60, "IN", "A", "192.0.2.1"))
        return response.to_wire()


@pytest.fixture
async def upstream() -> AsyncIterator[tuple[str, Upstream]]:
    port = free_port()
    server = Upstream()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(lambda: server, local_addr=(HOST, port))
    streams = await asyncio.start_server(server.stream, HOST, port)
    yield f"{HOST}:{port}", server
    transport.close()
    streams.close()
    await streams.wait_closed()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Longer than the 107 bytes that a unix socket's path may have."""
    return tmp_path / ("deep" * 30) / "node-1"


@pytest.fixture
async def served(
    folder: Path, upstream: tuple[str, Upstream]
) -> AsyncIterator[tuple[DnsProcess, int]]:
    port = free_port()
    process = DnsProcess(folder, (Listener(HOST, port),), (upstream[0],))
    await process.ensure_running()
    yield process, port
    await process.stop()
    assert processes(folder) == []


async def test_dig_gets_every_kind_of_answer_over_udp_and_tcp(
    served: tuple[DnsProcess, int],
) -> None:
    process, port = served
    await process.publish(7, zone("10.97.0.1"))
    for way in ("+notcp", "+tcp"):
        assert await short(port, way, "web.mill") == "10.97.0.1"
        assert await short(port, way, "web-aaaaaa.web.mill") == "10.77.1.5"
        assert await short(port, way, "_http._tcp.web.mill", "SRV") == "0 0 8080 web.mill."
        assert status(await dig(port, way, "web.mill", "AAAA")) == "NOERROR"
        assert await short(port, way, "web.mill", "AAAA") == ""
        assert status(await dig(port, way, "api.mill")) == "NXDOMAIN"
        assert await short(port, way, "www.example.com") == "192.0.2.1"


async def test_the_command_line_names_the_program_but_no_node(
    served: tuple[DnsProcess, int], folder: Path
) -> None:
    (pid,) = processes(folder)
    assert "node-1" not in command_line(pid)


async def test_before_the_first_zone_mill_fails_and_the_world_is_forwarded(
    served: tuple[DnsProcess, int],
) -> None:
    _, port = served
    assert status(await dig(port, "web.mill")) == "SERVFAIL"
    assert await short(port, "www.example.com") == "192.0.2.1"


async def test_an_acknowledged_zone_answers_the_very_next_query(
    served: tuple[DnsProcess, int],
) -> None:
    process, port = served
    for index in range(1, 6):
        await process.publish(index, zone(f"10.97.0.{index}"))
        assert await short(port, "web.mill") == f"10.97.0.{index}"
    await process.publish(2, zone("10.97.0.99"))  # older: what is newer stays
    assert await short(port, "web.mill") == "10.97.0.5"


async def test_a_forwarded_answer_that_is_too_long_comes_over_tcp(
    served: tuple[DnsProcess, int],
) -> None:
    answer = await dig(served[1], "big.example.com")
    assert "retrying in TCP mode" in answer
    assert "192.0.2.1" in answer


async def test_each_forwarded_query_leaves_from_another_port(
    served: tuple[DnsProcess, int], upstream: tuple[str, Upstream]
) -> None:
    await asyncio.gather(*(dig(served[1], f"n{number}.example.com") for number in range(5)))
    assert len(set(upstream[1].sources)) > 1


async def test_a_silent_upstream_is_a_server_failure_and_blocks_nobody(
    served: tuple[DnsProcess, int],
) -> None:
    process, port = served
    await process.publish(1, zone("10.97.0.1"))
    waiting = asyncio.create_task(dig(port, "silent.example.com"))
    assert await short(port, "web.mill") == "10.97.0.1"
    assert not waiting.done()
    assert status(await waiting) == "SERVFAIL"


async def test_the_next_upstream_answers_where_the_first_refuses(
    folder: Path, upstream: tuple[str, Upstream]
) -> None:
    port = free_port()
    process = DnsProcess(folder, (Listener(HOST, port),), (f"{HOST}:1", upstream[0]))
    try:
        await process.ensure_running()
        assert await short(port, "+notcp", "www.example.com") == "192.0.2.1"
        assert await short(port, "+tcp", "www.example.com") == "192.0.2.1"
    finally:
        await process.stop()


async def test_names_go_on_while_nobody_feeds_and_a_new_feeder_takes_over(
    folder: Path, upstream: tuple[str, Upstream]
) -> None:
    port = free_port()
    feeder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FEEDER, str(folder), str(port), upstream[0],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    following = DnsProcess(folder, (Listener(HOST, port),), (upstream[0],))
    try:
        assert feeder.stdout is not None
        assert (await feeder.stdout.readline()) == b"fed\n"
        before = processes(folder)
        feeder.kill()
        await feeder.wait()
        assert await short(port, "web.mill") == "10.97.0.9"
        await following.ensure_running()
        assert await short(port, "web.mill") == "10.97.0.9"
        await following.publish(2, zone("10.97.0.1"))
        assert await short(port, "web.mill") == "10.97.0.1"
        assert processes(folder) == before
    finally:
        await following.stop()


async def test_a_killed_process_comes_back_with_the_newest_zone(
    served: tuple[DnsProcess, int], folder: Path
) -> None:
    process, port = served
    await process.publish(1, zone("10.97.0.1"))
    (pid,) = processes(folder)
    os.kill(pid, signal.SIGKILL)
    await until(lambda: processes(folder) not in ([], [pid]))
    async with asyncio.timeout(DEADLINE_S):
        while await short(port, "web.mill") != "10.97.0.1":
            pass
    await process.publish(2, zone("10.97.0.2"))
    assert await short(port, "web.mill") == "10.97.0.2"


async def test_a_zone_that_nobody_takes_is_told_and_delivered_later(folder: Path) -> None:
    port = free_port()
    process = DnsProcess(folder, (Listener(HOST, port),), (f"{HOST}:1",))
    try:
        with pytest.raises(DnsSilent, match="index 3"):
            await process.publish(3, zone("10.97.0.3"), timeout_s=0.01)
        await process.ensure_running()
        await process.publish(3, zone("10.97.0.3"))
        assert await short(port, "web.mill") == "10.97.0.3"
    finally:
        await process.stop()


async def test_other_listeners_replace_the_process(folder: Path) -> None:
    first, second = free_port(), free_port()
    before = DnsProcess(folder, (Listener(HOST, first),), (f"{HOST}:1",))
    after = DnsProcess(folder, (Listener(HOST, second),), (f"{HOST}:1",))
    try:
        await before.ensure_running()
        await before.close()
        await after.ensure_running()
        await after.publish(1, zone("10.97.0.1"))
        assert await short(second, "web.mill") == "10.97.0.1"
        assert len(processes(folder)) == 1
        with socket.socket() as again:
            again.bind((HOST, first))
    finally:
        await after.stop()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
async def test_an_address_that_is_taken_is_told(folder: Path, kind: int) -> None:
    port = free_port()
    with socket.socket(type=kind) as holder:
        holder.bind((HOST, port))
        if kind == socket.SOCK_STREAM:
            holder.listen()
        process = DnsProcess(folder, (Listener(HOST, port),))
        with pytest.raises(DnsNotBound, match="Address already in use") as caught:
            await process.ensure_running()
    assert caught.value.at == f"{HOST}:{port}"
    assert processes(folder) == []
    await process.ensure_running()  # the same call, once the port is free
    await process.stop()
    await process.stop()


async def test_a_namespace_that_is_not_there_is_told(folder: Path) -> None:
    process = DnsProcess(folder, (Listener("10.77.1.1", 53, "/run/netns/mill-none"),))
    with pytest.raises(DnsNotBound, match="No such file") as caught:
        await process.ensure_running()
    assert caught.value.at == "10.77.1.1:53 in /run/netns/mill-none"


async def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DnsFailed, match="Not a directory"):
        await DnsProcess(tmp_path / "file" / "dns", ()).ensure_running()


@pytest.fixture
def netns() -> Iterator[str]:
    name = f"mill-dns-{os.getpid()}"
    make_namespace(name)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


def make_namespace(name: str) -> None:
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "-n", name, "addr", "add", "10.77.1.1/24", "dev", "lo"], check=True)


def remake_namespace(name: str) -> None:
    subprocess.run(["ip", "netns", "del", name], check=True)
    make_namespace(name)


@pytest.mark.containers
async def test_one_process_answers_in_a_namespace_and_on_the_host(
    folder: Path, upstream: tuple[str, Upstream], netns: str
) -> None:
    port = free_port()
    path = f"/run/netns/{netns}"
    listeners = (Listener(HOST, port), Listener("10.77.1.1", 53, path))
    process = DnsProcess(folder, listeners, (upstream[0],))
    try:
        await process.ensure_running()
        await process.publish(1, zone("10.97.0.1"))
        for way in ("+notcp", "+tcp"):
            assert await short(port, way, "web.mill") == "10.97.0.1"
            inside = await short(53, way, "web.mill", at="10.77.1.1", netns=netns)
            assert inside == "10.97.0.1"
            # Forwarded from where the process is, although nothing leads out of the namespace.
            outside = await short(53, way, "www.example.com", at="10.77.1.1", netns=netns)
            assert outside == "192.0.2.1"
    finally:
        await process.stop()


@pytest.mark.containers
async def test_a_namespace_made_anew_is_listened_in_again(folder: Path, netns: str) -> None:
    listener = Listener("10.77.1.1", 53, f"/run/netns/{netns}")
    process = DnsProcess(folder, (listener,), (f"{HOST}:1",))
    try:
        await process.ensure_running()
        await process.publish(1, zone("10.97.0.1"))
        remake_namespace(netns)
        await process.ensure_running()
        await process.publish(1, zone("10.97.0.1"))
        assert await short(53, "web.mill", at="10.77.1.1", netns=netns) == "10.97.0.1"
    finally:
        await process.stop()
