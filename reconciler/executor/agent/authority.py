"""The cluster's key and new certificates, over the agent's door: what is asked, and by whom.

`ClusterKey` is answered by every node to every other; `Sign` by the leader, to a node that asks
for a certificate of its own name. Who asks is what its certificate says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NoReturn, Protocol, TypeVar

import grpc
import msgspec

from reconciler.errors import MillError, Unavailable
from reconciler.executor.agent.orders import SERVICE, encode

Q = TypeVar("Q")
A = TypeVar("A")

CLUSTER_KEY = "ClusterKey"
SIGN = "Sign"
ANSWER_S = 10.0
"""For one call; a leader that cannot reach its majority says so within that."""
RETRY_S = 0.2
_CODES = {400: grpc.StatusCode.INVALID_ARGUMENT, 403: grpc.StatusCode.PERMISSION_DENIED,
          404: grpc.StatusCode.NOT_FOUND, 409: grpc.StatusCode.FAILED_PRECONDITION,
          422: grpc.StatusCode.INVALID_ARGUMENT, 503: grpc.StatusCode.FAILED_PRECONDITION}
_PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.FAILED_PRECONDITION,
            grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
"""What may be otherwise in a moment: no leader yet, a node that is starting, a lost connection."""


class Refusal(MillError):
    """An agent said no, and will say no again: 403."""

    status = 403


class Nothing(msgspec.Struct, frozen=True):
    """A question without words."""


class ClusterKey(msgspec.Struct, frozen=True):
    """The key under which the cluster's secrets are sealed, 32 bytes."""

    key: bytes

    def __repr__(self) -> str:
        return "ClusterKey(***)"


class SignRequest(msgspec.Struct, frozen=True):
    """A certificate request (PEM, PKCS #10) for the caller's own name."""

    csr: bytes


class Signed(msgspec.Struct, frozen=True):
    """The certificate, PEM."""

    certificate: bytes


class Custody(Protocol):
    """Who holds the key and signs. `caller` is the name in the certificate that asks."""

    async def give_key(self, caller: str) -> bytes:
        """The cluster's key; refuses (403) whoever is no node of the cluster."""
        ...

    async def renew(self, caller: str, csr_pem: bytes) -> bytes:
        """A certificate for the caller's new key; Unavailable names the leader elsewhere."""
        ...


class Dialler(Protocol):
    """Opens connections to agents with this node's certificate."""

    def channel(self, address: str, node: str) -> grpc.aio.Channel:
        """To `node`'s agent at `address`."""
        ...


def handlers(
    custody: Custody, caller: Callable[[grpc.aio.ServicerContext[object, object]], str]
) -> dict[str, grpc.RpcMethodHandler[object, object]]:
    """The two methods; `caller` tells who speaks in a context."""

    async def give_key(_: object, context: grpc.aio.ServicerContext[object, object]) -> object:
        try:
            return ClusterKey(await custody.give_key(caller(context)))
        except MillError as error:
            await refuse(context, error)

    async def renew(asked: object, context: grpc.aio.ServicerContext[object, object]) -> object:
        assert isinstance(asked, SignRequest), "as its decoder made it"
        try:
            return Signed(await custody.renew(caller(context), asked.csr))
        except MillError as error:
            await refuse(context, error)

    return {
        CLUSTER_KEY: grpc.unary_unary_rpc_method_handler(
            give_key, request_deserializer=_nothing.decode, response_serializer=encode),
        SIGN: grpc.unary_unary_rpc_method_handler(
            renew, request_deserializer=_request.decode, response_serializer=encode),
    }


async def refuse(
    context: grpc.aio.ServicerContext[object, object], error: MillError
) -> NoReturn:
    """End the call with the error's own words."""
    told = f"{error.what}; {error.hint}" if error.hint else error.what
    await context.abort(_CODES.get(error.status, grpc.StatusCode.INTERNAL), told)
    raise AssertionError("abort raises")


async def fetch_cluster_key(
    address: str, node: str, dialler: Dialler, within_s: float = 30.0
) -> bytes:
    """The cluster's key from `node`'s agent at `address` (host:port).

    A node that has just joined may be unknown there for a moment, so it asks again until
    `within_s` is over. MillError (403) where it is no node; Unavailable where none answers.
    """
    async with dialler.channel(address, node) as channel:
        call = channel.unary_unary(f"/{SERVICE}/{CLUSTER_KEY}", request_serializer=encode,
                                   response_deserializer=_key.decode)
        return (await _ask(call, Nothing(), node, within_s)).key


async def renew(
    address: str, leader: str, csr_pem: bytes, dialler: Dialler, within_s: float = 30.0
) -> bytes:
    """A certificate (PEM) for this node's new key, from the leader's agent."""
    async with dialler.channel(address, leader) as channel:
        call = channel.unary_unary(f"/{SERVICE}/{SIGN}", request_serializer=encode,
                                   response_deserializer=_signed.decode)
        return (await _ask(call, SignRequest(csr_pem), leader, within_s)).certificate


async def _ask(
    call: grpc.aio.UnaryUnaryMultiCallable[Q, A], question: Q, node: str, within_s: float
) -> A:
    loop = asyncio.get_running_loop()
    until = loop.time() + within_s
    while True:
        try:
            return await call(question, timeout=ANSWER_S, wait_for_ready=False)
        except grpc.aio.AioRpcError as error:
            told = error.details() or error.code().name
            if error.code() not in _PASSING:
                raise Refusal(f"{node} refuses: {told}") from error
            if loop.time() > until:
                raise Unavailable(f"{node} does not answer: {told}",
                                  hint="is port 4402 of that node reachable from here?") from error
        await asyncio.sleep(RETRY_S)


_nothing: msgspec.msgpack.Decoder[Nothing] = msgspec.msgpack.Decoder(Nothing)
_request: msgspec.msgpack.Decoder[SignRequest] = msgspec.msgpack.Decoder(SignRequest)
_key: msgspec.msgpack.Decoder[ClusterKey] = msgspec.msgpack.Decoder(ClusterKey)
_signed: msgspec.msgpack.Decoder[Signed] = msgspec.msgpack.Decoder(Signed)
