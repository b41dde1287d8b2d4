"""A containerd of our own in one folder, as `mill dev` needs: started, found again, stopped.

It outlives whoever started it, and there is no pid file to go stale: the daemon of a folder is the
process whose command line is `containerd -c FOLDER/config.toml`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import grpc
import msgspec
from google.protobuf.empty_pb2 import Empty

from reconciler.errors import Unavailable
from reconciler.executor.containerd import rpc

START_S = 60.0
"""It serves 15 ms after its start; after a crash with many dead tasks it first cleans up."""

STOP_S = 10.0
SOCKET_PATH_BYTES = 104
"""`sun_path` of unix(7) is 108 bytes with its closing NUL; containerd itself refuses over 104."""

_LOG_BYTES = 10 << 20
_LOG_TAIL_LINES = 5

_CONFIG = """\
version = 2
root = "{root}"
state = "{state}"
oom_score = 0
# Not disabled: io.containerd.runtime.v1.linux, without which the tasks service does not load.
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.internal.v1.opt", "io.containerd.internal.v1.restart",
  "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp",
]

[grpc]
  address = "{socket}"

[ttrpc]
  address = "{socket}.ttrpc"
"""


class DaemonPaths(msgspec.Struct, frozen=True):
    """Where the daemon of a folder keeps its things."""

    folder: Path
    config: Path
    log: Path
    root: Path
    state: Path
    runc_root: Path
    socket: Path


def daemon_paths(folder: Path) -> DaemonPaths:
    """The paths of the daemon of `folder`, running or not.

    A unix socket's path has at most 107 bytes; where `folder` lies too deep for that, the sockets
    go to /run/mill-HASH, named after the folder so that another's daemon never meets them.
    """
    folder = folder.resolve()
    sockets = folder
    if len(os.fsencode(folder / "containerd.sock.ttrpc")) > SOCKET_PATH_BYTES:
        digest = hashlib.sha256(os.fsencode(folder)).hexdigest()
        sockets = Path("/run") / f"mill-{digest[:12]}"
    return DaemonPaths(
        folder=folder,
        config=folder / "config.toml",
        log=folder / "containerd.log",
        root=folder / "root",
        state=folder / "state",
        runc_root=folder / "runc",
        socket=sockets / "containerd.sock",
    )


def start_daemon(folder: Path) -> int:
    """The pid of the folder's daemon, which serves on return; started if it does not run.

    Blocks for 50 ms or so (up to START_S). Raises `Unavailable` with the log's last lines.
    """
    paths = daemon_paths(folder)
    for private in (paths.folder, paths.socket.parent, paths.runc_root):
        private.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _only_one(paths.folder / "lock"):
        if running_daemon(folder) is None:
            _launch(paths)
        return _await_service(paths)


def running_daemon(folder: Path) -> int | None:
    """The pid of the folder's daemon, or None."""
    wanted = ("-c", os.fsdecode(daemon_paths(folder).config))
    return next((pid for pid, line in _processes() if _is_containerd(line, wanted)), None)


def stop_daemon(folder: Path) -> None:
    """End the folder's daemon; containers and their shims go on. Returns when it is gone."""
    pid = running_daemon(folder)
    if pid is not None:
        _end(pid, signal.SIGTERM, STOP_S) or _end(pid, signal.SIGKILL, STOP_S)


def purge_daemon(folder: Path) -> None:
    """End the folder's daemon and all its containers, by force, and forget the folder.

    For `--reset` and for clean-up after a crash; nothing needs to be running or in order.
    """
    paths = daemon_paths(folder)
    stop_daemon(folder)
    for record in sorted(paths.runc_root.glob("*/*")):
        command = ["runc", "--root", str(record.parent), "delete", "--force", record.name]
        subprocess.run(command, capture_output=True, check=False, timeout=STOP_S)
    of_ours = ("-address", str(paths.socket))
    for pid, line in list(_processes()):
        if _is_shim(line, of_ours):
            _end(pid, signal.SIGKILL, STOP_S)
    for address in paths.state.glob("*/*/*/address"):  # a shim's socket, below /run/containerd/s
        Path(address.read_text().removeprefix("unix://")).unlink(missing_ok=True)
    _unmount_below(paths.folder)
    shutil.rmtree(paths.folder, ignore_errors=True)
    if paths.socket.parent != paths.folder:
        shutil.rmtree(paths.socket.parent, ignore_errors=True)


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    with open(lock, "w", opener=_private) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _private(path: str, flags: int) -> int:
    """An opener of files for root alone."""
    return os.open(path, flags, 0o600)


def _launch(paths: DaemonPaths) -> None:
    config = _CONFIG.format(root=paths.root, state=paths.state, socket=paths.socket)
    with open(paths.config, "w", opener=_private) as file:
        file.write(config)
    if paths.log.exists() and paths.log.stat().st_size > _LOG_BYTES:
        paths.log.replace(paths.log.with_suffix(".log.1"))
    with open(paths.log, "ab", opener=_private) as log:
        # setsid --fork hands the daemon to init: it is nobody's child, so that it neither dies with
        # the terminal nor stays behind as a zombie of a caller that does not wait for it.
        subprocess.run(
            ["setsid", "--fork", "containerd", "-c", str(paths.config)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            check=True,
            cwd="/",
        )


def _await_service(paths: DaemonPaths) -> int:
    deadline = time.monotonic() + START_S
    seen = False
    while time.monotonic() < deadline:
        pid = running_daemon(paths.folder)
        if pid is not None and _serves(paths.socket):
            return pid
        if pid is None and seen:
            break
        seen = seen or pid is not None
        time.sleep(0.005)
    tail = paths.log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    what = "containerd ended at once" if seen else "containerd did not start"
    raise Unavailable(f"{what}: " + " | ".join(tail), at=str(paths.log), hint="see its log")


def _serves(socket: Path) -> bool:
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        version = channel.unary_unary(
            rpc.VERSION.path,
            request_serializer=Empty.SerializeToString,
            response_deserializer=rpc.VERSION.answer.FromString,
        )
        try:
            version(Empty(), timeout=1.0)
        except grpc.RpcError:
            return False
    return True


def _processes() -> Iterator[tuple[int, list[str]]]:
    """All processes with their command lines; zombies have an empty one."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                line = os.fsdecode((entry / "cmdline").read_bytes())
                yield int(entry.name), line.split("\0")


def _is_containerd(line: list[str], wanted: tuple[str, str]) -> bool:
    return Path(line[0]).name == "containerd" and tuple(line[1:3]) == wanted


def _is_shim(line: list[str], address: tuple[str, str]) -> bool:
    shim = Path(line[0]).name.startswith("containerd-shim")
    return shim and address in pairwise(line)


def _end(pid: int, number: signal.Signals, wait_s: float) -> bool:
    """Send a signal and wait for the end; True when the process is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, number)
        return bool(select.select([handle], [], [], wait_s)[0])
    finally:
        os.close(handle)


def _unmount_below(folder: Path) -> None:
    """Unmount what is mounted below `folder`, the deepest first; rmtree must not follow a mount."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    points = [line.split()[4].encode().decode("unicode_escape") for line in lines]
    for point in sorted((p for p in points if p.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", point], capture_output=True, check=False)
