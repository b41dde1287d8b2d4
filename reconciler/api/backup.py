"""Disasters: a backup as one file under a passphrase, and its way into an empty cluster."""

from __future__ import annotations

import asyncio
from urllib.parse import unquote

from starlette.responses import Response

from reconciler.api import replies
from reconciler.api.calls import Asked, Call
from reconciler.api.types import Restored
from reconciler.errors import Unprocessable
from reconciler.executor.backup import (
    MAX_FILE_BYTES,
    check_passphrase,
    make_backup,
    open_backup,
    restore,
)

HEADER = "mill-passphrase"
"""The header that carries it, UTF-8 percent-encoded: not the query, which proxies write down."""
OCTETS = "application/octet-stream"


async def backup(asked: Asked) -> Response:
    """What outlives this cluster, at an index that a majority confirms."""
    passphrase = _passphrase(asked)
    check_passphrase(passphrase)
    state = await asked.confirmed()
    backend = asked.backend
    async with asked.site.costly:
        data = await asyncio.to_thread(
            make_backup, state, backend.cluster_key, passphrase, backend.random_bytes
        )
    name = f"{state.cluster}-{state.index}.mill-backup"
    return Response(data, 200, {
        "cache-control": "no-store", "content-disposition": f'attachment; filename="{name}"',
        "mill-index": str(state.index),
    }, media_type=OCTETS)


async def take_over(asked: Asked) -> Response:
    """Restore: all or nothing, and nothing where the cluster holds anything."""
    backend = asked.backend
    async with asked.site.costly:
        opened = await asyncio.to_thread(open_backup, asked.body, _passphrase(asked))
    index, carried = await restore(
        backend.ledger, opened, backend.cluster_key, backend.random_bytes
    )
    return replies.json(Restored(
        index=index, cluster=carried.cluster, backup_index=carried.index,
        taken_at=replies.rfc3339(carried.time_ms), services=tuple(carried.services),
        secrets=tuple(carried.secrets), sources=tuple(carried.sources),
    ))


def _passphrase(asked: Asked) -> str:
    try:
        return unquote(asked.request.headers.get(HEADER, ""), errors="strict")
    except UnicodeDecodeError:
        raise Unprocessable(f"the header {HEADER} is not percent-encoded UTF-8") from None


CALLS = (
    Call("GET", "/v1/backup", backup,
         "A backup, as one file; the header Mill-Passphrase seals it", role="admin", serve="read",
         download=OCTETS, headers=((HEADER, "what the file opens with, percent-encoded"),)),
    Call("POST", "/v1/restore", take_over,
         "Take a backup over into an empty cluster; its sources come suspended", role="admin",
         serve="lead", answer=Restored, upload=OCTETS, max_body_bytes=MAX_FILE_BYTES,
         headers=((HEADER, "what the file opens with, percent-encoded"),)),
)
