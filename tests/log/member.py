"""One replica as a process: lines of JSON in, lines of JSON out.

`python -m tests.log.member FOLDER NAME NAME=HOST:PORT,… SNAPSHOT_BYTES`
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path

from reconciler.errors import MillError
from reconciler.log.replica import Member, Replica, Settings
from tests.log.cluster import Ledger


def settings(folder: Path, name: str, listed: str, snapshot_bytes: int) -> Settings:
    members = []
    for each in listed.split(","):
        member, _, address = each.partition("=")
        host, _, port = address.rpartition(":")
        members.append(Member(member, host, int(port)))
    me = next(member for member in members if member.name == name)
    return Settings(
        folder / name, me, tuple(members),
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
            }
        case other:
            raise AssertionError(f"not a question: {other}")


async def main() -> None:
    folder, name, listed, snapshot_bytes = sys.argv[1:]
    ledger = Ledger()
    replica = Replica(settings(Path(folder), name, listed, int(snapshot_bytes)), ledger)
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
