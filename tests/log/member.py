"""One replica as a process: lines of JSON in, lines of JSON out.

`python -m tests.log.member FOLDER NAME NAME=HOST:PORT,… SNAPSHOT_BYTES FOUNDING`, the first
FOUNDING of those named are the founding voters.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path

from reconciler.errors import MillError
from reconciler.log.replica import (
    AddLearner,
    Change,
    Member,
    Promote,
    Remove,
    Replica,
    Settings,
)
from tests.log.cluster import Ledger


def settings(
    folder: Path, name: str, listed: str, snapshot_bytes: int, founding: int | None = None
) -> Settings:
    members = []
    for each in listed.split(","):
        member, _, address = each.partition("=")
        host, _, port = address.rpartition(":")
        members.append(Member(member, host, int(port)))
    me = next(member for member in members if member.name == name)
    return Settings(
        folder / name, me, tuple(members[:founding]),
        folder / "ca.pem", folder / f"{name}.pem", folder / f"{name}.key", snapshot_bytes,
    )  # fmt: skip


async def answer(replica: Replica, ledger: Ledger, question: dict[str, str]) -> object:
    match question:
        case {"propose": text}:
            try:
                index, result = await replica.propose(base64.b64decode(text))
            except MillError as error:
                return {"error": type(error).__name__}
            return {"index": index, "result": result}
        case {"add": [name, host, int(port)]}:
            return await changed(replica, AddLearner(Member(name, host, port)))
        case {"promote": name}:
            return await changed(replica, Promote(name))
        case {"remove": name}:
            return await changed(replica, Remove(name))
        case {"read": _}:
            try:
                return {"index": await replica.read_index(2.0)}
            except MillError as error:
                return {"error": type(error).__name__}
        case {"commands": _}:
            return {"commands": [base64.b64encode(each).decode() for each in ledger.commands]}
        case {"status": _}:
            return {
                "leading": replica.is_leader,
                "leader": replica.leader,
                "term": replica.term,
                "applied": replica.applied_index,
                "closed": replica.closed,
                "voters": sorted(each.name for each in replica.membership.voters),
                "members": replica.membership.index,
            }
        case other:
            raise AssertionError(f"not a question: {other}")


async def changed(replica: Replica, change: Change) -> object:
    try:
        return {"index": await replica.change(change)}
    except MillError as error:
        return {"error": type(error).__name__}


async def main() -> None:
    folder, name, listed, snapshot_bytes, founding = sys.argv[1:]
    ledger = Ledger()
    replica = Replica(
        settings(Path(folder), name, listed, int(snapshot_bytes), int(founding)), ledger
    )
    await replica.start()
    reader = asyncio.StreamReader(limit=64 << 20)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        reply = await answer(replica, ledger, json.loads(line))
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()
    await replica.stop()


if __name__ == "__main__":
    asyncio.run(main())
