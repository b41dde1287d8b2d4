"""Signals to a container's processes, in a way that none is lost and none comes twice."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

from reconciler.executor.containerd import rpc
from reconciler.executor.containerd.client import Absent, Containerd, RuntimeFailed
from reconciler.executor.containerd.generated import tasks_pb2 as pb
from reconciler.executor.containerd.watch import Exit

_HANDLER_POLL_S = 0.02
_RUNC_INIT = "runc:["
"""As runc names its processes until they execute the container's program."""


def read_signal(name: str) -> signal.Signals:
    """'SIGQUIT', 'QUIT' or '3' as a signal; SIGTERM for '' and for what is none."""
    with contextlib.suppress(ValueError, KeyError):
        if name.isdecimal():
            return signal.Signals(int(name))
        return signal.Signals[f"SIG{name.upper().removeprefix('SIG')}"]
    return signal.SIGTERM


async def signal_until_heard(
    client: Containerd,
    container_id: str,
    pid: int,
    number: signal.Signals,
    ending: asyncio.Future[Exit],
    grace_s: float,
) -> None:
    """Send the signal, again once a handler is there if there was none, and await the end.

    The kernel drops a signal to a first process that has no handler for it, as in its first
    milliseconds. A second one that is heard is no good either: many programs then quit at once.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + grace_s
    heard = False
    while not ending.done() and (left_s := deadline - loop.time()) > 0:
        if not heard and (hears := _hears(pid, number)) is not None:
            heard = hears
            await kill(client, container_id, number, everything=False)
        pause_s = left_s if heard else min(left_s, _HANDLER_POLL_S)
        await asyncio.wait({ending}, timeout=pause_s)


def _hears(pid: int, number: signal.Signals) -> bool | None:
    """Whether the process catches the signal, or blocks it to fetch it later (signalfd).

    None while it is still runc, about to become the program: runc catches every signal, and what
    it caught is lost to the program.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return True  # it is gone: nothing to repeat
    said = dict(line.split(":", 1) for line in lines if ":" in line)
    if said["Name"].strip().startswith(_RUNC_INIT):
        return None
    masks = (int(said[name], 16) for name in ("SigCgt", "SigBlk"))
    return any(mask >> (number - 1) & 1 for mask in masks)


async def kill(
    client: Containerd, container_id: str, number: signal.Signals, *, everything: bool
) -> None:
    """Send a signal to the first process, or to all; none where nothing runs (any more)."""
    ask = pb.KillRequest(container_id=container_id, signal=number, all=everything)
    try:
        await client.call_uncut(rpc.TASK_KILL, ask)
    except Absent:
        pass  # it ended by itself
    except RuntimeFailed as error:
        if "not running" not in error.what and "already finished" not in error.what:
            raise
