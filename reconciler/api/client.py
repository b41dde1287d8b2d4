"""The API as a program calls it: every call typed, and streams that survive a failover."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import TypeVar
from urllib.parse import quote

import httpx
import msgspec

from reconciler.api import types as t
from reconciler.api.connection import (
    PAUSES_S,
    Connection,
    NoAnswer,
    Params,
    Refused,
    Unreachable,
    exit_code,
    messages,
)
from reconciler.api.stream import DeployEvent, Message, Step

__all__ = [
    "Client", "DeployEvent", "DeployOptions", "NoAnswer", "Refused", "Step", "Unreachable",
    "exit_code",
]

A = TypeVar("A", bound=msgspec.Struct)

ELECTION_PATIENCE_S = 15.0
"""How long a deploy is offered again while nobody leads; an election takes about two seconds."""
STREAM_PATIENCE_S = 60.0
"""How long a broken stream is asked for again before its reader is told."""


@dataclass(frozen=True)
class DeployOptions:
    """What goes with a manifest. `strategy` and `timeout` "" leave the defaults."""

    prune: bool = False
    strategy: str = ""
    timeout: str = ""
    variables: Mapping[str, str] | None = None

    def params(self) -> list[tuple[str, str]]:
        """As the query of the call."""
        found = [("prune", "true")] if self.prune else []
        found += [("strategy", self.strategy)] if self.strategy else []
        found += [("timeout", self.timeout)] if self.timeout else []
        found += [("var", f"{name}={value}") for name, value in (self.variables or {}).items()]
        return found


class Client:
    """A cluster, by the addresses of some of its nodes and a token. Use it as a context.

    Raises Refused (with the problem), Unreachable, or NoAnswer; `exit_code` tells them apart.
    """

    def __init__(self, addresses: Sequence[str], token: str, ca: bytes | None = None) -> None:
        """`ca`: the cluster's, PEM, by which addresses other than loopback are verified."""
        self._connection = Connection(addresses, token, ca)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._connection.close()

    async def status(self, *, stale: bool = False, at: int | None = None) -> t.StatusAnswer:
        """The cluster at a glance, now or at a log index.

        `stale`: as the asked node knows it, without a majority.
        """
        params = [*_stale(stale), *([("at", str(at))] if at is not None else [])]
        return await self._get("/v1/status", t.StatusAnswer, params)

    async def services(self, *, stale: bool = False) -> t.ServiceList:
        """All services."""
        return await self._get("/v1/services", t.ServiceList, _stale(stale))

    async def service(self, name: str, *, stale: bool = False) -> t.ServiceAnswer:
        """One service."""
        return await self._get(_path("services", name), t.ServiceAnswer, _stale(stale))

    async def nodes(self, *, stale: bool = False) -> t.NodeList:
        """All nodes."""
        return await self._get("/v1/nodes", t.NodeList, _stale(stale))

    async def drain(self, node: str, timeout: str = "") -> AsyncGenerator[Step, None]:
        """Drain a node, and tell how that goes over any failover. The last step's phase is `done`
        or `failed`; a drain that was asked for again begins with `draining` again."""
        params = [("timeout", timeout)] if timeout else []
        while True:
            answer = await self._connection.patient(
                "POST", _path("nodes", node, "drain"), params=params, patience_s=STREAM_PATIENCE_S)
            try:
                async with aclosing(messages(answer)) as told:
                    async for message in told:
                        event = _event(message)
                        if event.terminal:
                            yield msgspec.structs.replace(event.step, phase=event.event)
                            return
                        yield event.step
            except NoAnswer:
                pass  # the drain goes on without us: to ask again is to look
            await asyncio.sleep(PAUSES_S[0])

    async def undrain(self, node: str) -> t.NodeAnswer:
        """Let a node take allocations again."""
        return await self._send("POST", _path("nodes", node, "undrain"), t.NodeAnswer)

    async def remove_node(self, node: str) -> t.Removed:
        """Forget a node."""
        return await self._send("DELETE", _path("nodes", node), t.Removed)

    async def tokens(self) -> t.TokenList:
        """All tokens, without their texts."""
        return await self._get("/v1/tokens", t.TokenList)

    async def create_token(self, body: t.TokenBody) -> t.TokenMade:
        """A new token, with its text."""
        return await self._send("POST", "/v1/tokens", t.TokenMade, body)

    async def revoke_token(self, token_id: str) -> t.Removed:
        """A token is good no more."""
        return await self._send("DELETE", _path("tokens", token_id), t.Removed)

    async def plan(
        self, files: Mapping[str, str], options: DeployOptions | None = None
    ) -> t.PlanAnswer:
        """What `deploy` would do."""
        return await self._send("POST", "/v1/plan", t.PlanAnswer, t.Files(dict(files)),
                                (options or DeployOptions()).params())

    def deploy(
        self, files: Mapping[str, str], options: DeployOptions | None = None, key: str = ""
    ) -> AsyncGenerator[DeployEvent, None]:
        """Deploy, and tell what happens until the terminal event, over any failover."""
        return self._told("/v1/deploy", t.Files(dict(files)),
                          (options or DeployOptions()).params(), key)

    async def deploy_detached(
        self, files: Mapping[str, str], options: DeployOptions | None = None, key: str = ""
    ) -> t.Detached:
        """Deploy, and come back as soon as it is admitted."""
        params = [*(options or DeployOptions()).params(), ("detach", "true")]
        answer = await self._start("/v1/deploy", t.Files(dict(files)), params, key)
        try:
            return msgspec.json.decode(await answer.aread(), type=t.Detached)
        finally:
            await answer.aclose()

    def restart(self, service: str, key: str = "") -> AsyncGenerator[DeployEvent, None]:
        """New containers, as a deploy."""
        return self._told(_path("services", service, "restart"), None, [], key)

    def rollback(
        self, service: str, to: int | None = None, key: str = ""
    ) -> AsyncGenerator[DeployEvent, None]:
        """An earlier revision, as a deploy."""
        return self._told(_path("services", service, "rollback"), t.RollbackBody(to), [], key)

    def scale(
        self, service: str, replicas: int, key: str = ""
    ) -> AsyncGenerator[DeployEvent, None]:
        """Other replicas, as a deploy."""
        return self._told(_path("services", service, "scale"), t.ScaleBody(replicas), [], key)

    async def deploys(self, limit: int = 100) -> t.DeployList:
        """Deploys, newest first."""
        return await self._get("/v1/deploys", t.DeployList, [("limit", str(limit))])

    async def deploy_record(self, deploy_id: str) -> t.DeployAnswer:
        """One deploy."""
        return await self._get(_path("deploys", deploy_id), t.DeployAnswer)

    async def cancel(self, deploy_id: str) -> t.DeployAnswer:
        """Roll a running deploy back."""
        return await self._send("POST", _path("deploys", deploy_id, "cancel"), t.DeployAnswer)

    async def follow_deploy(
        self, deploy_id: str, after: int = 0
    ) -> AsyncGenerator[DeployEvent, None]:
        """A deploy's events after an index to the terminal one, over any failover."""
        answer = await self._reopen(deploy_id, after)
        async with aclosing(self._resumed(deploy_id, answer, after)) as told:
            async for event in told:
                yield event

    async def events(self, after: int | None = None, limit: int = 1_000) -> t.EventList:
        """What happened."""
        params = [("limit", str(limit))]
        if after is not None:
            params.append(("after", str(after)))
        return await self._get("/v1/events", t.EventList, params)

    async def follow_events(self, after: int | None = None) -> AsyncGenerator[t.EventRow, None]:
        """What happened and what happens, until the caller has enough."""
        last = after
        while True:
            params = [("follow", "true")] + ([("after", str(last))] if last is not None else [])
            answer = await self._connection.patient(
                "GET", "/v1/events", params=params, patience_s=STREAM_PATIENCE_S
            )
            try:
                async with aclosing(messages(answer)) as told:
                    async for message in told:
                        row = msgspec.json.decode(message.data, type=t.EventRow)
                        last = row.index
                        yield row
            except NoAnswer:
                pass  # the next node goes on after `last`
            await asyncio.sleep(PAUSES_S[0])

    async def logs(
        self, name: str, *, follow: bool = False, tail: int = 100, previous: bool = False
    ) -> AsyncGenerator[t.LogRow, None]:
        """Lines of a service or an allocation; NoAnswer where the stream breaks."""
        params = [("tail", str(tail))]
        params += [("follow", "true")] if follow else []
        params += [("previous", "true")] if previous else []
        answer = await self._connection.open("GET", _path("logs", name), params=params)
        async with aclosing(messages(answer)) as told:
            async for message in told:
                yield msgspec.json.decode(message.data, type=t.LogRow)

    async def secrets(self) -> t.SecretList:
        """The names of all secrets."""
        return await self._get("/v1/secrets", t.SecretList)

    async def set_secret(self, name: str, value: str) -> t.SecretSet:
        """Set a secret."""
        return await self._write("PUT", _path("secrets", name), t.SecretSet, t.SecretBody(value))

    async def secret(self, name: str) -> t.SecretAnswer:
        """A secret in clear."""
        return await self._get(_path("secrets", name), t.SecretAnswer)

    async def delete_secret(self, name: str) -> t.Removed:
        """Forget a secret."""
        return await self._write("DELETE", _path("secrets", name), t.Removed)

    async def sources(self) -> t.SourceList:
        """All sources."""
        return await self._get("/v1/sources", t.SourceList)

    async def source(self, name: str) -> t.SourceAnswer:
        """One source."""
        return await self._get(_path("sources", name), t.SourceAnswer)

    async def add_source(self, body: t.SourceBody) -> t.SourceAnswer:
        """Follow a repository."""
        return await self._send("POST", "/v1/sources", t.SourceAnswer, body)

    async def sync_source(
        self, name: str, *, allow_empty: bool = False, retry: bool = False
    ) -> t.SourceAnswer:
        """Look at a source now."""
        params = [("allow_empty", "true")] if allow_empty else []
        params += [("retry", "true")] if retry else []
        return await self._send("POST", _path("sources", name, "sync"), t.SourceAnswer, None,
                                params)

    async def remove_source(self, name: str, *, prune: bool = False) -> t.Removed:
        """Follow a source no more."""
        return await self._send("DELETE", _path("sources", name), t.Removed, None,
                                [("prune", "true")] if prune else [])

    async def backup(self, passphrase: str, *, stale: bool = False) -> bytes:
        """The file of a backup, sealed with the passphrase."""
        return await self._connection.ask("GET", "/v1/backup", params=_stale(stale),
                                          headers=_sealed_with(passphrase))

    async def restore(self, data: bytes, passphrase: str) -> t.Restored:
        """Take a backup over; the cluster must be empty."""
        headers = {"content-type": "application/octet-stream", **_sealed_with(passphrase)}
        answer = await self._connection.ask("POST", "/v1/restore", body=data, headers=headers)
        return msgspec.json.decode(answer, type=t.Restored)

    async def _get(self, path: str, kind: type[A], params: Params = ()) -> A:
        return msgspec.json.decode(await self._connection.ask("GET", path, params=params),
                                   type=kind)

    async def _send(
        self, method: str, path: str, kind: type[A], body: msgspec.Struct | None = None,
        params: Params = (),
    ) -> A:
        content, headers = _json(body)
        answer = await self._connection.ask(method, path, params=params, body=content,
                                            headers=headers)
        return msgspec.json.decode(answer, type=kind)

    async def _write(
        self, method: str, path: str, kind: type[A], body: msgspec.Struct | None = None
    ) -> A:
        """As `_send`, over any failover: its key lets it happen once."""
        content, headers = _json(body)
        headers["idempotency-key"] = secrets.token_hex(16)
        answer = await self._connection.patient(
            method, path, body=content, headers=headers, patience_s=ELECTION_PATIENCE_S)
        try:
            return msgspec.json.decode(await answer.aread(), type=kind)
        finally:
            await answer.aclose()

    async def _start(
        self, path: str, body: msgspec.Struct | None, params: Params, key: str
    ) -> httpx.Response:
        content, headers = _json(body)
        # The key lets it be offered again when an answer is lost: it stays one deploy.
        headers["idempotency-key"] = key or secrets.token_hex(16)
        return await self._connection.patient(
            "POST", path, params=params, body=content, headers=headers,
            patience_s=ELECTION_PATIENCE_S,
        )

    async def _told(
        self, path: str, body: msgspec.Struct | None, params: Params, key: str
    ) -> AsyncGenerator[DeployEvent, None]:
        answer = await self._start(path, body, params, key)
        deploy_id = answer.headers["mill-deploy"]
        async with aclosing(self._resumed(deploy_id, answer, 0)) as told:
            async for event in told:
                yield event

    async def _resumed(
        self, deploy_id: str, answer: httpx.Response, after: int
    ) -> AsyncGenerator[DeployEvent, None]:
        """Each fact once, in order, to the terminal one, from as many streams as it takes."""
        while True:
            try:
                async with aclosing(messages(answer)) as told:
                    async for message in told:
                        event = _event(message)
                        after = event.id or after
                        yield event
                        if event.terminal:
                            return
            except NoAnswer:
                pass  # the deploy goes on without us, and its stream from any node
            await asyncio.sleep(PAUSES_S[0])
            answer = await self._reopen(deploy_id, after)

    async def _reopen(self, deploy_id: str, after: int) -> httpx.Response:
        try:
            return await self._connection.patient(
                "GET", _path("deploys", deploy_id, "events"),
                headers={"last-event-id": str(after)} if after else {},
                patience_s=STREAM_PATIENCE_S,
            )
        except (Unreachable, NoAnswer) as error:
            raise Unreachable(f"the stream of {deploy_id} is lost: {error.what}",
                              hint=f"the deploy goes on: mill deploy-show {deploy_id}") from error


def _event(message: Message) -> DeployEvent:
    return DeployEvent(
        int(message.id) if message.id else None, message.event,
        msgspec.json.decode(message.data, type=Step), message.data,
    )


def _path(*pieces: str) -> str:
    return "/v1/" + "/".join(quote(piece, safe="") for piece in pieces)


def _stale(stale: bool) -> Params:
    return [("stale", "ok")] if stale else []


def _sealed_with(passphrase: str) -> dict[str, str]:
    return {"mill-passphrase": quote(passphrase, safe="")}


def _json(body: msgspec.Struct | None) -> tuple[bytes, dict[str, str]]:
    if body is None:
        return b"", {}
    return msgspec.json.encode(body), {"content-type": "application/json"}
