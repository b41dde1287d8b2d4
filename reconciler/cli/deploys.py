"""Deploys that were or are: the list, one of them, and a way to end one that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from reconciler.cli.output import age, document, lines, seconds, table
from reconciler.cli.problems import shown
from reconciler.cli.progress import follow as follow_stream
from reconciler.cli.session import ask
from reconciler.cli.settings import Command, Settings, pass_settings

if TYPE_CHECKING:
    from reconciler.api.client import Client
    from reconciler.api.types import DeployAnswer, DeployList, DeployRecord

SHORT = 7
"""Digits of a commit that people read."""


@click.command(cls=Command)
@click.option("-n", "--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@pass_settings
def deploys(settings: Settings, limit: int) -> None:
    """What was deployed, newest first."""
    async def work(client: Client) -> DeployList:
        return await client.deploys(limit)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
        return
    rows = [(d.id, d.outcome, age(d.started_at), seconds(d.elapsed), origin(d), _changed(d),
             d.reason) for d in answer.deploys]
    lines(table(("DEPLOY", "OUTCOME", "AGE", "TOOK", "BY", "SERVICES", "REASON"), rows,
                quiet=settings.quiet))


@click.command(cls=Command)
@click.argument("deploy", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="its transcript, to its end")
@pass_settings
def deploy_show(settings: Settings, deploy: str, follow: bool) -> int:
    """One deploy: what it did, or with -f all that it says."""
    if follow:
        return follow_stream(settings, lambda client: client.follow_deploy(deploy))

    async def work(client: Client) -> DeployAnswer:
        return await client.deploy_record(deploy)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    else:
        lines(_shown(answer))
    return 0


@click.command(cls=Command)
@click.argument("deploy", metavar="ID")
@pass_settings
def cancel(settings: Settings, deploy: str) -> None:
    """Roll a running deploy back."""
    async def work(client: Client) -> DeployAnswer:
        return await client.cancel(deploy)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    elif not settings.quiet:
        click.echo(f"  {answer.id}: {answer.outcome.replace('_', ' ')}; follow it with: "
                   f"mill deploy-show {answer.id} -f")


def origin(record: DeployRecord) -> str:
    """Who asked for it, in a few words: `app@1a2b3c4`, `manual`, `rollback`."""
    by = record.origin
    return f"{by.source}@{by.commit[:SHORT]}" if by.kind == "git" else by.kind


def _changed(record: DeployRecord) -> str:
    names = [s.name for s in record.services if s.action != "unchanged"]
    few = 4
    more = f" and {len(names) - few} more" if len(names) > few else ""
    return ", ".join(names[:few]) + more or "-"


def _shown(record: DeployRecord) -> list[str]:
    by = record.origin
    found = [f"{record.id}: {record.outcome.replace('_', ' ')} ({seconds(record.elapsed)})",
             f"  started   {record.started_at}", f"  by        {shown(origin(record))}"]
    found += [f"  commit    {by.commit}"] if by.commit else []
    found += [f"  author    {shown(by.author)}"] if by.author else []
    found += [f"  subject   {shown(by.subject)}"] if by.subject else []
    found += [f"  reason    {shown(record.reason)}"] if record.reason else []
    for service in record.services:
        revisions = f" ({_revision(service.from_)} → {_revision(service.to)})" \
            if service.action != "unchanged" else ""
        found.append(f"  {shown(service.name)}: {service.action}{revisions}")
    return found


def _revision(number: int) -> str:
    return str(number) if number else "none"
