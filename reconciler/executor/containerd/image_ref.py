"""An image's name, taken apart: which registry, which repository, which tag or digest. Pure."""

from __future__ import annotations

import ipaddress
import re

import msgspec

from reconciler.errors import Malformed

_NAME_LETTERS = 255
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_REGISTRY = re.compile(
    r"(?:\[[0-9A-Fa-f:]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)(?::\d{1,5})?"
)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class ImageRef(msgspec.Struct, frozen=True):
    """`REGISTRY/REPOSITORY:TAG@DIGEST`, all parts filled in but `digest`, which may be ''."""

    registry: str
    repository: str
    tag: str
    digest: str

    @classmethod
    def parse(cls, text: str) -> ImageRef:
        """Read `[REGISTRY/]NAME[:TAG][@DIGEST]`, by the rules of the `docker` command line.

        The part before the first slash is a registry if it has a dot or a colon or is
        `localhost`; without one it is docker.io, whose one-word names live below `library/`.
        Raises `Malformed`.
        """
        rest, at, digest = text.partition("@")
        if at and not _DIGEST.fullmatch(digest):
            raise _malformed(text, f"{digest!r} is not sha256: and 64 hexadecimal digits")
        head, slash, tail = rest.partition("/")
        has_registry = slash and (head == "localhost" or any(sign in head for sign in ".:["))
        registry, name = (head, tail) if has_registry else ("docker.io", rest)
        repository, colon, tag = name.partition(":")
        if registry == "docker.io" and "/" not in repository:
            repository = f"library/{repository}"
        if not _REGISTRY.fullmatch(registry):
            raise _malformed(text, f"{registry!r} is not a registry's host")
        if not _REPOSITORY.fullmatch(repository) or len(repository) > _NAME_LETTERS:
            raise _malformed(text, f"{repository!r} is not a repository's name")
        if colon and not _TAG.fullmatch(tag):
            raise _malformed(text, f"{tag!r} is not a tag")
        return cls(registry=registry, repository=repository, tag=tag or "latest", digest=digest)

    @property
    def name(self) -> str:
        """The repository with its registry: what a digest is pinned within."""
        return f"{self.registry}/{self.repository}"

    @property
    def base_url(self) -> str:
        """Where the registry answers: plain HTTP on loopback, HTTPS anywhere else."""
        host = "registry-1.docker.io" if self.registry == "docker.io" else self.registry
        return f"{'http' if is_loopback(_hostname(host)) else 'https'}://{host}"


def is_loopback(hostname: str) -> bool:
    """Whether a host's name or literal address never leaves this machine."""
    try:
        return ipaddress.ip_address(hostname).is_loopback
    except ValueError:
        return hostname == "localhost"


def _hostname(host: str) -> str:
    if host.startswith("["):
        return host[1 : host.index("]")]
    return host.partition(":")[0]


def _malformed(text: str, why: str) -> Malformed:
    hint = "an image is written [REGISTRY/]NAME[:TAG][@sha256:DIGEST]"
    return Malformed(f"not an image: {why}", at=text[:_NAME_LETTERS], hint=hint)
