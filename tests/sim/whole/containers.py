"""A simulated containerd and its registry: containers of one machine, in memory.

They outlive the node's process, as containerd's do; a power cut ends them, images stay. What a
container does is written in its image's tag: `ok`, `sick` (never healthy), `exits` (soon after
its start), `gone` (the registry does not have it).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reconciler.executor.agent.orders import LogLine, LogRequest, Pull, PullReport, Start
from reconciler.executor.agent.probe import Target
from reconciler.executor.agent.supervise import Exit, Found, StartFailed

if TYPE_CHECKING:
    from tests.sim.whole.world import WholeNode

RUNS, SICK, EXITS, GONE = "ok", "sick", "exits", "gone"
EXITS_TIMES = 2
"""Then it runs: one that is new may be healthy for a moment and be committed."""


def tag_of(image: str) -> str:
    """What the image's containers do."""
    return image.rpartition(":")[2]


@dataclass
class Container:
    """One incarnation of an allocation."""

    order: Start
    serves_at_s: float
    exits_at_s: float
    ill_until_s: float = 0.0
    ended: Exit | None = None
    waiters: list[asyncio.Future[Exit]] = field(default_factory=list)

    def end(self, how: Exit) -> None:
        """It is over; those who wait are told, where they still live."""
        if self.ended is None:
            self.ended = how
            for waiter in self.waiters:
                if not waiter.done():
                    waiter.set_result(how)

    def serves(self, now_s: float) -> bool:
        """What a probe would find."""
        return (self.ended is None and tag_of(self.order.image) != SICK
                and now_s >= max(self.serves_at_s, self.ill_until_s))


class Containers:
    """Implements the agent's `Runtime`, `Images` and `Lines`."""

    def __init__(self, node: WholeNode) -> None:
        self._node = node
        self._world = node.world
        self.by_alloc: dict[str, Container] = {}
        self.images: set[tuple[str, str]] = set()
        self.faulty_until_s = 0.0  # no disk, runtime errors, a registry that is away

    @property
    def _faulty(self) -> bool:
        return self._world.now_s < self.faulty_until_s and self._world.rng.random() < 0.7

    def step(self) -> None:
        """Containers end by themselves."""
        for alloc, container in self.by_alloc.items():
            if container.ended is None and container.exits_at_s <= self._world.now_s:
                self._world.promises.hit(alloc)
                container.end(Exit(3, oom=False))

    def recover(self) -> None:
        """Nothing ails it or its containers any more."""
        self.faulty_until_s = 0.0
        for container in self.by_alloc.values():
            container.ill_until_s = 0.0

    def cut_power(self) -> None:
        """Nothing of what ran is left."""
        self.by_alloc.clear()

    # Runtime

    async def start(self, order: Start) -> None:
        """Run it; another incarnation takes the place of the one before."""
        rng = self._world.rng
        await asyncio.sleep(rng.choice((0.01, 0.05, 0.3)))
        if self._faulty:
            raise StartFailed("no space left on device", node_fault=True)
        now_s = self._world.now_s
        exits = tag_of(order.image) == EXITS and order.restarts < EXITS_TIMES
        former = self.by_alloc.get(order.alloc)
        self._world.promises.starts_container(self._node.name, order, former)
        if former is not None:
            former.end(Exit(143, oom=False))
        self.by_alloc[order.alloc] = Container(
            order, serves_at_s=now_s + rng.choice((0.0, 0.1, 0.6, 2.0)),
            exits_at_s=now_s + rng.uniform(0.0, 1.5) if exits else float("inf"))
        self._world.note(f"{self._node.name} starts {order.alloc} {order.restarts}")

    async def wait(self, alloc: str) -> Exit:
        """Until it has ended."""
        container = self.by_alloc[alloc]
        if container.ended is None:
            waiter: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
            container.waiters.append(waiter)
            return await waiter
        return container.ended

    async def stop(self, alloc: str, grace_s: float) -> None:
        """Nothing of it is left; some take a while, some have to be told twice."""
        self._world.promises.stops_container(self._node.name, alloc, self.by_alloc.get(alloc))
        rng = self._world.rng
        await asyncio.sleep(min(grace_s, rng.choice((0.0, 0.05, 0.5))))
        if self._faulty:
            raise RuntimeError("containerd does not answer")
        container = self.by_alloc.pop(alloc, None)
        if container is not None:
            container.end(Exit(143, oom=False))
            self._world.note(f"{self._node.name} stops {alloc}")

    async def found(self) -> list[Found]:
        """All that is here."""
        return [Found(a, c.ended is None) for a, c in sorted(self.by_alloc.items())]

    def target(self, order: Start) -> Target:
        """A command decides, and what it says is true."""

        async def no_socket() -> object:
            raise ConnectionRefusedError(111, "Connection refused")

        async def run(_argv: tuple[str, ...], _timeout_s: float) -> int:
            await asyncio.sleep(0.01)
            container = self.by_alloc.get(order.alloc)
            well = container is not None and container.serves(self._world.now_s)
            if well:
                self._world.promises.passed(order.alloc, order.restarts)
            return 0 if well else 1

        return Target(order.address, order.port, no_socket, run)  # type: ignore[arg-type]  # never connects

    async def tail(self, alloc: str, lines: int) -> tuple[str, ...]:
        """Its last words."""
        await asyncio.sleep(0.01)
        return (f"{alloc} says goodbye",)[:lines]

    # Images

    async def present(self) -> tuple[tuple[str, str], ...]:
        """All that is here."""
        return tuple(sorted(self.images))

    async def pull(self, order: Pull, tell: Callable[[PullReport], None]) -> None:
        """A registry that has everything but `gone`, and is away now and then."""
        await asyncio.sleep(self._world.rng.choice((0.01, 0.2, 1.0)))
        if self._faulty:
            tell(PullReport(image=order.image, digest=order.digest, state="failed",
                            error="the registry does not answer"))
        elif tag_of(order.image) == GONE:
            tell(PullReport(image=order.image, digest=order.digest, state="failed",
                            error="the registry said 404", final=True))
        else:
            self.images.add((order.image, order.digest))
            tell(PullReport(image=order.image, digest=order.digest, state="done"))

    # Lines

    async def read(self, request: LogRequest) -> AsyncIterator[LogLine]:
        """Nobody reads logs here."""
        none: tuple[LogLine, ...] = ()
        for line in none:
            yield line
