"""`mill drain`, `undrain`, `remove`: nodes out of service, back into it, out of the cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from reconciler.cli.output import document, json_line, seconds
from reconciler.cli.problems import shown, warn
from reconciler.cli.session import ask
from reconciler.cli.settings import Command, Settings, pass_settings

if TYPE_CHECKING:
    from reconciler.api.client import Client, Step
    from reconciler.api.types import NodeAnswer, Removed

INTERRUPTED = 130


@click.command(cls=Command)
@click.argument("node")
@click.option("--timeout", default="10m", show_default=True, metavar="10m",
              help="how long it may take until it counts as failed")
@pass_settings
def drain(settings: Settings, node: str, timeout: str) -> int:
    """Move everything off a node, and nothing new onto it, until mill undrain."""
    async def work(client: Client) -> int:
        return await _watch(settings, client, node, timeout)

    try:
        return ask(settings, work)
    except KeyboardInterrupt:
        warn(f"the drain of {node} goes on; follow it with: mill drain {node}, "
             f"or take it back with: mill undrain {node}", settings)
        return INTERRUPTED


@click.command(cls=Command)
@click.argument("node")
@pass_settings
def undrain(settings: Settings, node: str) -> None:
    """Let a node take allocations again."""
    async def work(client: Client) -> NodeAnswer:
        return await client.undrain(node)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    elif not settings.quiet:
        click.echo(f"  {shown(answer.name)}: takes allocations again")


@click.command(cls=Command)
@click.argument("node")
@pass_settings
def remove(settings: Settings, node: str) -> None:
    """Forget a node that has no allocations left: one that was drained, or is gone for good."""
    async def work(client: Client) -> Removed:
        return await client.remove_node(node)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    elif not settings.quiet:
        click.echo(f"  {shown(answer.name)}: removed")


async def _watch(settings: Settings, client: Client, node: str, timeout: str) -> int:
    from contextlib import aclosing

    code, begun = 1, False
    async with aclosing(client.drain(node, timeout)) as steps:
        async for step in steps:
            if step.phase == "draining":
                if begun:
                    continue  # it was asked for again, of another node
                begun = True
            if settings.json:
                json_line(_flat(step))
            else:
                for line in drain_lines(step):
                    if not settings.quiet or step.phase == "failed":
                        click.echo(line)
            code = 0 if step.phase == "done" else 1
    return code


def drain_lines(step: Step) -> list[str]:
    """A step of a drain, as a deploy's transcript would say it."""
    service, node = shown(step.service), shown(step.node)
    match step.phase:
        case "draining":
            count = step.left or 0
            return [f"  draining {node} ({count} allocation{'s' * (count != 1)})..."]
        case "leader":
            return [f"  leadership moved to {node}"]
        case "moving":
            return [f"  {service}: moving to {node}"]
        case "moved":
            return [f"  {service}: moved to {node}" if node else f"  {service}: moved"]
        case "warning":
            return [f"  warning: {shown(step.reason)}"]
        case "done":
            return [f"  drained ({seconds(step.elapsed)})"]
        case "failed":
            return [f"  not drained ({seconds(step.elapsed)}): {shown(step.reason)}"]
        case _:  # of a newer version
            return []


def _flat(step: Step) -> dict[str, object]:
    """One object: what its event was called, and what it said."""
    import msgspec

    said = {key: value for key, value in msgspec.structs.asdict(step).items()
            if value not in ("", None, ())}
    if step.phase in ("done", "failed"):
        del said["phase"]
        return {"event": step.phase, **said}
    return {"event": "progress", **said}
