"""Faults: each does its harm while clients go on, waits until it has bitten, and leaves.

What a fault must not bring about is written to `Arena.broken` at once; the history is checked
after the round.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tests.proof.clients import Crowd, Record, operate
from tests.proof.cluster import Cluster, View, ask, leader_among, quiet, until
from tests.proof.door import Door

WRITES = 40  # acknowledged under a fault before it may end
PATIENT = 6  # reads that a paused leader finds when it wakes
PATIENT_S = 60.0
DEADLINE_S = 90.0
APART_S = 3.0  # two and a half of the longest election timeouts
STORM_STEPS = 8


@dataclass(frozen=True)
class Pause:
    """A leader of `term` slept, was replaced, and was woken just after `woken` (monotonic)."""

    node: str
    term: int
    woken: float


@dataclass
class Arena:
    """What a fault works on, and what came of it."""

    cluster: Cluster
    crowd: Crowd
    record: Record
    rng: random.Random
    pauses: list[Pause] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    woken_reads: int = 0
    deposed_by_return: list[bool] = field(default_factory=list)

    def others(self, *names: str) -> list[str]:
        """All nodes but these."""
        return [name for name in self.cluster.names if name not in names]

    def number(self, name: str) -> int:
        """A node's machine."""
        return self.cluster.names.index(name) + 1

    def cut(self, *groups: list[str]) -> None:
        """A partition by names."""
        self.cluster.lab.partition(*({self.number(name) for name in group} for group in groups))

    async def writes(self, count: int = WRITES) -> None:
        """Wait for writes that were asked for from now on."""
        await self.record.more_writes(count, DEADLINE_S)


Fault = Callable[[Arena], Awaitable[None]]


async def kill_leader(arena: Arena) -> None:
    """SIGKILL of the leader; another one; back again."""
    leader = await quiet(arena.cluster)
    arena.cluster.kill(leader.node)
    await leader_among(arena.cluster, arena.others(leader.node), above=leader.term)
    await arena.writes()
    arena.cluster.start(leader.node)


async def kill_all(arena: Arena) -> None:
    """SIGKILL of all at once."""
    await quiet(arena.cluster)
    for name in arena.cluster.names:
        arena.cluster.kill(name)
    for name in arena.cluster.names:
        arena.cluster.start(name)
    await arena.writes()


async def kill_followers(arena: Arena) -> None:
    """One follower after the other, without a pause between."""
    leader = await quiet(arena.cluster)
    for name in arena.others(leader.node):
        arena.cluster.kill(name)
        await arena.writes()
        arena.cluster.start(name)
        await quiet(arena.cluster)


async def pause_leader(arena: Arena) -> None:
    """SIGSTOP of the leader until another leads and has written; reads wait at it for its waking,
    asked for after those writes were acknowledged: an answer of before is stale."""
    cluster, leader = arena.cluster, await quiet(arena.cluster)
    doors = [Door(cluster.address(leader.node)) for _ in range(PATIENT)]
    await asyncio.gather(*(door.call("GET", "/healthz", None, PATIENT_S) for door in doors))
    cluster.pause(leader.node)
    await leader_among(cluster, arena.others(leader.node), above=leader.term)
    await arena.writes()
    keys = arena.crowd.keys
    patient = [
        asyncio.create_task(operate(
            door, "read", keys[n % len(keys)], "", f"patient-{n}", leader.node, arena.record,
            PATIENT_S))
        for n, door in enumerate(doors)
    ]
    await ask(cluster, arena.others(leader.node)[0], "GET", "/healthz")  # meanwhile they are sent
    arena.pauses.append(Pause(leader.node, leader.term, time.monotonic()))
    cluster.wake(leader.node)
    answers = await asyncio.gather(*patient)
    arena.woken_reads += sum(answer is not None for answer in answers)
    await _served_by(arena, leader.node)
    for door in doors:
        door.close()


async def isolate_leader(arena: Arena) -> None:
    """The leader sees nobody. It must not answer as if it did, and must say what is stale."""
    leader = await quiet(arena.cluster)
    arena.cluster.lab.isolate(arena.number(leader.node))
    await leader_among(arena.cluster, arena.others(leader.node), above=leader.term)
    await arena.writes()
    await expect_cut_off(arena, leader.node)
    arena.cluster.lab.heal()


async def split(arena: Arena) -> None:
    """The smaller side without the leader; it comes back and deposes nobody."""
    leader = await quiet(arena.cluster)
    followers = arena.others(leader.node)
    away = sorted(arena.rng.sample(followers, (len(arena.cluster.names) - 1) // 2))
    arena.cut(away, arena.others(*away))
    since = time.monotonic()
    await arena.record.until(
        lambda: any(o.returned and o.invoked > since + APART_S and o.kind == "write"
                    for o in arena.record.operations[-50:]),
        DEADLINE_S, f"writes {APART_S:g} s after a split")
    for name in away:
        await expect_cut_off(arena, name)
    during = await leader_among(arena.cluster, arena.others(*away))
    arena.cluster.lab.heal()
    back = await leader_among(arena.cluster, arena.cluster.names)
    same = (during.leader, during.term) == (back.leader, back.term)
    arena.deposed_by_return.append(not same)
    arena.said.append("the leader stayed" if same else "the leader changed on return")


async def deafen_leader(arena: Arena) -> None:
    """The leader speaks and hears nothing."""
    leader = await quiet(arena.cluster)
    for name in arena.others(leader.node):
        arena.cluster.lab.one_way(arena.number(name), arena.number(leader.node))
    await leader_among(arena.cluster, arena.others(leader.node), above=leader.term)
    await arena.writes()
    arena.cluster.lab.heal()


async def mute_leader(arena: Arena) -> None:
    """The leader hears and cannot speak."""
    leader = await quiet(arena.cluster)
    for name in arena.others(leader.node):
        arena.cluster.lab.one_way(arena.number(leader.node), arena.number(name))
    await leader_among(arena.cluster, arena.others(leader.node), above=leader.term)
    await arena.writes()
    arena.cluster.lab.heal()


async def bridge(arena: Arena) -> None:
    """Two sides that do not see each other, and one node that sees both."""
    await quiet(arena.cluster)
    names = list(arena.cluster.names)
    arena.rng.shuffle(names)
    half = len(names) // 2
    arena.cut(names[:half], names[half:2 * half])
    arena.said.append(f"{names[-1]} sees both sides")
    await arena.writes(2 * WRITES)
    arena.cluster.lab.heal()


async def storm(arena: Arena) -> None:
    """Faults on top of one another, at random; some time has passed between any two."""
    cluster, rng = arena.cluster, arena.rng
    for _ in range(STORM_STEPS):
        one, two = rng.sample(cluster.names, 2)
        match rng.choice(("kill", "start", "pause", "wake", "isolate", "cut", "one way", "heal")):
            case "kill":
                cluster.kill(one)
            case "start":
                _raise_all(cluster)
            case "pause":
                cluster.start(one)
                cluster.pause(one)
            case "wake":
                for name in cluster.names:
                    cluster.wake(name)
            case "isolate":
                cluster.lab.isolate(arena.number(one))
            case "cut":
                arena.cut([one], [two])
            case "one way":
                cluster.lab.one_way(arena.number(one), arena.number(two))
            case _:
                cluster.lab.heal()
        await asyncio.sleep(rng.uniform(0.1, 1.5))


FAULTS: dict[str, Fault] = {
    "kill-leader": kill_leader, "pause-leader": pause_leader, "isolate-leader": isolate_leader,
    "split": split, "storm": storm, "kill-all": kill_all, "deafen-leader": deafen_leader,
    "bridge": bridge, "mute-leader": mute_leader, "kill-followers": kill_followers,
}


async def mend(arena: Arena) -> View:
    """End every fault; the leader of the quiet cluster."""
    arena.cluster.lab.heal()
    _raise_all(arena.cluster)
    return await quiet(arena.cluster)


async def expect_cut_off(arena: Arena, name: str) -> None:
    """A node without a majority refuses a read, and answers one with `?stale=ok`, marked."""
    await until(lambda: _refuses(arena.cluster, name), f"{name}, cut off, refuses a read")
    answer = await ask(arena.cluster, name, "GET", "/v1/secrets?stale=ok")
    if answer is None or answer.status != 200 or answer.body.get("stale") is not True:
        arena.broken.append(f"{name}, cut off, answers ?stale=ok with {answer}")


async def _refuses(cluster: Cluster, name: str) -> bool | None:
    answer = await ask(cluster, name, "GET", "/v1/secrets", timeout_s=15.0)
    return True if answer is not None and answer.status == 503 else None


async def _served_by(arena: Arena, name: str) -> None:
    """Until the node answers a read, which then is part of the history."""
    door = Door(arena.cluster.address(name))

    async def look() -> bool | None:
        answer = await operate(
            door, "read", arena.crowd.keys[0], "", "waker", name, arena.record)
        return True if answer is not None and answer.status in (200, 404) else None

    await until(look, f"{name} answers reads again")
    arena.woken_reads += 1
    door.close()


def _raise_all(cluster: Cluster) -> None:
    for name in cluster.names:
        cluster.start(name)
        cluster.wake(name)

