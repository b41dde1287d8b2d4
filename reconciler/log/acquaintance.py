"""Whom a node knew last, kept beside its log for the day on which the log is lost.

A node that rejoins with an empty log has to ask every other member, and its settings may name
none that is left: the one that founded the cluster names itself alone. The file is no part of
Raft. Nothing is decided by it but whom to ask, and they know better.
"""

from __future__ import annotations

import msgspec

from reconciler.log import configuration
from reconciler.log.disk import Disk, replace_file
from reconciler.log.errors import DiskFailed
from reconciler.log.settings import Membership

NAME = "members"


def store(disk: Disk, membership: Membership) -> None:
    """Keep a committed membership, in place of any before; raises DiskFailed."""
    try:
        replace_file(disk, NAME, (configuration.encode(membership),))
    except OSError as error:
        raise DiskFailed("the members cannot be written", error, disk.where(NAME)) from error


def load(disk: Disk) -> Membership | None:
    """What was kept; None where there is nothing, or nothing that can be read as it."""
    try:
        data = disk.read(NAME)
    except OSError as error:
        raise DiskFailed("the members cannot be read", error, disk.where(NAME)) from error
    try:
        return None if data is None else configuration.decode(data)
    except msgspec.MsgspecError:
        return None
