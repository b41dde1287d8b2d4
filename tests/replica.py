"""A log of one process in memory: what is proposed is applied at once. A fake of the outside."""

from __future__ import annotations

import asyncio

from reconciler.clock import Clock, RealClock
from reconciler.errors import Unavailable
from reconciler.executor.ledger import Ledger, StateMachine


class MemoryReplica:
    """Leads until told otherwise; `entries` is the whole log."""

    def __init__(self, machine: StateMachine, node: str = "node-1") -> None:
        self.machine = machine
        self.node = node
        self.leading = True
        self.term = 1
        self.entries: list[bytes] = []
        self.ledgers: list[Ledger] = []
        self.stop_after: int | None = None

    @property
    def is_leader(self) -> bool:
        return self.leading

    @property
    def leader(self) -> str | None:
        return self.node if self.leading else None

    async def propose(self, command: bytes, timeout_s: float = 10.0) -> tuple[int, object]:
        await asyncio.sleep(0)
        if not self.leading or (self.stop_after is not None
                                and len(self.entries) >= self.stop_after):
            self.leading = False
            raise Unavailable("not the leader any more")
        self.entries.append(command)
        index = len(self.entries)
        result = self.machine.apply(index, command)
        for ledger in self.ledgers:
            ledger.woken(index)
        return index, result

    async def read_index(self, timeout_s: float = 5.0) -> int:
        if not self.leading:
            raise Unavailable("no leader")
        return len(self.entries)


def memory_ledger(clock: Clock | None = None) -> tuple[Ledger, MemoryReplica]:
    """A ledger over a log in memory."""
    machine = StateMachine()
    replica = MemoryReplica(machine)
    ledger = Ledger(replica, machine, clock or RealClock())
    replica.ledgers.append(ledger)
    return ledger, replica
