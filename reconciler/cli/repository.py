"""`mill dev --repo`: the cluster follows a folder's checked-out branch, and says of each commit
what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from reconciler.api.client import Client
from reconciler.api.types import DeployRecord, SourceAnswer, SourceBody
from reconciler.cli.contexts import Cluster
from reconciler.errors import MillError

NAME = "repo"
BRANCH = "HEAD"
"""What is checked out, whatever its name."""
POLL = "1s"
LOOK_S = 0.5
MAX_SAME_S = 5.0
"""While the cluster does not answer, it is asked less and less often, up to this."""
SHORT = 7


async def follow(cluster: Cluster, folder: str, say: Callable[[str], None]) -> None:
    """Add or re-use the source, then tell of its commits until cancelled."""
    async with Client(cluster.addresses, cluster.token) as client:
        await _added(client, folder, say)
        told, wait_s = "", LOOK_S
        while True:
            try:
                line = await _look(client)
                wait_s = LOOK_S
            except MillError:
                # A node is down, or nobody leads: what happens meanwhile is told after it.
                line, wait_s = "", min(MAX_SAME_S, wait_s * 2)
            if line and line != told:
                say(line)
                told = line
            await asyncio.sleep(wait_s)


async def _added(client: Client, folder: str, say: Callable[[str], None]) -> None:
    found = next((s for s in (await client.sources()).sources if s.name == NAME), None)
    if found is not None and (found.url, found.branch) != (folder, BRANCH):
        say(f"the source {NAME} followed {found.url}; it follows {folder} from now on")
        await client.remove_source(NAME)
        found = None
    if found is None:
        await client.add_source(SourceBody(name=NAME, url=folder, branch=BRANCH, poll=POLL))
    say(f"following {folder}")


async def _look(client: Client) -> str:
    source = await client.source(NAME)
    deploys: tuple[DeployRecord, ...] = ()
    if source.status == "failing":
        deploys = (await client.deploys(limit=20)).deploys
    return outcome(source, deploys)


def outcome(source: SourceAnswer, deploys: tuple[DeployRecord, ...]) -> str:
    """What there is to say of a source's newest commit; "" while that is not decided."""
    commit = source.head[:SHORT] or NAME
    match source.status:
        case "deploying":
            return f"{commit} deploying"
        case "synced":
            why = f" ({source.reason})" if source.reason else ""
            return f"{commit} deployed{why}" if source.head else ""
        case "failing":
            failed = next((d for d in deploys if d.origin.source == NAME
                           and source.head and d.origin.commit == source.head), None)
            if failed is None:
                return f"{commit} failing: {source.reason}"
            return f"{commit} {failed.outcome.replace('_', ' ')}: {failed.reason}"
        case "waiting" if not source.reason:
            return ""
        case status:
            return f"{commit} {status}: {source.reason}"
