"""What clients did and saw, as a file of JSON lines can hold it.

Times are seconds of one machine's monotonic clock, taken before a request is sent and after its
answer is there, so that an operation took effect (if it did) between the two.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

Kind = Literal["read", "write"]


class Operation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One operation on one key, whose outcome is known, or open (`returned` None).

    value: what was written, or what was read ("" for a key that is not there). version: the
    key's version that the answer names, 0 where it names none. index: the log's, likewise.
    """

    key: str
    kind: Kind
    invoked: float
    returned: float | None = None
    value: str = ""
    version: int = 0
    index: int = 0
    client: str = ""
    node: str = ""

    def __str__(self) -> str:
        end = "open" if self.returned is None else f"{self.returned:.4f}"
        version = f" version {self.version}" if self.version else ""
        return (f"{self.invoked:.4f}-{end} {self.client} at {self.node}: "
                f"{self.kind} {self.key} {self.value or '(absent)'}{version}")


def save(path: Path, operations: Iterable[Operation]) -> None:
    """One operation a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(msgspec.json.encode(each) + b"\n" for each in operations))


def load(path: Path) -> list[Operation]:
    """What `save` wrote."""
    return msgspec.json.Decoder(Operation).decode_lines(path.read_bytes())
