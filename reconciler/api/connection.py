"""From a program to a cluster: several addresses, one at a time, and errors that say which of
"nothing happened", "refused" and "nobody knows" it was."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from http import HTTPStatus

import httpx
import msgspec

from reconciler.api.address import base_url
from reconciler.api.stream import Decoder, Message, StreamGarbled
from reconciler.api.tls import client_context, why_unverified
from reconciler.api.types import Problem
from reconciler.errors import Malformed, MillError, Unavailable

CONNECT_S = 3.0
READ_ANSWER_S = 20.0
WRITE_ANSWER_S = 700.0
"""Both above what a forwarding node waits for the leader's answer."""
STREAM_SILENCE_S = 60.0
"""Four missed comments: whoever sent them is gone."""
MAX_PROBLEM_BYTES = 1024 * 1024
PAUSES_S = (0.1, 0.2, 0.5, 1.0)
"""Between attempts; the last one repeats."""

Params = Sequence[tuple[str, str]]


class Refused(MillError):
    """The cluster answered with a problem; `problem.errors` has those of a manifest."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.detail, at=problem.at if isinstance(problem.at, str) else "",
                         hint=problem.hint)
        self.status = problem.status
        self.problem = problem


class Unreachable(Unavailable):
    """No address answered; nothing happened."""


class NoAnswer(Unavailable):
    """The connection broke after the request was sent: it may or may not have happened."""


def exit_code(error: MillError) -> int:
    """The CLI's exit code for an error (contracts: CLI)."""
    match error.status:
        case 400 | 405 | 413 | 415 | 422:
            return 2
        case 503:
            return 3
        case 401 | 403:
            return 4
        case 404:
            return 5
        case 409:
            return 6
        case _:
            return 1


class Connection:
    """Requests to whichever address answers first, starting with the one that did last.

    ca: the cluster's, PEM; None believes what the system believes.
    """

    def __init__(self, addresses: Sequence[str], token: str, ca: bytes | None = None) -> None:
        assert addresses, "a client needs an address"
        self._bases = [base_url(address) for address in addresses]
        # Loading the system's CAs takes 30 ms: not where no address is https.
        secure = any(base.startswith("https:") for base in self._bases)
        self._client = httpx.AsyncClient(
            verify=_context(ca) if ca is not None and secure else secure,
            trust_env=False, timeout=httpx.Timeout(WRITE_ANSWER_S, connect=CONNECT_S),
            headers={"authorization": f"Bearer {token}"} if token else {},
        )

    async def close(self) -> None:
        """Let go of all connections."""
        await self._client.aclose()

    async def ask(
        self, method: str, path: str, *, params: Params = (), body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """The body of a 2xx answer; Refused, Unreachable or NoAnswer otherwise."""
        answer = await self.open(method, path, params=params, body=body, headers=headers)
        try:
            return await answer.aread()
        except httpx.HTTPError as error:
            raise NoAnswer(f"{_shown(answer.url)} stopped in the middle of its answer",
                           hint="look before you repeat it") from error
        finally:
            await answer.aclose()

    async def open(
        self, method: str, path: str, *, params: Params = (), body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """A 2xx answer, its body still to be read; raises as `ask` does.

        Another address is tried where nothing can have happened: none was reached, or a read
        was answered with 503.
        """
        failure: MillError = Unreachable("no address of the cluster")
        deadline_s = READ_ANSWER_S if method == "GET" else WRITE_ANSWER_S
        for base in list(self._bases):
            request = self._client.build_request(
                method, base + path, params=list(params), content=body, headers=headers
            )
            try:
                async with asyncio.timeout(deadline_s):
                    answer = await self._client.send(request, stream=True)
                if answer.is_success:
                    self._prefer(base)
                    return answer
                failure = await refused(answer)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                self._avoid(base)
                if not isinstance(failure, Refused):  # what a node has said tells more
                    failure = _unreachable(base, error)
                continue
            except (httpx.HTTPError, TimeoutError) as error:
                failure = NoAnswer(f"{base} gave no answer: {type(error).__name__}",
                                   hint="look before you repeat it")
                self._avoid(base)
            if method != "GET" or failure.status != HTTPStatus.SERVICE_UNAVAILABLE:
                raise failure
        raise failure

    async def patient(
        self, method: str, path: str, *, patience_s: float, params: Params = (), body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """As `open`, again and again for `patience_s` while there is no leader.

        For what may be repeated alone: reads, and writes with an Idempotency-Key.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        attempt = 0
        while True:
            try:
                return await self.open(method, path, params=params, body=body, headers=headers)
            except MillError as error:
                pause_s = PAUSES_S[min(attempt, len(PAUSES_S) - 1)]
                if error.status != HTTPStatus.SERVICE_UNAVAILABLE \
                        or loop.time() + pause_s > deadline:
                    raise
            attempt += 1
            await asyncio.sleep(pause_s)

    def _avoid(self, base: str) -> None:
        self._bases.remove(base)
        self._bases.append(base)

    def _prefer(self, base: str) -> None:
        self._bases.remove(base)
        self._bases.insert(0, base)


async def messages(answer: httpx.Response) -> AsyncGenerator[Message, None]:
    """The events of a stream until it ends, breaks, or is silent; always closes it."""
    decoder = Decoder()
    pieces = answer.aiter_bytes()
    try:
        while True:
            async with asyncio.timeout(STREAM_SILENCE_S):
                piece = await anext(pieces, None)
            if piece is None:
                return
            for message in decoder.feed(piece):
                yield message
    except (httpx.HTTPError, TimeoutError, StreamGarbled) as error:
        raise NoAnswer(f"the stream from {_shown(answer.url)} broke: {type(error).__name__}",
                       hint="ask again to go on") from error
    finally:
        await answer.aclose()


async def refused(answer: httpx.Response) -> Refused:
    """The problem of an answer that is none of 2xx; closes it."""
    body = bytearray()
    try:
        async for piece in answer.aiter_bytes():
            body += piece
            if len(body) > MAX_PROBLEM_BYTES:
                break
        return Refused(msgspec.json.decode(body, type=Problem))
    except msgspec.DecodeError:
        # Not one of ours: a proxy in between, or a server that has just had too much.
        return Refused(Problem(
            type="about:blank", title=answer.reason_phrase, status=answer.status_code,
            detail=f"{_shown(answer.url)} answered {answer.status_code} {answer.reason_phrase}",
        ))
    finally:
        await answer.aclose()


def _context(ca: bytes) -> ssl.SSLContext:
    try:
        return client_context(ca)
    except (ssl.SSLError, ValueError) as error:
        raise Malformed("the CA of the cluster is no certificate in PEM",
                        hint="it is ca.pem in the data folder of each node") from error


def _unreachable(base: str, error: httpx.TransportError) -> Unreachable:
    reason = why_unverified(error)
    if reason:
        return Unreachable(
            f"{base} is not trusted: {reason}",
            hint="is it a node of this cluster? name the cluster's CA with MILL_CA=FILE, or use "
                 "the context that mill init or mill join wrote, with --context")
    return Unreachable(f"nothing answers at {base}: {str(error) or 'no answer in time'}",
                       hint="is the node up? name another with --address")


def _shown(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.netloc.decode()}"
