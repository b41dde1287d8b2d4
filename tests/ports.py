"""Ports for a cluster of a test: below the range from which the kernel takes ports by itself."""

from __future__ import annotations

import contextlib
import random
import socket

LOW, HIGH, STEP = 20_000, 32_000, 100


def free_base(nodes: int = 3) -> int:
    """A base port whose ports of all nodes (base + 10·i + 0…5) are free now."""
    for base in random.SystemRandom().sample(range(LOW, HIGH, STEP), (HIGH - LOW) // STEP):
        if all(_free(base + 10 * node + what) for node in range(nodes) for what in range(6)):
            return base
    raise RuntimeError(f"no free ports between {LOW} and {HIGH}")


def _free(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with contextlib.closing(socket.socket(socket.AF_INET, kind)) as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True
