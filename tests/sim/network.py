"""A network ruled by a seed: delay, loss with a broken connection, partitions, or all of it wild.

Tame, it behaves as TCP does: in order on each link, nothing lost but with the connection.
Wild, it loses, repeats and reorders single messages, which no TCP does and Raft must survive.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from dataclasses import dataclass

ACK_TAG = b"\x05"  # of `wire.Ack`, in a message's second byte
BULK_BYTES = 1000  # snapshots and long batches: what is late is then likely to be out of date


@dataclass(frozen=True, order=True)
class Flight:
    """One message on its way; epochs tell it from those of former lives of either end."""

    at_s: float
    sequence: int
    source: str
    target: str
    epochs: tuple[int, int]
    data: bytes


class Network:
    def __init__(self, rng: random.Random, *, wild: bool, slow_s: float) -> None:
        self._rng, self.wild, self._slow_s = rng, wild, slow_s
        self._flights: list[Flight] = []
        self._last_at: dict[tuple[str, str], float] = {}
        self._sequence = 0
        self.cut: set[tuple[str, str]] = set()  # (from, to), each way by itself
        self.late_acks = 0.0  # how likely an answer comes seconds late, where the network is wild
        self.digest = hashlib.sha256()
        self.delivered = 0

    def send(
        self, now_s: float, source: str, target: str, epochs: tuple[int, int], data: bytes
    ) -> None:
        """Put a message on its way; what is sent into a cut is lost."""
        copies = 1
        if self.wild:
            copies = self._rng.choices((0, 1, 2), (4, 90, 6))[0]
        for _ in range(copies):
            at_s = now_s + self._delay_s()
            late = 0.01 if len(data) < BULK_BYTES else 0.2
            if data[1:2] == ACK_TAG:
                late = max(late, self.late_acks)
            if self.wild and self._rng.random() < late:
                at_s += self._rng.uniform(1.0, 8.0)  # out of another time, over elections and all
            link = (source, target)
            if not self.wild:
                at_s = self._last_at[link] = max(at_s, self._last_at.get(link, 0.0))
            self._sequence += 1
            heapq.heappush(
                self._flights, Flight(at_s, self._sequence, source, target, epochs, data)
            )

    def due(self, now_s: float) -> list[Flight]:
        """What arrives by now, in order."""
        arrived = []
        while self._flights and self._flights[0].at_s <= now_s:
            flight = heapq.heappop(self._flights)
            if (flight.source, flight.target) not in self.cut:
                arrived.append(flight)
        return arrived

    def seen(self, flight: Flight) -> None:
        """Fold one delivered message into the run's fingerprint."""
        self.delivered += 1
        self.digest.update(f"{flight.source}>{flight.target}".encode())
        self.digest.update(flight.data)

    def heal(self) -> None:
        self.cut.clear()
        self.wild, self._slow_s, self.late_acks = False, 0.0, 0.0

    def _delay_s(self) -> float:
        if self._slow_s and self._rng.random() < 0.3:
            return self._rng.uniform(0.02, self._slow_s)
        return self._rng.uniform(0.0005, 0.02)
