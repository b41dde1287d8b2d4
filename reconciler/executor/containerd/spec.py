"""What a container shall be, and the OCI runtime specification that says so to runc. Pure.

https://github.com/opencontainers/runtime-spec/blob/v1.0.2/config.md
"""

from __future__ import annotations

from typing import Any

import msgspec

from reconciler.errors import Unprocessable
from reconciler.executor.containerd.pull import ImageConfig, PulledImage

CPU_PERIOD_US = 100_000
CPU_QUOTA_MIN_US = 1_000
"""The kernel's own lower bound for a quota."""

PIDS_MAX = 4096
"""Processes and threads of one container: a fork bomb ends there and leaves the node alive."""

HOSTNAME_MAX = 64
"""HOST_NAME_MAX of Linux."""

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CAPABILITIES = (
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
    "CAP_MKNOD", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP",
    "CAP_SETUID", "CAP_SYS_CHROOT",
)  # fmt: skip
"""Those that Docker leaves a container."""

_MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
    "/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/firmware",
)  # fmt: skip
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


class Bind(msgspec.Struct, frozen=True):
    """A file or folder of the host at `target` in the container."""

    source: str
    target: str
    read_only: bool = True


class Tmpfs(msgspec.Struct, frozen=True):
    """A folder in memory; it counts towards the container's memory."""

    target: str
    size_bytes: int
    mode: int = 0o1777


class User(msgspec.Struct, frozen=True):
    """Who a process runs as, in numbers."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()


class ContainerSpec(msgspec.Struct, frozen=True):
    """One container, whole: what the agent asks for.

    `entrypoint` and `command` replace the image's where they are not None; `env` is `KEY=VALUE`
    and wins over the image's; `user` is 'UID', 'UID:GID' or a name of the image's, None for the
    image's own. `cpu_milli` and `memory_bytes` are ceilings, 0 for none. `netns` is the path of a
    network namespace; without one the container gets an empty one of its own. `stdout` and
    `stderr` are fifos. `cgroup` is the whole path, such as /mill-ab12/web-k3x9q1.
    """

    id: str
    image: PulledImage
    cgroup: str
    stdout: str
    stderr: str
    entrypoint: tuple[str, ...] | None = None
    command: tuple[str, ...] | None = None
    env: tuple[str, ...] = ()
    user: str | None = None
    workdir: str | None = None
    hostname: str = ""
    read_only: bool = False
    tmpfs: tuple[Tmpfs, ...] = ()
    binds: tuple[Bind, ...] = ()
    cpu_milli: int = 0
    memory_bytes: int = 0
    netns: str = ""
    labels: dict[str, str] = {}


def process_args(
    image: ImageConfig, entrypoint: tuple[str, ...] | None, command: tuple[str, ...] | None
) -> tuple[str, ...]:
    """What is run: an `entrypoint` of ours drops the image's Cmd as well as its Entrypoint."""
    if entrypoint is not None:
        args = entrypoint + (command or ())
    else:
        args = image.entrypoint + (image.cmd if command is None else command)
    if not args:
        hint = "set command or entrypoint"
        raise Unprocessable("the image names nothing to run", at="command", hint=hint)
    return args


def process_env(image: ImageConfig, env: tuple[str, ...]) -> tuple[str, ...]:
    """The image's environment under ours, each name once, with a PATH in any case."""
    merged: dict[str, str] = {}
    for pair in (_PATH, *image.env, *env):
        merged[pair.partition("=")[0]] = pair
    return tuple(merged.values())


def runtime_spec(spec: ContainerSpec, user: User, *, cgroup_v2: bool) -> dict[str, Any]:
    """The specification of `spec`, its user looked up, for a host of that cgroup version."""
    linux: dict[str, Any] = {
        "namespaces": _namespaces(spec.netns, cgroup_v2=cgroup_v2),
        "cgroupsPath": spec.cgroup,
        "resources": _resources(spec.cpu_milli, spec.memory_bytes),
        "maskedPaths": list(_MASKED),
        "readonlyPaths": list(_READ_ONLY),
    }
    if spec.netns:
        # In a network namespace of its own, a port below 1024 is nobody else's.
        linux["sysctl"] = {"net.ipv4.ip_unprivileged_port_start": "0"}
    return {
        "ociVersion": "1.0.2",
        "hostname": (spec.hostname or spec.id)[:HOSTNAME_MAX],
        "process": _process(spec, user),
        "root": {"path": "rootfs", "readonly": spec.read_only},
        "mounts": [*_system_mounts(), *_tmpfs(spec.tmpfs), *_binds(spec.binds)],
        "linux": linux,
    }


def _process(spec: ContainerSpec, user: User) -> dict[str, Any]:
    image = spec.image.config
    # What a user other than root may is decided at exec by file capabilities: only the bound stays.
    granted = list(_CAPABILITIES) if user.uid == 0 else []
    return {
        "terminal": False,
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(user.groups)},
        "args": list(process_args(image, spec.entrypoint, spec.command)),
        "env": list(process_env(image, spec.env)),
        "cwd": (image.workdir if spec.workdir is None else spec.workdir) or "/",
        "capabilities": {
            "bounding": list(_CAPABILITIES),
            "effective": granted,
            "permitted": granted,
        },
        "noNewPrivileges": True,
    }


def _namespaces(netns: str, *, cgroup_v2: bool) -> list[dict[str, str]]:
    network = {"type": "network", "path": netns} if netns else {"type": "network"}
    own = ["pid", "ipc", "uts", "mount", *(["cgroup"] if cgroup_v2 else [])]
    return [*({"type": kind} for kind in own), network]


def _resources(cpu_milli: int, memory_bytes: int) -> dict[str, Any]:
    """Ceilings; runc writes the same values to cgroup v1 and v2, each in its terms."""
    resources: dict[str, Any] = {
        "devices": [{"allow": False, "access": "rwm"}],  # runc adds null, zero, tty and the like
        "pids": {"limit": PIDS_MAX},
    }
    if memory_bytes:
        # Swap counts memory and swap together: the same figure means no swap.
        resources["memory"] = {"limit": memory_bytes, "swap": memory_bytes}
    if cpu_milli:
        quota_us = cpu_milli * CPU_PERIOD_US // 1000
        resources["cpu"] = {
            "quota": max(quota_us, CPU_QUOTA_MIN_US),
            "period": CPU_PERIOD_US,
            "shares": max(cpu_milli * 1024 // 1000, 2),
        }
    return resources


def _system_mounts() -> list[dict[str, Any]]:
    strict = ["nosuid", "noexec", "nodev"]
    shm = [*strict, "mode=1777", "size=65536k"]
    return [
        _mount("/proc", "proc", "proc", strict),
        _mount("/dev", "tmpfs", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
        _mount(
            "/dev/pts",
            "devpts",
            "devpts",
            ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        _mount("/dev/shm", "tmpfs", "shm", shm),  # noqa: S108  # the container's, not ours
        _mount("/dev/mqueue", "mqueue", "mqueue", strict),
        _mount("/sys", "sysfs", "sysfs", [*strict, "ro"]),
        # Runtimes with a garbage collector size themselves by the limits they find here.
        _mount("/sys/fs/cgroup", "cgroup", "cgroup", [*strict, "relatime", "ro"]),
    ]


def _tmpfs(wanted: tuple[Tmpfs, ...]) -> list[dict[str, Any]]:
    return [
        _mount(
            one.target,
            "tmpfs",
            "tmpfs",
            ["nosuid", "nodev", f"size={one.size_bytes}", f"mode={one.mode:o}"],
        )
        for one in wanted
    ]


def _binds(wanted: tuple[Bind, ...]) -> list[dict[str, Any]]:
    return [
        _mount(one.target, "bind", one.source, ["rbind", "ro" if one.read_only else "rw"])
        for one in wanted
    ]


def _mount(target: str, kind: str, source: str, options: list[str]) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": options}
