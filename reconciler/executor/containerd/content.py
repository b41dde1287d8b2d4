"""Blobs in containerd's content store: looked up, read, and written with resumption."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable

import grpc
import msgspec

from reconciler.executor.containerd import rpc
from reconciler.executor.containerd.client import (
    SLOW_TIMEOUT_S,
    Absent,
    AlreadyThere,
    Containerd,
    RuntimeFailed,
    Silent,
    raise_own,
)
from reconciler.executor.containerd.generated import content_pb2 as pb

READ_BYTES = 16 << 20
"""Only manifests and configs are read back; the specification's limit for them is 4 MiB."""

_LOCKED_TRIES, _LOCKED_PAUSE_S = 50, 0.2
"""After a crash the daemon notices the dead writer of a blob within a few seconds."""

Chunks = Callable[[int], AsyncGenerator[bytes, None]]
"""From an offset on, the blob's bytes."""


class Expected(msgspec.Struct, frozen=True):
    """What a blob has to be once it is written; `labels` say what it keeps from collection."""

    digest: str
    size: int
    labels: dict[str, str] = {}


_Write = grpc.aio.StreamStreamCall[pb.WriteContentRequest, pb.WriteContentResponse]


async def read_blob(client: Containerd, digest: str) -> bytes:
    """A small blob's bytes; containerd checked them when they were written."""
    body = bytearray()
    async with asyncio.timeout(SLOW_TIMEOUT_S):
        answers = client.stream(rpc.CONTENT_READ, pb.ReadContentRequest(digest=digest))
        async with contextlib.aclosing(answers):
            async for answer in answers:
                body += answer.data
                if len(body) > READ_BYTES:
                    raise RuntimeFailed(f"blob over {READ_BYTES} bytes", at=digest)
    return bytes(body)


async def label_blob(client: Containerd, digest: str, label: str, value: str, lease: str) -> None:
    """Set one label of a blob; containerd's collector follows some of them."""
    ask = pb.UpdateRequest(info=pb.Info(digest=digest, labels={label: value}))
    ask.update_mask.paths.append(f"labels.{label}")
    await client.call(rpc.CONTENT_UPDATE, ask, lease=lease)


async def write_blob(client: Containerd, lease: str, blob: Expected, chunks: Chunks) -> None:
    """Have the blob, under the lease; from where an earlier attempt was cut, if it was.

    One that is there already is leased by the attempt to write it: looking first would leave a
    moment in which it is collected. containerd checks size and digest.
    Raises `RuntimeFailed` for wrong bytes, which are dropped so that no attempt resumes them.
    """
    ref = f"mill-{blob.digest}"
    for tries_left in reversed(range(_LOCKED_TRIES)):
        call = client.duplex(rpc.CONTENT_WRITE, lease=lease)
        try:
            return await _write(call, ref, blob, chunks)
        except AlreadyThere:
            return None
        except Silent as error:
            if "locked" not in error.what or not tries_left:
                raise
            await asyncio.sleep(_LOCKED_PAUSE_S)
        except RuntimeFailed:
            with contextlib.suppress(Absent):
                await client.call_uncut(rpc.CONTENT_ABORT, pb.AbortRequest(ref=ref))
            raise
        finally:
            call.cancel()
    return None


async def _write(call: _Write, ref: str, blob: Expected, chunks: Chunks) -> None:
    digest, size = blob.digest, blob.size
    stat = pb.WriteContentRequest(action=pb.STAT, ref=ref, total=size, expected=digest)
    offset = (await _exchange(call, stat)).offset
    # At offset == size the bytes are there already, written by another namespace: commit alone.
    if offset < size:
        async with contextlib.aclosing(chunks(offset)) as source:
            async for chunk in source:
                ask = pb.WriteContentRequest(action=pb.WRITE, ref=ref, offset=offset, data=chunk)
                offset = (await _exchange(call, ask)).offset
                if offset > size:
                    raise RuntimeFailed(f"more than the {size} bytes announced", at=digest)
    commit = pb.WriteContentRequest(
        action=pb.COMMIT, ref=ref, offset=offset, total=size, expected=digest, labels=blob.labels
    )
    await _exchange(call, commit)
    await call.done_writing()


async def _exchange(call: _Write, ask: pb.WriteContentRequest) -> pb.WriteContentResponse:
    try:
        async with asyncio.timeout(SLOW_TIMEOUT_S):
            # Once the daemon has ended the stream nothing can be written; reading tells why.
            with contextlib.suppress(asyncio.InvalidStateError):
                await call.write(ask)
            answer = await call.read()
    except grpc.aio.AioRpcError as error:
        raise_own(error, rpc.CONTENT_WRITE)
    except TimeoutError as error:
        raise Silent("containerd takes no data", at=rpc.CONTENT_WRITE.path) from error
    if not isinstance(answer, pb.WriteContentResponse):
        raise Silent("containerd ended the write", at=rpc.CONTENT_WRITE.path)
    return answer
