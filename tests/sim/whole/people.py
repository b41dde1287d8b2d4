"""Those who use the cluster: they deploy, scale, restart, go back, cancel, and ask again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
from msgspec.structs import replace

from reconciler.errors import MillError
from reconciler.executor.requests import DeployRequest
from reconciler.fsm import commands as c
from reconciler.fsm.records import Origin
from reconciler.language.spec import Health, Route, ServiceSpec
from tests.sim.invariants import Violation
from tests.sim.whole.containers import EXITS, GONE, RUNS, SICK
from tests.sim.whole.process import Process
from tests.sim.whole.world import WholeNode, WholeWorld

PULL_BUDGET_MS = 20_000
PATIENCE_S = 20.0
TRIES = 5
NAMES = ("web", "api", "db", "worker")

Ask = Callable[[Process], Awaitable[str]]


@dataclass
class Wish:
    """One thing that somebody wants; `key` makes it one thing however often it is asked. One that
    `persists` is asked for until it is done."""

    what: str
    key: str
    ask: Ask
    tries: int = 0
    asked_s: float = 0.0
    answered: bool = True
    persists: bool = False


@dataclass
class People:
    """What they want by turns; `promised` are the deploys that were acknowledged, by key."""

    world: WholeWorld
    every_s: float
    wishes: list[Wish] = field(default_factory=list)
    promised: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, bytes] = field(default_factory=dict)
    said: Counter[str] = field(default_factory=Counter)
    wanted: dict[str, ServiceSpec] = field(default_factory=dict)
    _count: int = 0
    _next_s: float = 0.0

    def step(self, *, more: bool = True) -> None:
        """Ask again what was not answered; want something new now and then."""
        now_s, rng = self.world.now_s, self.world.rng
        for wish in list(self.wishes):
            if not wish.answered and now_s - wish.asked_s > PATIENCE_S:
                wish.answered = True
            if wish.answered and now_s - wish.asked_s > 0.5:
                self._ask(wish)
        if more and now_s >= self._next_s and len(self.wishes) < 3:
            self._next_s = now_s + rng.uniform(0.2, 2.0) * self.every_s
            self.wishes.append(self._new_wish())

    def check(self) -> None:
        """At the end: what was acknowledged is there, once."""
        state = self.world.promises.newest
        keys = Counter(d.key for d in state.deploys.values() if d.key)
        for key, deploy in self.promised.items():
            if keys[key] != 1 or state.deploys[deploy].key != key:
                raise Violation(f"{deploy} was acknowledged for {key}, which has {keys[key]}")
        for name, sealed in self.secrets.items():
            if sealed not in [v.sealed for v in state.secrets[name].versions]:
                raise Violation(f"the acknowledged value of secret {name} is lost")

    def _ask(self, wish: Wish) -> None:
        wish.tries += 1
        if wish.tries > TRIES and not wish.persists:
            self.wishes.remove(wish)
            return
        wish.asked_s = self.world.now_s
        node = self._door()
        if node is None or node.process is None:
            return
        wish.answered = False
        task = node.process.loop.create_task(_asked(wish.ask, node.process))
        task.add_done_callback(lambda t: self._heard(wish, t))

    def _door(self) -> WholeNode | None:
        """Most find the leader, some a node that only thinks that it leads."""
        up = [n for n in self.world.present if n.process is not None and not n.frozen]
        leaders = [n for n in up if n.process is not None and n.process.replica.is_leader]
        among = leaders if leaders and self.world.rng.random() < 0.9 else up
        return self.world.rng.choice(among) if among else None

    def _heard(self, wish: Wish, task: asyncio.Task[str]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if wish not in self.wishes:
            return  # an answer that nobody waited for any more
        wish.answered = True
        if error is not None:
            self.said[f"{wish.what}: {type(error).__name__}"] += 1
            if not isinstance(error, MillError):
                self.world.fail(f"{wish.what} raised {error!r}")
            elif not wish.persists and (error.status not in (502, 503, 409)
                                        or self.world.rng.random() < 0.2):
                self.wishes.remove(wish)
            return
        self.wishes.remove(wish)
        self.said[f"{wish.what}: done"] += 1
        if wish.key and self.world.rng.random() < 0.1:
            self.wishes.append(Wish("cancel", "", _cancel))  # on second thoughts
        if wish.key and self.promised.setdefault(wish.key, task.result()) != task.result():
            self.world.fail(f"{wish.key} is {self.promised[wish.key]} and {task.result()}")

    # -- what they want --------------------------------------------------------------------

    def _new_wish(self) -> Wish:
        rng = self.world.rng
        self._count += 1
        key = f"k{self._count}"
        name = rng.choice(NAMES)
        match rng.choices(range(7), (10, 2, 2, 2, 3, 1, 2))[0]:
            case 0:
                return self._deploy(key, prune=rng.random() < 0.3)
            case 1:
                replicas = rng.randrange(4)
                return Wish("scale", key, lambda p: p.front.scale(name, replicas, Origin(), key))
            case 2:
                return Wish("restart", key, lambda p: p.front.restart(name, Origin(), key))
            case 3:
                return Wish("rollback", key, lambda p: p.front.rollback(name, None, Origin(), key))
            case 4:
                return Wish("cancel", "", _cancel)
            case 5:
                return Wish("read", "", _read)
            case _:
                return Wish("secret", "", self._secret(f"s{rng.randrange(3)}", key.encode()))

    def _deploy(self, key: str, *, prune: bool) -> Wish:
        """Some of the services, each with a chance of a change, few with a bad one."""
        rng = self.world.rng
        names = rng.sample(NAMES, rng.randrange(1, len(NAMES) + 1))
        specs = []
        for name in sorted(names):
            good = self.wanted.get(name) or _service(name)
            if rng.random() < 0.6:
                good = replace(good, user=str(rng.randrange(5)), replicas=rng.choice((0, 1, 2, 3)))
            self.wanted[name] = good
            bad = rng.choices((RUNS, SICK, EXITS, GONE), (20, 1, 1, 1))[0]
            specs.append(replace(good, image=f"registry/{name}:{bad}"))
        known = {spec.name for spec in specs}
        specs = [replace(s, depends_on=tuple(d for d in s.depends_on if d in known))
                 for s in specs]
        files = {"app.mill": msgspec.msgpack.encode(specs)}
        request = DeployRequest(files=files, prune=prune, key=key, pull_budget_ms=PULL_BUDGET_MS)
        return Wish("deploy", key, lambda p: p.front.start(request))

    def _secret(self, name: str, sealed: bytes) -> Ask:
        async def ask(process: Process) -> str:
            await process.ledger.propose(c.SetSecret(name, b"n" * 12, sealed))
            self.secrets[name] = sealed
            return ""

        return ask


async def _asked(ask: Ask, process: Process) -> str:
    return await ask(process)


async def _cancel(process: Process) -> str:
    deploy = process.ledger.state.active_deploy
    if deploy:
        await process.front.cancel(deploy)
    return ""


async def _read(process: Process) -> str:
    await process.ledger.read()
    return ""


def _service(name: str) -> ServiceSpec:
    health = Health(kind="command", command=("check",), interval_ms=1_000, timeout_ms=500,
                    deadline_ms=5_000)
    depends_on = {"web": ("api",), "api": ("db",)}.get(name, ())
    return ServiceSpec(
        name=name, image=f"registry/{name}:ok", health=health, depends_on=depends_on,
        port=None if name == "worker" else 80, bake_ms=300, stop_timeout_ms=500,
        routes=(Route(host=f"{name}.example.com"),) if name == "web" else (),
    )
