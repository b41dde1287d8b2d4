"""A deploy's stream on the output, whoever started it, to its end and exit code."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING

import msgspec

from reconciler.cli.output import json_line
from reconciler.cli.problems import warn
from reconciler.cli.render import Transcript
from reconciler.cli.session import ask
from reconciler.cli.settings import Settings
from reconciler.errors import MillError

if TYPE_CHECKING:
    from reconciler.api.client import Client, DeployEvent

    Stream = AsyncGenerator[DeployEvent, None]

INTERRUPTED = 130
RECORD_TRIES = 3
"""A new leader may just be elected; without the record only `removed` is not told apart."""


def follow(settings: Settings, start: Callable[[Client], Stream]) -> int:
    """Show the deploy that `start` starts: 0 when it is deployed, 1 when it failed, 130 when the
    reader went away; the deploy goes on then."""
    transcript = Transcript()

    async def work(client: Client) -> int:
        return await _watch(settings, client, start(client), transcript)

    try:
        return ask(settings, work)
    except KeyboardInterrupt:
        if transcript.deploy:
            name = transcript.deploy
            warn(f"the deploy {name} goes on; follow it with: mill deploy-show {name} -f, "
                 f"or end it with: mill cancel {name}", settings)
        else:
            warn("the deploy may have begun; look with: mill deploys", settings)
        return INTERRUPTED


async def _watch(
    settings: Settings, client: Client, stream: Stream, transcript: Transcript
) -> int:
    from contextlib import aclosing

    from reconciler.cli.live import screen

    code = 1
    with screen(settings) as draw:
        async with aclosing(stream) as events:
            async for event in events:
                if _needs_record(event) and not transcript.actions:
                    transcript.actions = await _actions(client, transcript.deploy)
                lines = transcript.lines(event)
                if settings.json:
                    json_line(_flat(event))
                elif not settings.quiet or event.event == "failed":
                    draw(event, lines)
                if event.terminal:
                    code = 0 if event.event == "done" else 1
    return code


def _needs_record(event: DeployEvent) -> bool:
    return event.step.phase == "stopped" or (event.event == "done" and event.step.changed != 0)


async def _actions(client: Client, deploy_id: str) -> dict[str, str]:
    import asyncio

    for _ in range(RECORD_TRIES):
        try:
            record = await client.deploy_record(deploy_id)
        except MillError:
            await asyncio.sleep(1.0)
        else:
            return {service.name: service.action for service in record.services}
    return {}


def _flat(event: DeployEvent) -> dict[str, object]:
    """One object: the event's id (null for progress in bytes), its kind, and its data."""
    data = msgspec.json.decode(event.data, type=dict[str, object])
    return {"id": event.id, "event": event.event, **data}
