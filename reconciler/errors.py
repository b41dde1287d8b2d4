"""The errors that reach a person: each says what, where, and what to do.

Subclasses live beside the code that raises them; the five here are the kinds that the
API and the CLI translate into a status and an exit code.
"""

from __future__ import annotations


class MillError(Exception):
    """What went wrong, where (`at`), and what to do about it (`hint`).

    `status` is the HTTP status (RFC 9110) with which the API answers. `unwritten`: for want of a
    leader surely nothing was written, so whoever leads may be asked the same.
    """

    status = 500
    unwritten = False

    def __init__(self, what: str, *, at: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.at = at
        self.hint = hint

    def __str__(self) -> str:
        where = f" (at {self.at})" if self.at else ""
        return f"{self.what}{where}"


class Malformed(MillError):
    """The request itself cannot be read: 400."""

    status = 400


class NotFound(MillError):
    """The named thing does not exist: 404."""

    status = 404


class Conflict(MillError):
    """Something else holds what this needs; `what` names it: 409."""

    status = 409


class Unprocessable(MillError):
    """Readable, but not acceptable: 422."""

    status = 422


class Unavailable(MillError):
    """No leader or no majority right now; trying again may work: 503."""

    status = 503
