"""A cable with a delay, for kernels without netem: a thread that relays frames between two ports.

The machine's port leaves the bridge, a veth pair takes its place there, and packet(7) sockets carry
frames between both, each held back. PACKET_VNET_HDR keeps offloads (unsummed, unsegmented frames)
as they are on a veth.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import select
import socket
import subprocess
import threading
import time
from functools import partial

from reconciler.executor.containerd import network_namespace as namespace

_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_VNET_HDR, _PACKET_IGNORE_OUTGOING = 263, 15, 23
_ETH_P_ALL = 3
_FRAME_BYTES = 1 << 17  # a segmentation-offloaded frame is at most 64 KiB and its headers
_HELD_FRAMES = 20_000  # at most, then they are lost as on a full queue
_BUFFER_BYTES = 8 << 20


class Wire:
    """Relays between `port` (taken off `bridge`) and a new port `relayed` of it, `delay_s` late."""

    def __init__(self, space: str, port: str, relayed: str, bridge: str, delay_s: float) -> None:
        self._space, self._relayed, self._delay_s = space, relayed, delay_s
        inner = f"{relayed}i"
        _ip(space, f"link add {relayed} type veth peer name {inner}")
        _ip(space, f"link set {inner} addrgenmode none up")
        _ip(space, f"link set {relayed} addrgenmode none master {bridge} up")
        _ip(space, f"link set {port} nomaster promisc on")
        _ip(space, f"link set {inner} promisc on")
        path = namespace.named(space)
        self._ends = tuple(
            namespace.inside(path, partial(_packets, name)) for name in (port, inner)
        )
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._relay, name=f"wire-{port}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the relay; the port's way back to the bridge is the caller's."""
        os.close(self._stopped)
        self._thread.join()
        os.close(self._stop)
        for end in self._ends:
            end.close()
        _ip(self._space, f"link del {self._relayed}")

    def _relay(self) -> None:
        held: list[tuple[float, int, socket.socket, bytes]] = []
        count = 0
        one, two = self._ends
        onward = {one.fileno(): (one, two), two.fileno(): (two, one)}
        poll = select.poll()
        for fd in (*onward, self._stop):
            poll.register(fd, select.POLLIN)
        while True:
            wait_s = max(0.0, held[0][0] - time.monotonic()) if held else 1.0
            for fd, _ in poll.poll(wait_s * 1000):
                if fd == self._stop:
                    return
                near, far = onward[fd]
                with contextlib.suppress(OSError):  # the port went down meanwhile
                    while len(held) < _HELD_FRAMES:
                        count += 1
                        frame = near.recv(_FRAME_BYTES, socket.MSG_DONTWAIT)
                        heapq.heappush(held, (time.monotonic() + self._delay_s, count, far, frame))
            while held and held[0][0] <= time.monotonic():
                _, _, far, frame = heapq.heappop(held)
                with contextlib.suppress(OSError):
                    far.send(frame)


def _packets(name: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    end.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    end.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    end.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
    end.bind((name, _ETH_P_ALL))
    return end


def _ip(space: str, line: str) -> None:
    subprocess.run(["ip", "-n", space, *line.split()], check=True, capture_output=True)
