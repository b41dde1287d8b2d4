"""What the leader may ask about a repository, and all that it may be told: values, no I/O.

They cross the pipe between the leader and its reading children as msgpack.
"""

from __future__ import annotations

import msgspec

from reconciler.git.location import Credentials, Location

MIB = 1 << 20


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """The most that one look may cost; past one, the source fails and what runs goes on.

    `entries` are tree entries visited, so that seven objects that stand for a million paths are
    refused; `memory_bytes` is the child's address space, the guard against objects that inflate.
    """

    files: int = 1_000
    file_bytes: int = 256 * 1024
    total_bytes: int = 2 * MIB
    entries: int = 50_000
    depth: int = 16
    fetched_bytes: int = 256 * MIB
    memory_bytes: int = 1024 * MIB
    cpu_s: int = 60
    head_s: float = 15.0


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A branch of a repository and the folder in it."""

    location: Location
    branch: str
    path: str = "/"
    credentials: Credentials | None = None


class Head(msgspec.Struct, frozen=True, tag="head"):
    """The branch stands at this commit."""

    sha: str


class Unchanged(msgspec.Struct, frozen=True, tag="unchanged"):
    """The branch still stands where it was last seen."""

    sha: str


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """A commit's manifests by their path in the repository; author and subject are cleaned."""

    sha: str
    files: dict[str, bytes]
    author: str = ""
    subject: str = ""


class Missing(msgspec.Struct, frozen=True, tag="missing"):
    """The branch (`head` "") or the path (in the commit `head`) is not there."""

    reason: str
    head: str = ""


class Unreachable(msgspec.Struct, frozen=True, tag="unreachable"):
    """The repository could not be asked; another time it may."""

    reason: str


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The commit `head` is there, but holds or costs what no source may."""

    reason: str
    head: str = ""


Found = Unchanged | Commit | Missing | Unreachable | Refused
Answer = Head | Commit | Missing | Unreachable | Refused
