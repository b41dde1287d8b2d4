"""A change of leader fails no write: what surely was not written is asked again for a while.

An answer that leaves the outcome open is never asked again: that is the caller's to decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
from starlette.responses import Response

from reconciler.errors import MillError, Unavailable
from reconciler.executor.ledger import noting
from reconciler.fsm.commands import AnyCommand, RestoreState, StoreSpec

AGAIN_S = 3.0
"""An election takes a second, the slowest two; a cluster without a majority is said after this."""
PAUSE_S = 0.05
_UNWRITTEN = frozenset({"urn:mill:problem:not-leader", "urn:mill:problem:no-leader"})
"""What a node answers that was taken for the leader, and is not: it never asks a third one."""


_PIECES = (StoreSpec, RestoreState)
"""Written again they change nothing: each begins what it is a piece of anew."""


class LeaderLeft(Unavailable):
    """The leadership went elsewhere in the middle of a request that had written something: 503."""


class _Problem(msgspec.Struct):
    type: str = ""


async def until_taken(once: Callable[[], Awaitable[Response]], *, alone: bool) -> Response:
    """The answer of `once`, called again while it surely wrote nothing for want of a leader.

    alone: nobody else asks for the same again, as the node does that forwarded the request here.
    """
    loop = asyncio.get_running_loop()
    ends = loop.time() + AGAIN_S
    while True:
        try:
            with noting() as written:
                answer = await once()
        except MillError as error:
            if not error.unwritten:
                raise
            if not all(isinstance(command, _PIECES) for command in written):
                raise _left(written) from error
            if not alone or loop.time() >= ends:
                raise
        else:
            if not is_unwritten(answer) or loop.time() >= ends:
                return answer
        await asyncio.sleep(PAUSE_S)


def _left(written: list[AnyCommand]) -> LeaderLeft:
    names = ", ".join(sorted({type(command).__name__ for command in written}))
    return LeaderLeft(
        f"the leadership went to another node in the middle; written already: {names}",
        hint="look before you repeat it, or repeat it with the same Idempotency-Key")


def is_unwritten(answer: Response) -> bool:
    """The answer of a node that was asked as the leader, and did not lead."""
    if answer.status_code != 503 or not isinstance(answer.body, bytes):
        return False
    try:
        return msgspec.json.decode(answer.body, type=_Problem).type in _UNWRITTEN
    except msgspec.MsgspecError:
        return False
