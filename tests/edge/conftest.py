"""A real Envoy per test, in a folder of its own, ended whatever happens."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import pytest_asyncio

from reconciler.edge.ads import AdsServer, Publication
from reconciler.edge.certificates import Authority, create_ca, issue
from reconciler.edge.envoy import EnvoyProcess
from reconciler.edge.listeners import Ingress
from reconciler.edge.resources import ResourceBuilder
from reconciler.edge.table import EdgeTable
from tests.edge.backends import next_address


class Served(NamedTuple):
    """An Envoy with its agent side, without the loop that follows a state."""

    envoy: EnvoyProcess
    ads: AdsServer
    builder: ResourceBuilder
    ingress: Ingress
    authority: Authority
    index: list[int]

    async def publish(self, table: EdgeTable, deadline_s: float = 20.0) -> Publication:
        self.index[0] += 1
        return await self.ads.publish(self.index[0], self.builder.build(table), deadline_s)

    async def get(self, host: str, path: str = "/", **headers: str) -> httpx.Response:
        url = f"http://{self.ingress.address}:{self.ingress.http_port}{path}"
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            return await client.get(url, headers={"host": host, **headers}, timeout=20)


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def new_ingress() -> Ingress:
    address = next_address()
    return Ingress(address, free_port(address), free_port(address))


@pytest_asyncio.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    ingress, authority = new_ingress(), create_ca()
    certificate = issue(authority, "edge.test", (ingress.address,), names=("app.example.com",))
    builder = ResourceBuilder(ingress, certificate)
    ads, envoy = AdsServer(), EnvoyProcess(tmp_path / "edge")
    try:
        await ads.start(envoy.xds_socket, 0, builder.build(EdgeTable()))
        await envoy.ensure_running()
        await envoy.ready(60)
        yield Served(envoy, ads, builder, ingress, authority, [0])
    finally:
        await envoy.stop()
        await ads.stop()


@pytest.fixture
def ingress() -> Ingress:
    return new_ingress()
