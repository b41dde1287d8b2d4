"""Clusters of one and two nodes, each node with its own real server on a real socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest

from tests.api.cluster import Cluster


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    made = Cluster()
    try:
        await made.start(1)
        yield made
    finally:
        await made.stop()


@pytest.fixture
async def pair() -> AsyncIterator[Cluster]:
    """node-1 leads, node-2 follows."""
    made = Cluster()
    try:
        await made.start(2)
        yield made
    finally:
        await made.stop()


@pytest.fixture
def api(cluster: Cluster) -> httpx.AsyncClient:
    return cluster.client()
