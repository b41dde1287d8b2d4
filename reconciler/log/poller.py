"""The raft thread's event loop: epoll, and a way to wake it from another thread."""

from __future__ import annotations

import os
import select
from collections.abc import Callable

from pysyncobj.poller import POLL_EVENT_TYPE

READ: int = POLL_EVENT_TYPE.READ
WRITE: int = POLL_EVENT_TYPE.WRITE
ERROR: int = POLL_EVENT_TYPE.ERROR

Ready = Callable[[int, int], None]


class EpollPoller:
    """Stands in for pysyncobj's poller, which calls back for descriptors already closed.

    `soon` asks that the next poll does not wait: there is more to do.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Ready] = {}
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._woken = False
        self.soon = False
        self.subscribe(self._event, self._on_wake, READ)

    def subscribe(self, descriptor: int, ready: Ready, mask: int) -> None:
        """Call `ready(descriptor, mask)` in the raft thread; a later call changes it."""
        events = select.EPOLLIN * bool(mask & READ) | select.EPOLLOUT * bool(mask & WRITE)
        if descriptor in self._ready:
            self._epoll.modify(descriptor, events)
        else:
            self._epoll.register(descriptor, events)
        self._ready[descriptor] = ready

    def unsubscribe(self, descriptor: int) -> None:
        """Stop it; must come before the descriptor is closed."""
        if self._ready.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def poll(self, timeout_s: float) -> None:
        """Wait for events and handle them."""
        wait_s, self.soon = (0.0 if self.soon else timeout_s), False
        for descriptor, events in self._epoll.poll(wait_s):
            ready = self._ready.get(descriptor)
            if ready is not None:
                ready(descriptor, _mask(events))

    def wake(self) -> None:
        """End the current or the next wait; from any thread."""
        if not self._woken:
            self._woken = True
            os.eventfd_write(self._event, 1)

    def close(self) -> None:
        """Give the descriptors back."""
        self._epoll.close()
        os.close(self._event)

    def _on_wake(self, _descriptor: int, _mask: int) -> None:
        os.eventfd_read(self._event)
        self._woken = False


def _mask(events: int) -> int:
    broken = events & (select.EPOLLERR | select.EPOLLHUP)
    mask = READ * bool(events & select.EPOLLIN) | WRITE * bool(events & select.EPOLLOUT)
    # A broken socket tells its error to whoever reads or writes it.
    return mask | (READ | WRITE | ERROR if broken else 0)
