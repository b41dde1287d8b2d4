"""The newest term that an agent has obeyed, on its own disk: apart from the log, which may be lost.

Without it a node whose log is gone, or closed, would begin at term 0 and obey the longest sleeper.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import structlog

log = structlog.get_logger("mill.agent")


class Terms:
    """One small file, replaced whole."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def newest(self) -> int:
        """The newest that was kept; 0 where none was."""
        try:
            text = self._path.read_text().strip()
        except OSError:
            return 0
        return int(text) if text.isascii() and text.isdigit() else 0

    def keep(self, term: int) -> None:
        """Durable on return. Where the disk does not take it the agent goes on: it still knows the
        term while it lives, and the cluster must not lose a node's containers to a full disk."""
        temporary = self._path.with_suffix(".new")
        try:
            with open(temporary, "w", opener=_private) as file:
                file.write(f"{term}\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
            _sync(self._path.parent)  # else a power cut may bring the older one back
        except OSError as error:
            log.warning("term_not_kept", path=str(self._path), reason=str(error))
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _private(path: str, flags: int) -> int:
    """An opener of files for root alone."""
    return os.open(path, flags, 0o600)
