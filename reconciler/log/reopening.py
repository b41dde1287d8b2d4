"""Opening a log: at a start, and after a failed write or sync once the disk takes writes again.

Nobody knows what the disk holds then. What a killed process wrote last may be in the
kernel's cache alone. A page whose sync failed may look written there while the disk has the
former content, and no later sync writes it (fsync(2); Rebello et al., "Can Applications
Recover from fsync Failures?", 2020); so with names. So the files are read from the first
byte, verified, and written anew into files that never failed. Until the last of them is in
place, nothing is promised that rests on the old ones.
"""

from __future__ import annotations

from reconciler.log.disk import Disk
from reconciler.log.errors import DiskFailed
from reconciler.log.journal import RESERVE_BYTES, Journal
from reconciler.log.snapshot import Snapshots

PROBE = "probe"
_PROBED_BYTES = 64 << 10


def reopen(disk: Disk) -> Journal:
    """The journal, verified and durable, the snapshot likewise.

    Raises DiskFailed where the disk still fails, LogDamaged where a file is not what was
    written; all may be tried again later.
    """
    probe(disk)
    # First: the journal may begin where this snapshot ends, whose name may not be durable yet.
    Snapshots(disk).renew()
    return Journal(disk)


def probe(disk: Disk) -> None:
    """Write and sync a file as large as the journal's next step, then take it away."""
    try:
        file = disk.create(PROBE)
        try:
            file.reserve(0, RESERVE_BYTES)
            file.write_at(0, bytes(_PROBED_BYTES))
            file.sync()
        finally:
            file.close()
            disk.remove(PROBE)
    except OSError as error:
        raise DiskFailed("a probe cannot be written", error, disk.where(PROBE)) from error
