"""Clients that read and write secrets through all nodes at once, and write down what they saw."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from msgspec.structs import replace

from tests.proof.door import Address, Answer, Door, NoAnswer, NotSent
from tests.proof.history import Kind, Operation

PAUSE_S = 0.04  # at most, between a client's operations: a history a person can still read
PAUSE_AFTER_FAILURE_S = 0.25  # so that a minute without a leader is not a thousand open writes
TIMEOUT_S = 1.5
NOT_DONE = frozenset({409, 429})  # contracts: that it did not happen is said by these alone


@dataclass
class Record:
    """The history as it grows, and what came of all requests by outcome. `astray`: answers that a
    request of ours cannot get, a mistake of the API or of this proof."""

    operations: list[Operation] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    astray: list[str] = field(default_factory=list)
    _grown: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, operation: Operation) -> None:
        """An operation whose outcome is known, or for ever open."""
        self.operations.append(operation)
        self.outcomes["open" if operation.returned is None else f"{operation.kind} ok"] += 1
        self._grown.set()
        self._grown = asyncio.Event()

    async def until(self, holds: Callable[[], bool], deadline_s: float, what: str) -> None:
        """Wait for a fact of this record."""
        try:
            async with asyncio.timeout(deadline_s):
                while not holds():
                    await self._grown.wait()
        except TimeoutError as error:
            raise TimeoutError(f"not within {deadline_s:g} s: {what}") from error

    async def more_writes(self, count: int, deadline_s: float) -> None:
        """Wait until so many more writes are acknowledged that began after this call."""
        since = time.monotonic()

        def enough() -> bool:
            fresh = (o for o in reversed(self.operations) if o.kind == "write" and o.returned)
            return sum(o.invoked >= since for o in fresh) >= count

        await self.until(enough, deadline_s, f"{count} more acknowledged writes")


async def operate(
    door: Door, kind: Kind, key: str, value: str, client: str, node: str, record: Record,
    timeout_s: float = TIMEOUT_S,
) -> Answer | None:
    """One operation, recorded as what is known of it; the answer where there is one."""
    invoked = time.monotonic()
    begun = Operation(key=key, kind=kind, value=value, invoked=invoked, client=client, node=node)
    path = f"/v1/secrets/{key}"
    try:
        if kind == "write":
            answer = await door.call("PUT", path, {"value": value}, timeout_s)
        else:
            answer = await door.call("GET", path, None, timeout_s)
    except NotSent:
        record.outcomes["not sent"] += 1
        return None
    except (NoAnswer, asyncio.CancelledError) as error:
        record.add(begun)
        if isinstance(error, asyncio.CancelledError):
            raise
        return None
    returned = time.monotonic()
    _take(record, begun, returned, answer)
    return answer


def _take(record: Record, begun: Operation, returned: float, answer: Answer) -> None:
    status, body = answer.status, answer.body
    index, version = _number(body, "index"), _number(body, "version")
    if status == 200 and begun.kind == "write":
        record.add(replace(begun, returned=returned, index=index, version=version))
    elif status == 200 and not body.get("stale"):
        record.add(replace(begun, returned=returned, index=index, version=version,
                           value=str(body["value"])))
    elif status == 404 and begun.kind == "read":
        record.add(replace(begun, returned=returned))
    elif status >= 500:
        record.add(begun)
        record.outcomes[f"status {status}"] += 1
    elif status in NOT_DONE:
        record.outcomes[f"status {status}"] += 1
    else:
        record.add(begun)
        record.astray.append(f"{begun}: {status} {body}")


def _number(body: dict[str, object], name: str) -> int:
    value = body.get(name, 0)
    return value if isinstance(value, int) else 0


@dataclass
class Crowd:
    """`count` clients, each with a door to every node, on `keys`."""

    addresses: dict[str, Address]
    keys: tuple[str, ...]
    record: Record
    seed: int
    count: int = 16

    async def run(self) -> None:
        """Until cancelled; what is under way then stays open in the record."""
        async with asyncio.TaskGroup() as group:
            for number in range(self.count):
                group.create_task(self._client(number))

    async def _client(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        doors = {name: Door(address) for name, address in self.addresses.items()}
        written = 0
        try:
            while True:
                name, key = rng.choice(sorted(doors)), rng.choice(self.keys)
                kind: Kind = rng.choice(("read", "write"))
                written += kind == "write"
                value = f"c{number}-{written}" if kind == "write" else ""
                answer = await operate(
                    doors[name], kind, key, value, f"c{number}", name, self.record)
                failed = answer is None or answer.status >= 500
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S if failed else rng.uniform(0, PAUSE_S))
        finally:
            for door in doors.values():
                door.close()
