"""`mill git`: the repositories that the cluster follows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli import manifests
from reconciler.cli.look import SOURCE_HEADS, source_row
from reconciler.cli.output import age, document, lines, table
from reconciler.cli.problems import shown
from reconciler.cli.session import ask
from reconciler.cli.settings import Group, Settings, pass_settings

if TYPE_CHECKING:
    from reconciler.api.client import Client
    from reconciler.api.types import Removed, SourceAnswer, SourceList


@click.group(cls=Group)
def git() -> None:
    """Repositories that the cluster follows: what the branch says is what runs."""


@git.command("add")
@click.argument("name")
@click.argument("url")
@click.option("--branch", default="main", show_default=True,
              help="HEAD follows what is checked out")
@click.option("--path", "folder", default="/", show_default=True,
              help="the folder of the manifests in the repository")
@click.option("--poll", default="10s", show_default=True, help="how often to look")
@click.option("--secret-ref", default="", metavar="NAME",
              help="the secret with user:password or a token")
@click.option("--var", "pairs", multiple=True, metavar="NAME=VALUE", help="for ${var.NAME}")
@pass_settings
def add(
    settings: Settings, name: str, url: str, branch: str, folder: str, poll: str,
    secret_ref: str, pairs: tuple[str, ...],
) -> None:
    """Follow a repository from now on."""
    from reconciler.api.types import SourceBody

    body = SourceBody(name=name, url=_full(url), branch=branch, path=folder, poll=poll,
                      secret_ref=secret_ref, variables=manifests.variables(pairs))

    async def work(client: Client) -> SourceAnswer:
        return await client.add_source(body)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    elif not settings.quiet:
        click.echo(f"  {shown(answer.name)}: follows {shown(answer.branch)} of "
                   f"{shown(answer.url)}; look with: mill git show {shown(answer.name)}")


@git.command("list")
@pass_settings
def list_(settings: Settings) -> None:
    """All sources."""
    async def work(client: Client) -> SourceList:
        return await client.sources()

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    else:
        lines(table(SOURCE_HEADS, list(map(source_row, answer.sources)), quiet=settings.quiet))


@git.command("show")
@click.argument("name")
@pass_settings
def show(settings: Settings, name: str) -> None:
    """A source: how far the cluster has come with it, or why not and since when."""
    async def work(client: Client) -> SourceAnswer:
        return await client.source(name)

    _show(settings, ask(settings, work))


@git.command("sync")
@click.argument("name")
@click.option("--allow-empty", is_flag=True, help="even where that removes every service")
@click.option("--retry", is_flag=True, help="even a commit that was rolled back")
@pass_settings
def sync(settings: Settings, name: str, allow_empty: bool, retry: bool) -> None:
    """Look at a repository now."""
    async def work(client: Client) -> SourceAnswer:
        return await client.sync_source(name, allow_empty=allow_empty, retry=retry)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    elif not settings.quiet:
        click.echo(f"  {shown(answer.name)}: looks now; see with: mill git show "
                   f"{shown(answer.name)}")


@git.command("remove")
@click.argument("name")
@click.option("--prune", is_flag=True, help="its services too; else they stay as manual ones")
@pass_settings
def remove(settings: Settings, name: str, prune: bool) -> None:
    """Follow a repository no more."""
    async def work(client: Client) -> Removed:
        return await client.remove_source(name, prune=prune)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    elif not settings.quiet:
        click.echo(f"  {shown(answer.name)}: removed")


def _full(url: str) -> str:
    """A folder by its full path, as the nodes must find it; anything else as it is."""
    if url in (".", "..") or url.startswith(("./", "../", "~")):
        return str(Path(url).expanduser().resolve())
    return url


def _show(settings: Settings, source: SourceAnswer) -> None:
    if settings.json:
        document(source)
        return
    since = f" since {source.since} ({age(source.since)})" if source.since else ""
    found = [f"{shown(source.name)}: {source.status}{since}"]
    heads = ["  reason     ", *["             "] * source.reason.count("\n")]
    told = zip(heads, source.reason.split("\n"), strict=True)
    found += [f"{head}{shown(line)}" for head, line in told] if source.reason else []
    found += [
        f"  url        {shown(source.url)}",
        f"  branch     {shown(source.branch)}",
        f"  path       {shown(source.path)}",
        f"  head       {source.head or '-'}",
        f"  applied    {source.applied or '-'}",
        f"  poll       every {source.poll}",
        f"  next poll  {source.next_poll or '-'}",
    ]
    found += [f"  secret     {shown(source.secret_ref)}"] if source.secret_ref else []
    found += [f"  var        {shown(key)}={shown(value)}"
              for key, value in sorted(source.variables.items())]
    lines(found)
