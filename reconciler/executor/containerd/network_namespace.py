"""Network namespaces by system call: make, enter, keep, remove. No child process, no root link.

Names live in `/run/netns`, as iproute2 keeps them, so `ip -n NAME` and `ip netns` work on them.
Python 3.11 has neither `os.setns` nor `os.unshare`: ctypes does it, always in a thread of its own
that ends afterwards, because the namespace belongs to the thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from reconciler.errors import MillError

NETNS_FOLDER = Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_MS_BIND, _MS_REC, _MS_SHARED = 4096, 16384, 1 << 20
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


class NetworkFailed(MillError):
    """The kernel refused a step of network set-up; `at` names the namespace or path."""


def named(name: str) -> Path:
    """The path of the namespace `name`."""
    return NETNS_FOLDER / name


def create(name: str) -> bool:
    """Make the namespace `name` (loopback still down); False if it is there. Blocks a few ms."""
    _ensure_folder()
    path = named(name)
    with _locked_folder():
        if is_namespace(path):
            return False
        path.touch()  # a file without a mount is what a crash or a reboot left behind
        try:
            _in_own_thread(lambda: _mount_new_namespace(path))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return True


def remove(path: Path) -> bool:
    """Unmount and unlink; False if nothing was there. Whoever still uses it keeps it alive."""
    if not os.path.lexists(path):
        return False
    with _locked_folder() if path.parent == NETNS_FOLDER else contextlib.nullcontext():
        while _libc.umount2(os.fsencode(path), _MNT_DETACH) == 0:
            pass  # a path may be mounted over more than once
        path.unlink(missing_ok=True)
    return True


def is_namespace(path: Path) -> bool:
    """Whether `path` is a live namespace rather than an empty file or nothing."""
    try:
        return path.stat().st_dev == Path("/proc/self/ns/net").stat().st_dev
    except FileNotFoundError:
        return False


def keep(path: Path) -> None:
    """Bind mount the calling process's own namespace at `path`; again is a no-op."""
    own = Path("/proc/self/ns/net")
    if is_namespace(path):
        if path.stat().st_ino == own.stat().st_ino:
            return
        remove(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch()
    _mount(str(own), path, _MS_BIND)


def inside(path: Path, work: Callable[[], _T]) -> _T:
    """Run `work` in a short-lived thread inside the namespace at `path`; blocks until it ends."""

    def enter_and_work() -> _T:
        _enter(path)
        return work()

    return _in_own_thread(enter_and_work)


def socket_in(netns_path: str, family: int, kind: int) -> socket.socket:
    """A new socket that belongs to the namespace at `netns_path`, for use from any thread.

    Errors: NetworkFailed where there is no such namespace or it may not be entered.
    """
    return inside(Path(netns_path), lambda: socket.socket(family, kind))


def write_setting(name: str, setting: str, value: int) -> None:
    """Set the sysctl `setting` (`net/ipv4/...`) in the namespace; one this kernel lacks is left."""
    file = Path("/proc/sys") / setting  # /proc/sys/net shows the calling thread's namespace

    def write() -> None:
        with contextlib.suppress(FileNotFoundError):
            file.write_text(str(value))

    inside(named(name), write)


def _ensure_folder() -> None:
    """`/run/netns` as a shared mount, exactly as `ip netns add` makes it on its first use.

    Made first by us as a plain folder, a later `ip netns add` would mount over it, and each
    namespace in it would be mounted twice and could never be removed.
    """
    NETNS_FOLDER.mkdir(exist_ok=True, mode=0o755)
    folder = os.fsencode(NETNS_FOLDER)
    with _locked_folder():
        if _libc.mount(b"", folder, b"none", _MS_SHARED | _MS_REC, None) == 0:
            return
        _mount(str(NETNS_FOLDER), NETNS_FOLDER, _MS_BIND | _MS_REC)
        _mount("", NETNS_FOLDER, _MS_SHARED | _MS_REC)


@contextlib.contextmanager
def _locked_folder() -> Iterator[None]:
    """One maker or remover of names at a time, over all processes; iproute2 takes the same lock."""
    folder = os.open(NETNS_FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _mount_new_namespace(path: Path) -> None:
    if _libc.unshare(_CLONE_NEWNET):
        raise _failed("make a network namespace", path)
    _mount("/proc/thread-self/ns/net", path, _MS_BIND)


def _mount(source: str, target: Path, flags: int) -> None:
    if _libc.mount(os.fsencode(source), os.fsencode(target), b"none", flags, None):
        raise _failed("mount", target)


def _enter(path: Path) -> None:
    try:
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NetworkFailed(
            f"cannot open the network namespace: {error.strerror}", at=str(path)
        ) from error
    try:
        if _libc.setns(namespace, _CLONE_NEWNET):
            raise _failed("enter the network namespace", path)
    finally:
        os.close(namespace)


def _failed(doing: str, path: Path) -> NetworkFailed:
    code = ctypes.get_errno()
    hint = "run as root with CAP_SYS_ADMIN" if code in (errno.EPERM, errno.EACCES) else ""
    return NetworkFailed(f"cannot {doing}: {os.strerror(code)}", at=str(path), hint=hint)


def _in_own_thread(work: Callable[[], _T]) -> _T:
    with ThreadPoolExecutor(1, thread_name_prefix="netns") as thread:
        return thread.submit(work).result()
