"""`mill logs`: what containers wrote."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING

import click

from reconciler.cli.output import json_line
from reconciler.cli.problems import shown, warn
from reconciler.cli.session import ask
from reconciler.cli.settings import Command, Settings, pass_settings
from reconciler.errors import MillError

if TYPE_CHECKING:
    from reconciler.api.client import Client
    from reconciler.api.types import LogRow

DEFAULT_TAIL = 100
MAX_TAIL = 10_000
"""As many as the API gives of one allocation."""
NOT_FOUND, UNAVAILABLE = 404, 503
RESUMES, RESUME_PAUSE_S = 60, 1.0
RESUME_TAIL = 1_000
"""Lines of each allocation that may be written while no node gives them."""
REMARK = "mill"
"""The stream of a line that no container wrote."""


@click.command(cls=Command)
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="go on with each new line")
@click.option("-n", "--tail", type=click.IntRange(0, MAX_TAIL), default=DEFAULT_TAIL,
              show_default=True, help="lines of each allocation to begin with")
@click.option("--previous", is_flag=True, help="of the allocations that ended last")
@click.option("--all", "everything", is_flag=True, help=f"from the first line, up to {MAX_TAIL}")
@pass_settings
def logs(
    settings: Settings, name: str, follow: bool, tail: int, previous: bool, everything: bool
) -> None:
    """What a service or an allocation wrote; of several, each line with its allocation."""
    async def work(client: Client) -> None:
        several = await _several(client, name, previous)
        first = ""
        rows = resumed(client, name, MAX_TAIL if everything else tail) if follow else \
            client.logs(name, tail=MAX_TAIL if everything else tail, previous=previous)
        async with aclosing(rows):
            async for row in rows:
                first = first or row.alloc
                several = several or row.alloc != first
                _print(settings, row, several)

    if follow and previous:
        raise click.UsageError("--previous ended before: there is nothing to follow")
    ask(settings, work)


async def _several(client: Client, name: str, previous: bool) -> bool:
    """Whether lines may come from more than one allocation."""
    try:
        service = await client.service(name)
    except MillError as error:
        if error.status != NOT_FOUND:
            raise
        return False  # an allocation, or nothing, which the logs themselves will say
    return len(service.ended if previous or not service.allocations else service.allocations) > 1


async def resumed(client: Client, name: str, tail: int) -> AsyncGenerator[LogRow, None]:
    """Lines as they come; where the node that gives them goes, another goes on after them."""
    import asyncio

    last: dict[str, str] = {}
    tries = 0
    while tries <= RESUMES:
        before, new = dict(last), False
        try:
            async with aclosing(client.logs(name, follow=True, tail=tail)) as rows:
                async for row in rows:
                    if row.ts > before.get(row.alloc, ""):
                        last[row.alloc] = max(row.ts, last.get(row.alloc, ""))
                        new = True
                        yield row
            if not new:
                return  # asked again after the end there was nothing more: it is the end
        except MillError as error:
            if not last or error.status not in (NOT_FOUND, UNAVAILABLE) or tries == RESUMES:
                raise  # before the first line it is no break but an answer
            if error.status == NOT_FOUND:
                return  # it was removed meanwhile
        tries = 0 if new else tries + 1
        tail = RESUME_TAIL
        await asyncio.sleep(RESUME_PAUSE_S)


def _print(settings: Settings, row: LogRow, several: bool) -> None:
    if settings.json:
        json_line(row)
    elif row.stream == REMARK:
        warn(f"{row.alloc}: {row.line}", settings)
    else:
        click.echo(f"{row.alloc} | {shown(row.line)}" if several else shown(row.line))
