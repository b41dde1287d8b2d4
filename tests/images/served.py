"""A registry in this process that can be told to misbehave: the ways a pull may go wrong."""

from __future__ import annotations

import base64
import contextlib
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.images.build import Image

USER, PASSWORD = "robot", "pass:word"
_READY_S = 30.0


@dataclass
class ServedRegistry:
    """What it holds and how it behaves; `url` once it serves. Change it at any time.

    `auth` is 'none', 'basic' or 'bearer'. `tampered` digests are answered with a byte changed,
    `cut` ones break off after so many bytes, once; `statuses` are answered to the next requests of
    a path's ending. `log` is what was asked: method, path, Range.
    """

    auth: str = "none"
    ranges: bool = True
    url: str = ""
    tampered: set[str] = field(default_factory=set)
    cut: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)
    tokens: set[str] = field(default_factory=set)
    log: list[tuple[str, str, str]] = field(default_factory=list)
    _blobs: dict[str, bytes] = field(default_factory=dict)
    _manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)

    @property
    def host(self) -> str:
        """As an image's name begins."""
        return self.url.removeprefix("http://")

    def hold(self, tag: str, image: Image) -> None:
        """Have an image, under a tag and its digest, in every repository."""
        self._blobs |= image.blobs
        self._manifests |= {
            digest: ("application/vnd.oci.image.manifest.v1+json", body)
            for digest, body in image.manifests.items()
        }
        for reference in (tag, image.digest):
            self._manifests[reference] = (image.media_type, image.manifest)

    def asked(self, ending: str) -> list[tuple[str, str]]:
        """Method and Range of each request for a path with that ending."""
        return [(method, range_) for method, path, range_ in self.log if path.endswith(ending)]

    async def manifest(self, request: Request) -> Response:
        if refused := self._refuse(request):
            return refused
        reference = request.path_params["reference"]
        if reference not in self._manifests:
            return _error(404, "MANIFEST_UNKNOWN")
        media_type, body = self._manifests[reference]
        headers = {"Docker-Content-Digest": reference if ":" in reference else self._pin(body)}
        return Response(self._maybe_tamper(reference, body), media_type=media_type, headers=headers)

    async def blob(self, request: Request) -> Response:
        if refused := self._refuse(request):
            return refused
        digest = request.path_params["digest"]
        if digest not in self._blobs:
            return _error(404, "BLOB_UNKNOWN")
        body, status = self._maybe_tamper(digest, self._blobs[digest]), 200
        wanted = request.headers.get("Range", "")
        if wanted and self.ranges:
            body, status = body[int(wanted.removeprefix("bytes=").rstrip("-")) :], 206
        cut = self.cut.pop(digest, len(body))
        headers = {"Content-Length": str(len(body))}
        return StreamingResponse(_until(body, cut), status_code=status, headers=headers)

    async def token(self, request: Request) -> Response:
        self.log.append(("GET", request.url.path, request.query_params.get("scope", "")))
        if request.headers.get("Authorization") != _basic():
            return _error(401, "UNAUTHORIZED")
        token = secrets.token_hex(8)
        self.tokens.add(token)
        return JSONResponse({"token": token})

    def _refuse(self, request: Request) -> Response | None:
        path = request.url.path
        self.log.append((request.method, path, request.headers.get("Range", "")))
        for ending, statuses in self.statuses.items():
            if path.endswith(ending) and statuses:
                return _error(statuses.pop(0), "DENIED")
        given = request.headers.get("Authorization", "")
        if self.auth == "basic" and given != _basic():
            return _error(401, "UNAUTHORIZED", 'Basic realm="test"')
        if self.auth == "bearer" and given.removeprefix("Bearer ") not in self.tokens:
            challenge = f'Bearer realm="{self.url}/token",service="test"'
            return _error(401, "UNAUTHORIZED", challenge)
        return None

    def _maybe_tamper(self, reference: str, body: bytes) -> bytes:
        if reference not in self.tampered:
            return body
        return body[:-1] + bytes([body[-1] ^ 1])

    def _pin(self, body: bytes) -> str:
        return next(
            ref for ref, (_, held) in self._manifests.items() if held is body and ":" in ref
        )


@contextlib.contextmanager
def served_registry(**settings: object) -> Iterator[ServedRegistry]:
    """Serve a registry on a free port of 127.0.0.1, in a thread, until the block ends."""
    registry = ServedRegistry(**settings)  # type: ignore[arg-type]  # names are the fields'
    name = "{name:path}"
    routes = [
        Route("/token", registry.token),
        Route(f"/v2/{name}/manifests/{{reference}}", registry.manifest),
        Route(f"/v2/{name}/blobs/{{digest}}", registry.blob),
    ]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        registry.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(Starlette(routes=routes), log_level="critical", lifespan="off")
        server = uvicorn.Server(config)
        listener.listen()  # a request that comes before the server accepts waits here
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield registry
        finally:
            server.should_exit = True
            thread.join(_READY_S)


async def _until(body: bytes, cut: int) -> AsyncIterator[bytes]:
    step = 16 << 10
    for start in range(0, cut, step):
        yield body[start : min(start + step, cut)]
    if cut < len(body):
        raise ConnectionAbortedError("the download breaks off here")


def _basic() -> str:
    return "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()


def _error(status: int, code: str, challenge: str = "") -> Response:
    headers = {"WWW-Authenticate": challenge} if challenge else {}
    body = {"errors": [{"code": code, "message": "said the registry"}]}
    return JSONResponse(body, status_code=status, headers=headers)
