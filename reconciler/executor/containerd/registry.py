"""Reads from a registry over HTTP: which digest a tag names, manifests, blobs from any offset.

OCI Distribution Specification 1.1, with Docker's media types and its token authentication
(https://distribution.github.io/distribution/spec/auth/token/).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import ssl
from collections.abc import AsyncIterator
from functools import cache

import httpx
import msgspec

from reconciler.errors import MillError
from reconciler.executor.containerd.image_ref import ImageRef, is_loopback

INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)

MANIFEST_BYTES = 4 << 20
"""What the specification asks of registries to take; a longer one is refused."""

CHUNK_BYTES = 1 << 20
_ERROR_BYTES = 16 << 10
_TOKEN_BYTES = 1 << 20
_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
_AUTH_ROUNDS = 2
"""Challenges answered per request: one for the token, one more for a token that had expired."""

_REFUSALS = frozenset({401, 403, 404})


class PullFailed(MillError):
    """`image` cannot be had because of `reason`; `final` when the registry said no."""

    status = 502

    def __init__(self, image: str, reason: str, *, final: bool) -> None:
        hint = "check the name, the tag and registry_auth" if final \
            else "see that the registry answers, then try again"
        super().__init__(f"cannot pull {image}: {reason}", at=image, hint=hint)
        self.image = image
        self.reason = reason
        self.final = final


class Manifest(msgspec.Struct, frozen=True):
    """A manifest's or index's bytes as the registry keeps them; `digest` is computed from them."""

    media_type: str
    digest: str
    body: bytes


class Blob(msgspec.Struct, frozen=True):
    """An open download: `chunks` of at most CHUNK_BYTES, from the offset that was asked for."""

    chunks: AsyncIterator[bytes]


async def resolve(image: str, auth: str | None) -> str:
    """The digest of what `image`'s tag names now, manifest or index: what a deploy pins.

    An image that is written with its digest is not asked about. Raises `PullFailed`.
    """
    ref = ImageRef.parse(image)
    if ref.digest:
        return ref.digest
    async with Registry(image, auth) as registry:
        return await registry.digest_of(ref.tag)


class Registry:
    """One image's repository, read as `auth`: 'user:password', a bare token, or None.

    A bare token is sent as it is (`Bearer`); a registry that refuses that gets it as the password
    of user `token`, the way GitHub, GitLab and Gitea take their access tokens.
    """

    def __init__(self, image: str, auth: str | None) -> None:
        self.ref = ImageRef.parse(image)
        self._image = image
        self._auth = auth or ""
        self._authorization = "" if ":" in self._auth or not auth else f"Bearer {auth}"
        loopback = self.ref.base_url.startswith("http:")
        self._http = httpx.AsyncClient(
            base_url=self.ref.base_url,
            timeout=_TIMEOUT,
            follow_redirects=True,
            verify=_trust(),
            trust_env=not loopback,  # no proxy knows this machine's loopback
            headers={"User-Agent": "mill"},
        )

    async def __aenter__(self) -> Registry:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def digest_of(self, reference: str) -> str:
        """The digest that a tag names now, by its header (free of Docker Hub's pull limit)."""
        digest, headers = "", {"Accept": ", ".join(INDEXES + MANIFESTS)}
        # A refusal of HEAD has no words in it, and some registries refuse every HEAD: GET decides.
        with contextlib.suppress(PullFailed):
            async with self._open("HEAD", f"manifests/{reference}", headers) as answer:
                digest = answer.headers.get("Docker-Content-Digest", "")
        if re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
            return digest
        return (await self.manifest(reference)).digest

    async def manifest(self, reference: str) -> Manifest:
        """A manifest or index by tag or digest; of a digest, the bytes are checked against it."""
        headers = {"Accept": ", ".join(INDEXES + MANIFESTS)}
        async with self._open("GET", f"manifests/{reference}", headers) as answer:
            body = await self._read(answer, MANIFEST_BYTES)
            media_type = answer.headers.get("Content-Type", "").partition(";")[0].strip()
        digest = "sha256:" + hashlib.sha256(body).hexdigest()
        if reference.startswith("sha256:") and reference != digest:
            raise self.failed(f"the registry answers {digest} where {reference} was asked for")
        return Manifest(media_type=media_type, digest=digest, body=body)

    @contextlib.asynccontextmanager
    async def open_blob(self, digest: str, offset: int = 0) -> AsyncIterator[Blob]:
        """Download a blob from `offset` bytes on, whether the registry knows ranges or not."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        # Compression on the way would make the offsets those of other bytes.
        headers["Accept-Encoding"] = "identity"
        async with self._open("GET", f"blobs/{digest}", headers) as answer:
            skip = offset if answer.status_code == httpx.codes.OK else 0
            yield Blob(chunks=self._chunks(answer, skip))

    def failed(self, reason: str, *, final: bool = False) -> PullFailed:
        """The error for this image."""
        return PullFailed(self._image, reason, final=final)

    async def _chunks(self, answer: httpx.Response, skip: int) -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.aiter_raw(CHUNK_BYTES):
                cut = min(skip, len(chunk))
                skip -= cut
                if cut < len(chunk):
                    yield chunk[cut:]
        except httpx.HTTPError as error:
            raise self.failed(f"the download broke off: {_reason(error)}") from error

    @contextlib.asynccontextmanager
    async def _open(
        self, method: str, path: str, headers: dict[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """One request, challenges answered; every answer but success is raised as `PullFailed`."""
        for challenges_left in range(_AUTH_ROUNDS, -1, -1):
            answer = await self._send(method, path, headers)
            try:
                if answer.status_code == httpx.codes.UNAUTHORIZED and challenges_left:
                    authorization = await self._answer_challenge(answer)
                    if authorization != self._authorization:
                        self._authorization = authorization
                        continue
                if not answer.is_success:
                    raise await self._refused(answer)
                yield answer
                return
            finally:
                await answer.aclose()

    async def _send(self, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
        if self._authorization:
            headers = headers | {"Authorization": self._authorization}
        url = f"/v2/{self.ref.repository}/{path}"
        request = self._http.build_request(method, url, headers=headers)
        try:
            return await self._http.send(request, stream=True)
        except httpx.HTTPError as error:
            raise self.failed(f"{self.ref.registry} does not answer: {_reason(error)}") from error

    async def _answer_challenge(self, answer: httpx.Response) -> str:
        """The Authorization header that this 401 asks for (RFC 9110, section 11.6.1)."""
        challenge = answer.headers.get("WWW-Authenticate", "")
        kind, _, rest = challenge.partition(" ")
        user, _, password = (self._auth if ":" in self._auth else f"token:{self._auth}").partition(
            ":"
        )
        credentials = (user, password) if self._auth else None
        match kind.lower():
            case "basic" if credentials:
                pair = base64.b64encode(f"{user}:{password}".encode()).decode()
                return f"Basic {pair}"
            case "bearer":
                return f"Bearer {await self._token(rest, credentials)}"
            case _:
                raise await self._refused(answer)

    async def _token(self, rest: str, credentials: tuple[str, str] | None) -> str:
        asked = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        realm = httpx.URL(asked.get("realm", ""))
        if realm.scheme != "https" and not is_loopback(realm.host):
            reason = f"its realm {str(realm)!r} would take credentials without TLS"
            raise self.failed(reason, final=True)
        scope = asked.get("scope") or f"repository:{self.ref.repository}:pull"
        query = {"service": asked.get("service", ""), "scope": scope}
        try:
            request = self._http.build_request("GET", realm.copy_merge_params(query))
            auth = httpx.BasicAuth(*credentials) if credentials else None
            answer = await self._http.send(request, auth=auth, stream=True)
        except httpx.HTTPError as error:
            raise self.failed(f"{realm.host} does not answer: {_reason(error)}") from error
        try:
            if not answer.is_success:
                raise await self._refused(answer)
            body = await self._read(answer, _TOKEN_BYTES)
        finally:
            await answer.aclose()
        token = _json(body).get("token") or _json(body).get("access_token")
        if not isinstance(token, str):
            raise self.failed(f"{realm.host} answers no token")
        return token

    async def _read(self, answer: httpx.Response, limit_bytes: int) -> bytes:
        body = bytearray()
        async for chunk in self._decoded(answer):
            body += chunk
            if len(body) > limit_bytes:
                raise self.failed(f"the registry's answer is over {limit_bytes} bytes", final=True)
        return bytes(body)

    async def _decoded(self, answer: httpx.Response) -> AsyncIterator[bytes]:
        try:
            async for chunk in answer.aiter_bytes(CHUNK_BYTES):
                yield chunk
        except httpx.HTTPError as error:
            raise self.failed(f"the answer broke off: {_reason(error)}") from error

    async def _refused(self, answer: httpx.Response) -> PullFailed:
        """The error of an answer, in the registry's words where it has any."""
        text = ""
        with contextlib.suppress(PullFailed):
            text = _first_error(await self._read(answer, _ERROR_BYTES))
        what = {
            401: "not authorized",
            403: "denied",
            404: "not found",
            429: "too many requests",
        }.get(answer.status_code, f"HTTP {answer.status_code}")
        reason = f"{what} at {self.ref.registry}" + (f" ({text})" if text else "")
        return self.failed(reason, final=answer.status_code in _REFUSALS)


@cache
def _trust() -> ssl.SSLContext:
    """Loading the roots takes 20 ms: once for the process."""
    return httpx.create_ssl_context()


def _reason(error: httpx.HTTPError) -> str:
    return str(error) or type(error).__name__


def _json(body: bytes) -> dict[str, object]:
    try:
        return msgspec.json.decode(body, type=dict[str, object])
    except msgspec.MsgspecError:
        return {}


def _first_error(body: bytes) -> str:
    """`CODE: message` of the first error in a registry's answer, or ''."""
    errors = _json(body).get("errors")
    first = errors[0] if isinstance(errors, list) and errors else None
    if not isinstance(first, dict):
        return ""
    return f"{first.get('code', '')}: {first.get('message', '')}".strip(": ")[:200]
