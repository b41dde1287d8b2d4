"""From POST to `done`: a real three-node cluster, the floor, and Docker Swarm, in the same run.

    python -m bench.deploy [--runs 5] [--sizes 1,10,50] [--no-swarm]

Images are there already, services are ready 100 ms after their start, the manifest says health
every second. Each round does the same work with every contender, one after the other, so that
noise of the machine meets all of them; printed are medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

from bench.floor import READY_AFTER_MS, SEED, Ctr, Workload, many
from bench.swarm import SETTLE_S, Swarm, SwarmAbsent, swarm
from reconciler.api.client import Client, DeployOptions
from reconciler.api.stream import DeployEvent
from reconciler.dev import Dev, Options
from reconciler.executor.containerd.daemon import daemon_paths
from tests.images.build import publish_demo_images
from tests.images.registry import local_registry
from tests.ports import free_base

STATIONS = ("admit", "schedule", "pull", "start", "health", "settle", "commit+route", "retire")
NODES = 3
MOMENTS = ("healthy", "routed", "done")
LARGE = 20
"""Deploys of this many services and more are repeated less often."""

Figures = dict[str, list[float]]


class Mill:
    """A running cluster, and deploys timed on its client."""

    def __init__(self, client: Client, registry: str) -> None:
        self._client = client
        self._registry = registry
        self._round = 0

    async def deploy(self, workloads: Sequence[Workload]) -> dict[str, float]:
        """Seconds by station and by moment of one deploy, all of whose services are new texts."""
        self._round += 1
        text = "\n".join(_block(one, self._registry, self._round) for one in workloads)
        began, seen = time.time(), []
        async for event in self._client.deploy({"app.mill": text}):
            seen.append((time.time() - began, event))
        assert seen[-1][1].step.outcome == "deployed", seen[-1][1].data
        return stations(seen, await self._last_start(seen) - began)

    async def _last_start(self, seen: Sequence[tuple[float, DeployEvent]]) -> float:
        """When the last container's process began, in seconds since the epoch: it writes its
        first line at once, before the 100 ms that it takes until it answers."""
        starts = []
        for alloc in {event.step.alloc for _, event in seen if event.step.phase == "starting"}:
            async for row in self._client.logs(alloc):
                starts.append(datetime.fromisoformat(row.ts).timestamp())
                break
        return max(starts)

    async def remove(self) -> None:
        options = DeployOptions(prune=True)
        seen = [event async for event in self._client.deploy({"app.mill": ""}, options)]
        assert seen[-1].step.outcome == "deployed", seen[-1].data


def _block(one: Workload, registry: str, round_: int) -> str:
    env = {"READY_AFTER_MS": str(READY_AFTER_MS), "ROUND": str(round_), **dict(one.env)}
    lines = [
        f'service "{one.name}" {{', f'  image = "{registry}/{one.image}"',
        f"  port = {one.port}; replicas = {one.replicas}",
        f'  cpu = {one.cpu}; memory = "{one.memory_mib}M"',
        f'  health {{ path = "{one.path}"; interval = "1s" }}',
        "  env { " + "; ".join(f'{name} = "{value}"' for name, value in env.items()) + " }",
    ]
    lines += [f'  route "{one.route}" {{ path = "/" }}'] if one.route else []
    return "\n".join([*lines, "}"])


def stations(
    seen: Sequence[tuple[float, DeployEvent]], last_start: float
) -> dict[str, float]:
    """Where the time went, from the moments at which the events came in.

    A station ends with its last event, `start` with the last container's first line. `health`
    holds the containers' own READY_AFTER_MS, and `settle` is what the manifest asks for: both are
    left out of `own`.
    """
    last: dict[str, float] = {}
    for at, event in seen:
        step = event.step
        if step.phase == "pulled" and step.image:
            continue  # the last one, without an image, ends the station
        last[step.phase or event.event] = at
    settle = SETTLE_S if "stopped" in last else 0.0
    ends = [
        last["started"], last["scheduled"], last["pulled"], last_start, last["healthy"],
        last["healthy"] + settle, last["routed"], last["done"],
    ]
    found = {
        name: end - before
        for name, before, end in zip(STATIONS, [0.0, *ends], ends, strict=False)
    }
    found |= {moment: last[moment] for moment in MOMENTS}
    found["own"] = last["done"] - settle - READY_AFTER_MS / 1000
    return found


@asynccontextmanager
async def cluster(folder: Path, registry: str) -> AsyncIterator[tuple[Mill, Ctr]]:
    """Three nodes with the images on each, and `ctr` on their containerd."""
    dev = Dev(Options(nodes=NODES, data=folder, base_port=free_base(NODES)), print)
    try:
        async with dev.up() as founding:
            paths = daemon_paths(dev.data / "containerd")
            ctr = Ctr(paths.socket, paths.runc_root)
            for image in sorted({one.image for one in SEED}):
                await ctr.pull(f"{registry}/{image}")
            addresses = [dev.address(name) for name in dev.names]
            async with Client(addresses, founding.token) as client:
                await client.set_secret("db.url", "postgres://db.example.com/app")
                mill = Mill(client, registry)
                everywhere = (*many(12), *SEED)  # four services a node: both images on each
                await mill.deploy([*everywhere, Workload("fill", "api:v1", 8080, 3, 0.02, 16,
                                                         "/health")])
                await mill.remove()
                yield mill, ctr
    finally:
        await dev.reset()


async def one_round(
    number: int, mill: Mill, ctr: Ctr, registry: str, peer: Swarm | None, sizes: Sequence[int],
    figures: dict[str, Figures],
) -> None:
    """Everything once; the contenders take turns."""
    _add(figures["mill seed"], await mill.deploy(SEED))
    _add(figures["mill update"], await mill.deploy(SEED))
    await mill.remove()
    _add(figures["floor seed"], {"done": await ctr.first_answer_s(registry, SEED)})
    if peer is not None:
        for interval_s in (1.0, 0.1):
            name = f"swarm {interval_s:g} s"
            _add(figures[name], {"done": await peer.create_s(SEED, interval_s)})
            healthy, completed = await peer.update_s(SEED, interval_s)
            _add(figures[f"{name} update"], {"healthy": healthy, "done": completed})
            await peer.remove(SEED)
    for size in sizes:
        if size >= LARGE and number % 2:
            continue  # half as many runs
        _add(figures[f"mill {size}"], await mill.deploy(many(size)))
        await mill.remove()
        _add(figures[f"floor {size}"], {"done": await ctr.first_answer_s(registry, many(size))})
        if peer is not None:
            _add(figures[f"swarm {size}"], {"done": await peer.create_s(many(size), 1.0)})
            await peer.remove(many(size))
    print(f"round {number + 1} done", flush=True)


def _add(figures: Figures, measured: dict[str, float]) -> None:
    for name, seconds in measured.items():
        figures[name].append(seconds)


def report(figures: dict[str, Figures], sizes: Sequence[int]) -> None:
    """Medians in milliseconds, the spread of the whole, and the ratios that are aimed at."""
    columns = ["mill seed", "mill update", *(f"mill {size}" for size in sizes)]
    print(f"\n{'ms':>14} " + " ".join(f"{name:>12}" for name in columns))
    for row in (*STATIONS, *MOMENTS, "own"):
        print(f"{row:>14} " + " ".join(f"{_ms(figures[name][row]):>12}" for name in columns))
    spread = (f"{min(f['done']) * 1e3:.0f}-{max(f['done']) * 1e3:.0f}"
              for f in (figures[name] for name in columns))
    print(f"{'done, range':>14} " + " ".join(f"{text:>12}" for text in spread))
    print("\nothers, ms")
    for name in sorted(figures.keys() - set(columns)):
        rows = ", ".join(f"{row} {_ms(f)} ({min(f) * 1e3:.0f}-{max(f) * 1e3:.0f}, {len(f)} runs)"
                         for row, f in figures[name].items())
        print(f"  {name:16} {rows}")
    print("\nratios (medians of each round's ratio)")
    _ratio(figures, "first deploy / floor", "mill seed", "floor seed", "done")
    for interval in ("1 s", "0.1 s"):
        peer = f"swarm {interval}"
        _ratio(figures, f"first deploy / Swarm, probes {interval}", "mill seed", peer, "done")
        _ratio(figures, f"update to healthy / Swarm, probes {interval}", "mill update",
               f"{peer} update", "healthy")
        _ratio(figures, f"update with settle to routed / Swarm to healthy, probes {interval}",
               "mill update", f"{peer} update", "routed", "healthy")
        _ratio(figures, f"update to done / Swarm to completed, probes {interval}",
               "mill update", f"{peer} update", "done")
    for size in sizes:
        _ratio(figures, f"{size} services / floor", f"mill {size}", f"floor {size}", "done")
        _ratio(figures, f"{size} services / Swarm, probes 1 s", f"mill {size}", f"swarm {size}",
               "done")
    for size in sizes[1:]:
        first, here = (statistics.median(figures[f"mill {n}"]["done"]) for n in (sizes[0], size))
        print(f"  {size} services / {sizes[0]}: {here / first:.1f}x the time for "
              f"{size / sizes[0]:g}x the services")


def _ratio(
    figures: dict[str, Figures], title: str, ours: str, theirs: str, row: str, their_row: str = ""
) -> None:
    if not figures[theirs]:
        return
    pairs = zip(figures[ours][row], figures[theirs][their_row or row], strict=True)
    ratios = [a / b for a, b in pairs]
    print(f"  {title}: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def _ms(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds) * 1e3:.0f}"


async def measure(runs: int, sizes: Sequence[int], *, with_swarm: bool) -> dict[str, Figures]:
    """All rounds on one cluster."""
    figures: dict[str, Figures] = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory() as temporary, local_registry(Path(temporary) / "r") as url:
        folder = Path(temporary)
        publish_demo_images(url)
        registry = url.removeprefix("http://")
        async with cluster(folder / "dev", registry) as (mill, ctr):
            async def rounds(peer: Swarm | None) -> None:
                for number in range(runs):
                    await one_round(number, mill, ctr, registry, peer, sizes, figures)

            if not with_swarm:
                await rounds(None)
                return figures
            try:
                async with swarm(folder / "swarm") as peer:
                    await rounds(peer)
            except SwarmAbsent as absent:
                print(f"Docker Swarm does not work here: {absent}")
                figures.clear()
                await rounds(None)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sizes", default="1,10,50")
    parser.add_argument("--no-swarm", action="store_true")
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    report(asyncio.run(measure(options.runs, sizes, with_swarm=not options.no_swarm)), sizes)


if __name__ == "__main__":
    main()
