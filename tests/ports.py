"""Ports for a cluster of a test: below the range from which the kernel takes ports by itself."""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

LOW, HIGH, STEP = 20_000, 32_000, 100
RESERVED = Path(tempfile.gettempdir()) / "mill-test-ports"

_held: list[int] = []


def free_base(nodes: int = 3) -> int:
    """A base port whose ports of all nodes (base + 10·i + 0…5) are free now.

    No other test process gets it while this one lives: suites run side by side.
    """
    for base in random.SystemRandom().sample(range(LOW, HIGH, STEP), (HIGH - LOW) // STEP):
        if all(_free(base + 10 * node + what) for node in range(nodes) for what in range(6)) \
                and _reserved(base):
            return base
    raise RuntimeError(f"no free ports between {LOW} and {HIGH}")


def _reserved(base: int) -> bool:
    """Lock the base until this process ends; a crash lets go of it too."""
    RESERVED.mkdir(exist_ok=True)
    lock = os.open(RESERVED / str(base), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return False
    _held.append(lock)
    return True


def _free(port: int) -> bool:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with contextlib.closing(socket.socket(socket.AF_INET, kind)) as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                return False
    return True
