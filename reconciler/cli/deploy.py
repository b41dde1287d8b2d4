"""What brings a change about: deploy, and what is a deploy like any other; and its plan."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from reconciler.cli import manifests
from reconciler.cli.output import document, lines
from reconciler.cli.problems import about
from reconciler.cli.progress import follow
from reconciler.cli.render import plan_lines
from reconciler.cli.session import ask
from reconciler.cli.settings import Command, Settings, pass_settings

if TYPE_CHECKING:
    from reconciler.api.client import Client, DeployEvent, DeployOptions
    from reconciler.api.types import Detached, PlanAnswer

F = TypeVar("F", bound=Callable[..., Any])


def _manifest_options(command: F) -> F:
    for option in reversed((
        click.option("-f", "--file", "paths", multiple=True, metavar="PATH",
                     help="a file or a folder; mill.mill by default, else every *.mill here"),
        click.option("--prune", is_flag=True,
                     help="remove services that the manifests do not name"),
        click.option("--strategy", type=click.Choice(["auto", "surge", "rolling", "recreate"]),
                     help="for every service, instead of its own"),
        click.option("--timeout", metavar="5m", help="the time for pulls"),
        click.option("--var", "pairs", multiple=True, metavar="NAME=VALUE",
                     help="for ${var.NAME}; may repeat"),
    )):
        command = option(command)
    return command


@click.command(cls=Command)
@_manifest_options
@click.option("--detach", is_flag=True, help="come back as soon as it has begun")
@pass_settings
def deploy(
    settings: Settings, paths: tuple[str, ...], prune: bool, strategy: str | None,
    timeout: str | None, pairs: tuple[str, ...], detach: bool,
) -> int:
    """Make the cluster what the manifests say, all of it or nothing."""
    texts = manifests.texts(manifests.collect(paths))
    options = _options(prune, strategy, timeout, pairs)
    with about(texts):
        if detach:
            return _detached(settings, texts, options)
        return follow(settings, lambda client: client.deploy(texts, options))


@click.command(cls=Command)
@_manifest_options
@pass_settings
def plan(
    settings: Settings, paths: tuple[str, ...], prune: bool, strategy: str | None,
    timeout: str | None, pairs: tuple[str, ...],
) -> None:
    """What a deploy would do, service by service; changes nothing."""
    texts = manifests.texts(manifests.collect(paths))
    options = _options(prune, strategy, timeout, pairs)

    async def work(client: Client) -> PlanAnswer:
        return await client.plan(texts, options)

    with about(texts):
        answer = ask(settings, work)
    if settings.json:
        document(answer)
    else:
        lines(plan_lines(answer))


@click.command(cls=Command)
@click.argument("service")
@click.option("--to", type=click.IntRange(min=1), metavar="REVISION",
              help="the one before the live one by default")
@pass_settings
def rollback(settings: Settings, service: str, to: int | None) -> int:
    """Deploy an earlier revision of a service."""
    return follow(settings, lambda client: client.rollback(service, to))


@click.command(cls=Command)
@click.argument("service")
@pass_settings
def restart(settings: Settings, service: str) -> int:
    """New containers for a service, without a gap."""
    return follow(settings, lambda client: client.restart(service))


@click.command(cls=Command)
@click.argument("target", metavar="SERVICE=N")
@pass_settings
def scale(settings: Settings, target: str) -> int:
    """Another number of replicas for a service."""
    service, equals, count = target.partition("=")
    if not service or not equals or not (count.isascii() and count.isdigit()):
        raise click.UsageError(f"not SERVICE=N: {target}")

    def start(client: Client) -> AsyncGenerator[DeployEvent, None]:
        return client.scale(service, int(count))

    return follow(settings, start)


def _options(
    prune: bool, strategy: str | None, timeout: str | None, pairs: tuple[str, ...]
) -> DeployOptions:
    from reconciler.api.client import DeployOptions

    return DeployOptions(prune=prune, strategy=strategy or "", timeout=timeout or "",
                         variables=manifests.variables(pairs))


def _detached(settings: Settings, texts: dict[str, str], options: DeployOptions) -> int:
    async def work(client: Client) -> Detached:
        return await client.deploy_detached(texts, options)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    elif settings.quiet:
        click.echo(answer.id)
    else:
        click.echo(f"  {answer.id} has begun; follow it with: mill deploy-show {answer.id} -f")
    return 0
