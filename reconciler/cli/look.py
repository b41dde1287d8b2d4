"""What there is: status, services, nodes, allocations, events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import click

from reconciler.cli.deploys import SHORT, origin
from reconciler.cli.output import age, cores, document, json_line, lines, memory, seconds, table
from reconciler.cli.problems import shown, warn
from reconciler.cli.session import ask
from reconciler.cli.settings import Command, Settings, pass_settings
from reconciler.errors import MillError

if TYPE_CHECKING:
    from reconciler.api.client import Client
    from reconciler.api.types import (
        AllocationRow,
        EventList,
        EventRow,
        NodeList,
        NodeRow,
        ServiceList,
        ServiceRow,
        SourceRow,
        StatusAnswer,
    )

T = TypeVar("T")
NO_MAJORITY = 503
NODE_HEADS = ("NODE", "STATUS", "ROLE", "CPU", "MEMORY", "ALLOCATIONS", "SEEN", "ADDRESS")
SERVICE_HEADS = ("SERVICE", "IMAGE", "REVISION", "HEALTHY", "OWNER")
SOURCE_HEADS = ("SOURCE", "STATUS", "SINCE", "APPLIED", "HEAD", "REASON")
ALLOC_HEADS = ("ALLOCATION", "SERVICE", "NODE", "STATUS", "ADDRESS", "CPU", "MEMORY", "REVISION",
               "RESTARTS", "AGE", "REASON")


@click.command(cls=Command)
@click.option("--at", type=click.IntRange(min=1), metavar="INDEX",
              help="as it was after this log index")
@pass_settings
def status(settings: Settings, at: int | None) -> None:
    """The cluster at a glance, now or at an index that the log still holds."""
    async def work(client: Client) -> StatusAnswer:
        return await _or_stale(settings, lambda stale: client.status(stale=stale, at=at))

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    else:
        lines(_status(answer))


@click.command(cls=Command)
@pass_settings
def services(settings: Settings) -> None:
    """What runs."""
    async def work(client: Client) -> ServiceList:
        return await client.services()

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    else:
        lines(table(SERVICE_HEADS, list(map(_service, answer.services)), quiet=settings.quiet))


@click.command(cls=Command)
@pass_settings
def nodes(settings: Settings) -> None:
    """The machines, and what is reserved of them."""
    async def work(client: Client) -> NodeList:
        return await _or_stale(settings, lambda stale: client.nodes(stale=stale))

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    else:
        lines(table(NODE_HEADS, list(map(_node, answer.nodes)), quiet=settings.quiet))
        for warning in answer.warnings or ():
            warn(warning, settings)


@click.command(cls=Command)
@pass_settings
def ps(settings: Settings) -> None:
    """Every allocation."""
    async def work(client: Client) -> ServiceList:
        return await _or_stale(settings, lambda stale: client.services(stale=stale))

    answer = ask(settings, work)
    pairs = [(service, alloc) for service in answer.services for alloc in service.allocations]
    if settings.json:
        document({"index": answer.index, **({"stale": True} if answer.stale is True else {}),
                  "allocations": [{"service": service.name, **_fields(alloc)}
                                  for service, alloc in pairs]})
    else:
        lines(table(ALLOC_HEADS, [_alloc(service, alloc) for service, alloc in pairs],
                    quiet=settings.quiet))


@click.command(cls=Command)
@click.option("-f", "--follow", is_flag=True, help="go on with what happens")
@click.option("-n", "--limit", type=click.IntRange(1, 10_000), default=1_000, show_default=True)
@click.option("--after", type=click.IntRange(min=0), metavar="INDEX", help="only what came later")
@pass_settings
def events(settings: Settings, follow: bool, limit: int, after: int | None) -> None:
    """What happened, oldest first."""
    if follow:
        ask(settings, lambda client: _follow(settings, client, after))
        return

    async def work(client: Client) -> EventList:
        return await client.events(after, limit)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    else:
        lines([event_line(row) for row in answer.events])


async def _follow(settings: Settings, client: Client, after: int | None) -> None:
    async for row in client.follow_events(after):
        if settings.json:
            json_line(row)
        else:
            click.echo(event_line(row))


async def _or_stale(settings: Settings, read: Callable[[bool], Awaitable[T]]) -> T:
    """A read; where no majority stands behind it, what the node that answers knows."""
    try:
        return await read(False)
    except MillError as error:
        if error.status != NO_MAJORITY:
            raise
        refused = error
    try:
        answer = await read(True)
    except MillError:
        raise refused from None
    warn(f"{refused.what}; this is what one node knows, and may be old", settings)
    return answer


def event_line(row: EventRow) -> str:
    """One fact for a person: index, time, deploy, what."""
    data = {key: str(value) for key, value in row.data.items() if value not in ("", None, [])}
    match row.event, data.pop("phase", ""):
        case "progress", "note":
            said = data.get("message", "")
            what = f"{data.get('kind', '').replace('_', ' ')}: {data.get('subject', '')}" \
                + (f" ({said})" if said else "")
        case "progress", phase:
            what = " ".join([phase, *(f"{key}={value}" for key, value in data.items())])
        case kind, _:
            data.pop("logs", None)
            what = " ".join([kind, *(f"{key}={value}" for key, value in data.items())])
    return shown(f"{row.index:>6}  {row.at}  {row.deploy or '-':<6}  {what}")


def _fields(alloc: AllocationRow) -> dict[str, object]:
    import msgspec

    return msgspec.structs.asdict(alloc)


def _status(answer: StatusAnswer) -> list[str]:
    leader = f"led by {answer.leader}" if answer.leader else "no leader"
    count = len(answer.nodes)
    when = f"as of {answer.at}" if isinstance(answer.at, str) else f"{leader}, term {answer.term}"
    found = [f"{shown(answer.cluster)}: {count} node{'' if count == 1 else 's'}, {when}, "
             f"index {answer.index}"]
    found += [f"warning: {shown(warning)}" for warning in answer.warnings]
    if answer.deploy is not None:
        running = answer.deploy
        found.append(f"{running.id} ({shown(origin(running))}): "
                     f"{running.outcome.replace('_', ' ')} for {seconds(running.elapsed)}")
    found += ["", *table(NODE_HEADS, list(map(_node, answer.nodes)))]
    if answer.services:
        found += ["", *table(SERVICE_HEADS, list(map(_service, answer.services)))]
    if answer.sources:
        found += ["", *table(SOURCE_HEADS, list(map(source_row, answer.sources)))]
    return found


def _node(row: NodeRow) -> tuple[str, ...]:
    role = "leader" if row.leader else "voter" if row.voter else "learner"
    return (row.name, row.status, role, f"{cores(row.cpu.used)}/{cores(row.cpu.total)}",
            f"{memory(row.memory.used)}/{memory(row.memory.total)}", str(row.allocations),
            age(row.last_seen), row.address)


def _service(row: ServiceRow) -> tuple[str, ...]:
    owner = row.owner + (" (diverged)" if row.diverged else "")
    return (row.name, row.image, str(row.revision or "-"),
            f"{row.replicas.healthy}/{row.replicas.desired}", owner)


def source_row(row: SourceRow) -> tuple[str, ...]:
    """A source in a table."""
    return (row.name, row.status, age(row.since), row.applied[:SHORT] or "-",
            row.head[:SHORT] or "-", row.reason.replace("\n", "; "))


def _alloc(service: ServiceRow, row: AllocationRow) -> tuple[str, ...]:
    return (row.id, service.name, row.node, row.status, row.address, cores(row.cpu),
            memory(row.memory), str(row.revision), str(row.restarts), age(row.started_at),
            row.reason)
