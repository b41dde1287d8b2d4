"""A flood: so many connections at once to a port, and a new one for each that is closed.

`python -m tests.door.flood PORT COUNT` says `held` once it has had them all, and goes on until its
standard input ends; then it says how many it opened. Every fifth says nothing, or half a TLS
hello, or HTTP in clear and garbage, or one byte of a hello each second, or a hello and no more.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import ssl
import sys
import time
from collections import deque

OPENS_PER_TURN = 100
TURN_S = 0.05  # at most 2,000 a second: the box has to run the cluster as well
GARBAGE = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(range(256)) * 8


def hello() -> bytes:
    """The first bytes of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


class Flood:
    """The connections and what each still has to send."""

    def __init__(self, port: int, count: int) -> None:
        self.port, self.count, self.opened = port, count, 0
        self.hello = hello()
        self.poll = select.epoll()
        self.sockets: dict[int, tuple[socket.socket, int]] = {}
        self.slow: deque[tuple[float, int, int]] = deque()

    def open(self) -> None:
        kind = self.opened % 5
        each = socket.socket()
        each.setblocking(False)
        each.bind((f"127.0.0.{2 + self.opened % 200}", 0))
        each.connect_ex(("127.0.0.1", self.port))
        self.opened += 1
        self.sockets[each.fileno()] = (each, kind)
        self.poll.register(each, select.EPOLLOUT)

    def close(self, descriptor: int) -> None:
        each, _ = self.sockets.pop(descriptor)
        self.poll.unregister(each)
        each.close()

    def begin(self, descriptor: int) -> None:
        """It is connected: say what its kind says."""
        each, kind = self.sockets[descriptor]
        self.poll.modify(each, select.EPOLLIN | select.EPOLLRDHUP)
        match kind:
            case 0:
                pass
            case 1:
                each.send(self.hello[: len(self.hello) // 2])
            case 2:
                each.send(GARBAGE)
            case 4:
                each.send(self.hello)
            case _:  # 3
                self.slow.append((time.monotonic(), descriptor, self.opened))

    def turn(self) -> None:
        for descriptor, events in self.poll.poll(TURN_S, 512):
            if descriptor not in self.sockets:
                continue
            try:
                if events & select.EPOLLOUT and not events & (select.EPOLLERR | select.EPOLLHUP):
                    self.begin(descriptor)
                else:
                    self.close(descriptor)
            except OSError:
                self.close(descriptor)
        for _ in range(min(OPENS_PER_TURN, self.count - len(self.sockets))):
            self.open()
        now = time.monotonic()
        while self.slow and self.slow[0][0] <= now:
            _, descriptor, mark = self.slow.popleft()
            if descriptor in self.sockets and self.sockets[descriptor][1] == 3:
                with contextlib.suppress(OSError):
                    self.sockets[descriptor][0].send(self.hello[:1])
                self.slow.append((now + 1.0, descriptor, mark))


def main(port: int, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count + 200, count + 200))
    flood = Flood(port, count)
    asked = select.poll()
    asked.register(sys.stdin.fileno(), select.POLLIN | select.POLLHUP)
    told = False
    due = time.monotonic()
    while not (asked.poll(0) and not os.read(sys.stdin.fileno(), 1)):
        flood.turn()
        if not told and flood.opened >= count:
            told = True
            print("held", flush=True)
        due = max(due + TURN_S, time.monotonic() - 1.0)
        time.sleep(max(0.0, due - time.monotonic()))
    print(flood.opened, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
