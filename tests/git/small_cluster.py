"""The log of one node, and an executor that deploys services of no replicas through it.

The state machine and the ledger are the real ones; the consensus and the containers are not here.
A manifest is one file a service. Its text says how the deploy goes: `ok`, `invalid`, `ill` (rolls
back), `busy` and `away` (refused until `finish` is set), `slow` (runs until then), `#` (empty).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import PurePosixPath

from reconciler.clock import RealClock
from reconciler.errors import Conflict, Unavailable
from reconciler.executor.ledger import Ledger, StateMachine
from reconciler.fsm import commands as c
from reconciler.fsm.records import Change, Failure, Origin, Source
from reconciler.fsm.state import State
from reconciler.git.decide import owned_services
from reconciler.git.findings import Commit
from reconciler.language.problems import InvalidManifest, Problem
from reconciler.language.spec import Health, ServiceSpec, canonical, spec_hash


class OneReplica:
    """Commits and applies at once."""

    def __init__(self, machine: StateMachine) -> None:
        self.machine = machine
        self.index = 0
        self.is_leader = True
        self.term = 1
        self.leader: str | None = "node-1"
        self.ledger: Ledger | None = None

    async def propose(self, command: bytes, timeout_s: float = 10.0) -> tuple[int, object]:
        await asyncio.sleep(0)
        self.index += 1
        result = self.machine.apply(self.index, command)
        assert self.ledger is not None
        self.ledger.woken(self.index)
        return self.index, result

    async def read_index(self, timeout_s: float = 5.0) -> int:
        return self.index


def small_ledger() -> tuple[Ledger, OneReplica]:
    """A ledger over the log of one node."""
    replica = OneReplica(StateMachine())
    replica.ledger = Ledger(replica, replica.machine, RealClock())
    return replica.ledger, replica


class SmallExecutor:
    """Starts deploys; `asked` lists what it was asked for."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.finish = asyncio.Event()
        self.asked: list[str] = []
        self._going: set[asyncio.Task[None]] = set()

    async def start(self, source: Source, commit: Commit) -> str:
        """Admit the commit, or raise as the executor does; the deploy then runs by itself."""
        self.asked.append(commit.sha)
        texts = self.texts(commit.files)
        for name, text in texts.items():
            if text == "invalid":
                raise InvalidManifest([Problem(f"{name}.mill", 1, 1, "unknown word `invalid`")])
        if "busy" in texts.values() and not self.finish.is_set():
            raise Conflict("node-1 has no memory left")
        if "away" in texts.values() and not self.finish.is_set():
            raise Unavailable("registry.example.com does not answer")
        origin = Origin(kind="git", source=source.name, commit=commit.sha, author=commit.author,
                        subject=commit.subject)
        index = await self.ledger.propose(c.StartDeploy(
            changes=await self._changes(source, texts), origin=origin, budget_ms=1000))
        task = asyncio.create_task(self._carry_out(f"d-{index}", set(texts.values())))
        self._going.add(task)
        task.add_done_callback(self._going.discard)
        return f"d-{index}"

    async def count(
        self, files: Mapping[str, bytes], variables: Mapping[str, str]
    ) -> int | None:
        """Services that the files name; a text of `#` names none."""
        texts = self.texts(files)
        return None if "invalid" in texts.values() else len(texts)

    def texts(self, files: Mapping[str, bytes]) -> dict[str, str]:
        """Services and their texts."""
        found = {PurePosixPath(n).stem: d.decode().strip() for n, d in files.items()}
        return {name: text for name, text in found.items() if text != "#"}

    async def _carry_out(self, deploy: str, words: set[str]) -> None:
        if "slow" in words:
            await self.finish.wait()
        if "ill" in words:
            await self.ledger.propose(c.RollBackDeploy(deploy, Failure(reason="web is ill")))
            await self.ledger.propose(c.EndRollback(deploy, "rolled_back"))
            return
        for command in (c.CommitDeploy(deploy), c.RouteDeploy(deploy), c.FinishDeploy(deploy)):
            await self.ledger.propose(command)

    async def _changes(self, source: Source, texts: dict[str, str]) -> tuple[Change, ...]:
        changes = []
        for name, text in sorted(texts.items()):
            spec = ServiceSpec(name=name, image=text, replicas=0, health=Health(kind="running"))
            live = self.ledger.state.live_spec(name)
            if live == spec:
                continue
            key = spec_hash(spec)
            await self.ledger.propose(c.StoreSpec(key, 0, 1, canonical(spec)))
            number = self.revision(name)
            changes.append(Change(
                service=name, action="update" if number else "create", spec_hash=key,
                from_revision=number, to_revision=number + 1, owner=source.name))
        changes += [
            Change(service=name, action="remove", from_revision=self.revision(name))
            for name in owned_services(self.ledger.state, source.name) if name not in texts
        ]
        return tuple(changes)

    def revision(self, name: str) -> int:
        """The live revision of a service, 0 where there is none."""
        service = self.ledger.state.services.get(name)
        return service.live if service else 0


def runs(state: State) -> dict[str, str]:
    """What runs: services and their images."""
    specs = {name: state.live_spec(name) for name in sorted(state.services)}
    return {name: spec.image for name, spec in specs.items() if spec}
