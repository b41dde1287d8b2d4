"""The fixtures of this folder; what they are made of is in the modules beside it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from reconciler.git.poll import Poller
from tests.git.following import World, leading, rise
from tests.git.git_fixtures import dripping, poller, repository, server
from tests.git.small_cluster import SmallExecutor, small_ledger

__all__ = ["dripping", "poller", "repository", "server"]


@pytest.fixture
async def idle(poller: Poller) -> World:
    """A leader whose loop does not run yet."""
    ledger, replica = small_ledger()
    return rise(ledger, replica, SmallExecutor(ledger), poller)


@pytest.fixture
async def world(idle: World) -> AsyncIterator[World]:
    """A leader that follows its sources."""
    async with leading(idle):
        yield idle
