"""One command's time with its cluster: a client that is opened, asked and closed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from reconciler.cli.contexts import find
from reconciler.cli.settings import Settings

if TYPE_CHECKING:
    from reconciler.api.client import Client

T = TypeVar("T")


def ask(settings: Settings, work: Callable[[Client], Awaitable[T]]) -> T:
    """What `work` finds with a client of the cluster that the settings name."""
    import asyncio

    from reconciler.api.client import Client

    cluster = find(settings)

    async def inside() -> T:
        async with Client(cluster.addresses, cluster.token, cluster.ca_pem()) as client:
            return await work(client)

    return asyncio.run(inside())
