"""Machines of a lab with a node on each, and sockets that stand for containers."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

from reconciler.executor.containerd import network
from reconciler.executor.containerd import network_namespace as namespace
from reconciler.executor.containerd.network import Layout, Vxlan, socket_in
from tests.machines.lab import Lab

DEADLINE_S = 20.0
CUT_S = 0.5  # that long nothing arrives; what is not cut arrives within milliseconds


class World:
    """Machines of a lab, a node on each; its calls are made in the machines' namespaces."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.nodes = {
            machine.number: Layout(
                secrets.token_hex(4),
                f"node-{machine.number}",
                machine.number,
                overlay=Vxlan(machine.address),
            )
            for machine in lab.machines
        }
        self.hosts = {machine.number: machine.address for machine in lab.machines}

    def on(self, number: int, work: Coroutine[Any, Any, Any]) -> None:
        """Run to its end as an agent on that machine would."""
        namespace.inside(Path(self.lab.machine(number).netns), lambda: asyncio.run(work))

    def up(self, *numbers: int) -> None:
        for number in numbers:
            self.on(number, network.ensure_node(self.nodes[number]))
            self.peers(number, *numbers)

    def peers(self, number: int, *numbers: int) -> None:
        hosts = {peer: self.hosts[peer] for peer in numbers}
        self.on(number, network.ensure_peers(self.nodes[number], hosts))

    def container(self, number: int, alloc: str = "web-aaaaaa") -> str:
        address = f"10.77.{number}.10"
        self.on(number, network.ensure_container(self.nodes[number], alloc, address))
        return self.nodes[number].container_path(alloc)

    def sweep(self) -> None:
        for number, layout in self.nodes.items():
            self.on(number, network.sweep(layout.tag))


def bound(netns: str, address: str, kind: int = socket.SOCK_STREAM, port: int = 0) -> socket.socket:
    server = socket_in(netns, socket.AF_INET, kind)
    server.settimeout(DEADLINE_S)
    server.bind((address, port))
    if kind == socket.SOCK_STREAM:
        server.listen()
    return server


def arrives_as(from_: str, to: str, address: str, port: int = 0) -> str:
    """The source address with which a connection from one namespace reaches another."""
    with (
        closing(bound(to, address, port=port)) as server,
        closing(socket_in(from_, socket.AF_INET, socket.SOCK_STREAM)) as client,
    ):
        client.settimeout(DEADLINE_S)
        client.connect(server.getsockname())
        accepted, source = server.accept()
        accepted.close()
        return str(source[0])


def gets_through(from_: str, to: str, address: str, timeout_s: float = DEADLINE_S) -> bool:
    """Whether a datagram arrives, without an answer; it is sent again and again meanwhile."""
    with (
        closing(bound(to, address, socket.SOCK_DGRAM)) as server,
        closing(socket_in(from_, socket.AF_INET, socket.SOCK_DGRAM)) as client,
    ):
        server.settimeout(0.1)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # a route that says unreachable, or silence
                client.sendto(b"here", server.getsockname())
                return server.recv(10) == b"here"
        return False


@contextlib.contextmanager
def connection(from_: str, to: str, address: str) -> Iterator[Callable[[bytes], bytes]]:
    """An open connection; calling it sends a body and returns what the far side received."""
    with (
        closing(bound(to, address)) as server,
        closing(socket_in(from_, socket.AF_INET, socket.SOCK_STREAM)) as client,
        ThreadPoolExecutor(1) as sender,
    ):
        client.settimeout(DEADLINE_S)
        client.connect(server.getsockname())
        with closing(server.accept()[0]) as accepted:
            accepted.settimeout(DEADLINE_S)

            def carry(body: bytes) -> bytes:
                sent = sender.submit(client.sendall, body)
                got = bytearray()
                while len(got) < len(body) and (more := accepted.recv(1 << 16)):
                    got += more
                sent.result(DEADLINE_S)
                return bytes(got)

            yield carry
