"""What a SIGKILL costs: until the next acknowledged write, until a node has caught up again."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from bench.log_clusters import Cluster, Etcd, Mill, until_written

PAUSE_S = 0.02
"""Between two tries of the client: what a failover is measured to."""
RESTART_PAUSE_S = 0.1
"""Longer: 150 tries a second would take a good part of two cores from nodes that start."""
SNAPSHOT_BYTES = 8 << 20  # as `Settings` has it where nothing else is said


def clusters(folder: Path, etcd: bool) -> list[Cluster]:
    """One of each kind; ours behind its API."""
    made: list[Cluster] = []
    for kind in ("mill", "etcd")[: 1 + etcd]:
        own = folder / kind
        own.mkdir()
        made.append(Mill(own, api=True) if kind == "mill" else Etcd(own))
    return made


async def failover_s(cluster: Cluster) -> float:
    """SIGKILL of the leader's process until a write at one of the others is acknowledged.

    Before it returns, the node is back and has applied everything: the next round begins whole.
    """
    leader = await cluster.leader()
    others = [name for name in cluster.names if name != leader]
    cluster.signal(leader)
    taken = await until_written(cluster, others, time.monotonic(), PAUSE_S)
    await cluster.kill(leader)
    await cluster.restart(leader)
    await whole(cluster)
    return taken


async def failovers(rounds: int, etcd_rounds: int) -> tuple[list[float], list[float]]:
    """Ours and etcd's in turns, both clusters up all the time."""
    ours: list[float] = []
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        both = clusters(Path(folder), etcd_rounds > 0)
        async with both[0]:
            if etcd_rounds == 0:
                ours = [await failover_s(both[0]) for _ in range(rounds)]
                return ours, theirs
            async with both[1]:
                for number in range(rounds):
                    ours.append(await failover_s(both[0]))
                    if len(theirs) * rounds < etcd_rounds * (number + 1):
                        theirs.append(await failover_s(both[1]))
    return ours, theirs


async def whole(cluster: Cluster) -> None:
    """Wait until every node has what the leader has now."""
    _, index = await cluster.status(await cluster.leader())
    for name in cluster.names:
        await cluster.reach(name, index)


async def all_restarts(entries: int, rounds: int, etcd: bool) -> dict[str, dict[str, list[float]]]:
    """By contender, ours first."""
    found = {}
    for name in ("mill, all from the journal", "mill, snapshot at 8 MiB", "etcd")[: 2 + etcd]:
        with tempfile.TemporaryDirectory() as folder:
            cluster: Cluster
            match name:
                case "etcd":
                    cluster = Etcd(Path(folder))
                case "mill, snapshot at 8 MiB":
                    cluster = Mill(Path(folder), api=True, snapshot_bytes=SNAPSHOT_BYTES)
                case _:
                    cluster = Mill(Path(folder), api=True)
            found[name] = await restarts(cluster, entries, rounds)
    return found


async def restarts(cluster: Cluster, entries: int, rounds: int) -> dict[str, list[float]]:
    """Seconds from the start of the processes, which follows the SIGKILL at once."""
    found: dict[str, list[float]] = {"fill": [], "cluster": [], "follower": []}
    async with cluster:
        leader = await cluster.leader()
        began = time.monotonic()
        await cluster.fill(leader, entries)
        found["fill"].append(time.monotonic() - began)
        await whole(cluster)
        for _ in range(rounds):
            leader = await cluster.leader()
            _, index = await cluster.status(leader)
            follower = next(name for name in cluster.names if name != leader)
            await cluster.kill(follower)
            began = time.monotonic()
            await cluster.restart(follower)
            await cluster.reach(follower, index)
            found["follower"].append(time.monotonic() - began)
            await cluster.kill(*cluster.names)
            began = time.monotonic()
            await cluster.restart(*cluster.names)
            found["cluster"].append(
                await until_written(cluster, cluster.names, began, RESTART_PAUSE_S)
            )
            await whole(cluster)
    return found
