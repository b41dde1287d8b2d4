"""A user by name, looked up in the image's own /etc/passwd and /etc/group."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from reconciler.errors import Unprocessable
from reconciler.executor.containerd.generated.types_pb2 import Mount
from reconciler.executor.containerd.spec import User

_FILE_BYTES = 1 << 20
"""A longer passwd or group file is not read to its end."""

_ID_MAX = 2**31 - 1


def find_user(text: str, mounts: Sequence[Mount]) -> User:
    """'', 'NAME', 'UID', 'NAME:GROUP' and so on, as numbers, by Docker's rules.

    `mounts` are those of the container's snapshot: its files are read where they lie, unmounted.
    Numbers need no entry in the image. Raises `Unprocessable` for a name that is not there.
    """
    if text in {"", "0", "root", "0:0"}:
        return User()
    user, colon, group = text.partition(":")
    if user.isdecimal() and group.isdecimal():
        return User(uid=_number(user), gid=_number(group))
    layers = _layers(mounts)
    people, groups = (_entries(layers, name) for name in ("passwd", "group"))
    name, uid, gid = _person(user, people)
    if colon:
        return User(uid=uid, gid=_group(group, groups))
    member_of = {int(row[2]) for row in groups if name and name in row[3].split(",")}
    return User(uid=uid, gid=gid, groups=tuple(sorted(member_of)))


def _person(user: str, people: list[list[str]]) -> tuple[str, int, int]:
    """Name, uid and gid; a number without an entry has group 0 and no name."""
    column = 2 if user.isdecimal() else 0
    for row in people:
        if row[column] == user:
            return row[0], int(row[2]), int(row[3])
    if user.isdecimal():
        return "", _number(user), 0
    hint = "use a name of the image's /etc/passwd, or numbers"
    raise Unprocessable(f"the image has no user {user!r}", at="user", hint=hint)


def _group(group: str, groups: list[list[str]]) -> int:
    if group.isdecimal():
        return _number(group)
    for row in groups:
        if row[0] == group:
            return int(row[2])
    hint = "use a name of the image's /etc/group, or numbers"
    raise Unprocessable(f"the image has no group {group!r}", at="user", hint=hint)


def _number(text: str) -> int:
    if len(text) > len(str(_ID_MAX)) or int(text) > _ID_MAX:
        raise Unprocessable(f"{text} is above the highest id, {_ID_MAX}", at="user")
    return int(text)


def _layers(mounts: Sequence[Mount]) -> list[Path]:
    """The folders that lie on one another, the uppermost first."""
    folders: list[Path] = []
    for mount in mounts:
        if mount.type == "bind":
            folders.append(Path(mount.source))
        for option in mount.options:
            key, _, value = option.partition("=")
            if key in {"upperdir", "lowerdir"}:
                folders += [Path(folder) for folder in value.split(":")]
    return sorted(folders, key=lambda folder: f"upperdir={folder}" not in mounts[0].options)


def _entries(layers: list[Path], name: str) -> list[list[str]]:
    """The rows of /etc/NAME with at least a name and a number."""
    for layer in layers:
        text = _read_within(layer, name)
        if text is not None:
            rows = [[*line.split(":"), "", "", ""] for line in text.splitlines()]
            width = 4 if name == "passwd" else 3
            return [row for row in rows if all(cell.isdecimal() for cell in row[2:width])]
    return []


def _read_within(layer: Path, name: str) -> str | None:
    """The text of etc/NAME in a layer; None where the layer does not have it.

    No symbolic link is followed: a hostile image's would lead out, to the host's own files.
    """
    with contextlib.ExitStack() as stack:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            etc = os.open(layer / "etc", flags | os.O_DIRECTORY)
            stack.callback(os.close, etc)
            file = os.open(name, flags | os.O_NONBLOCK, dir_fd=etc)
            stack.callback(os.close, file)
        except OSError:
            return None
        if not stat.S_ISREG(os.fstat(file).st_mode):
            return ""  # overlayfs marks a deleted file with a device: nothing below counts
        return os.read(file, _FILE_BYTES).decode(errors="replace")
