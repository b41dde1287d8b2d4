"""Where a source's repository is: its URL, branch and path, checked before anything uses them.

Pure. What is not named here is refused: dulwich's own guess takes `ext::sh -c x` for ssh and
`--upload-pack=x` for a folder.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Literal
from urllib.parse import unquote, urlsplit

import msgspec

from reconciler.errors import Unprocessable

MAX_URL_CHARS = 2048
MAX_BRANCH_BYTES = 255
MAX_PATH_CHARS = 1024
MIN_POLL_MS = 1_000
MAX_POLL_MS = 86_400_000
HEAD = "HEAD"
"""The branch name that follows whatever branch the repository has checked out."""

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\.?")
_SCP_STYLE = re.compile(r"[^/:]+@[^/:]+:(?!//)")
_USERINFO = re.compile(r"(?<=://)[^/\s@]+@")
_BRANCH_NEVER = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|/\.")
_ALLOWED = "use https://, http://, file:// or the full path of a folder"


class BadLocation(Unprocessable):
    """The URL, branch or path of a source cannot be used."""


class BadCredentials(Unprocessable):
    """The value behind `secret_ref` cannot be used for this source."""


class Location(msgspec.Struct, frozen=True):
    """A repository: behind `origin` (`https://host:port`) for http, in the folder `path` else."""

    kind: Literal["http", "local"]
    origin: str
    path: str

    @property
    def shown(self) -> str:
        """What messages call it: the host, or the folder."""
        return urlsplit(self.origin).netloc if self.kind == "http" else self.path

    @property
    def encrypted(self) -> bool:
        """True where nobody on the way can read what is sent."""
        return self.kind == "local" or self.origin.startswith("https://")


class Credentials(msgspec.Struct, frozen=True):
    """A user and a password or token for HTTP Basic (RFC 7617)."""

    username: str
    password: str

    def __repr__(self) -> str:
        return "Credentials(***)"


def check_source(
    url: str, branch: str, path: str, poll_ms: int, *, with_credentials: bool = False
) -> Location:
    """All of a source that somebody asks to add; BadLocation or BadCredentials, else its place."""
    location = parse_location(url)
    check_branch(branch)
    path_parts(path)
    if not MIN_POLL_MS <= poll_ms <= MAX_POLL_MS:
        raise BadLocation(f"a source cannot be polled every {poll_ms / 1000:g} s",
                          hint="choose between 1s and 24h")
    if with_credentials:
        check_may_carry_credentials(location)
    return location


def parse_location(url: str) -> Location:
    """The checked place that `url` names; BadLocation says what is wrong and what to write."""
    if not url or len(url) > MAX_URL_CHARS or not url.isprintable() or url.startswith("-"):
        raise BadLocation("the URL of a source must be 1 to 2,048 printable characters and not "
                          "begin with '-'", hint=_ALLOWED)
    if url.startswith("/"):
        return Location("local", "", url)
    scheme = url.partition(":")[0].lower()
    if url.startswith("ssh://") or "ssh" in scheme.split("+") or _SCP_STYLE.match(url):
        raise BadLocation("ssh sources are not built yet", at=redact(url), hint=_ALLOWED)
    if "://" not in url or scheme not in ("http", "https", "file"):
        raise BadLocation(f"{redact(url)} is not a place that a source can be at", hint=_ALLOWED)
    return _local(url) if scheme == "file" else _http(url, scheme)


def _local(url: str) -> Location:
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost"):
        raise BadLocation(f"{redact(url)} names another machine",
                          hint="write file:// and the full path, with three slashes")
    if parts.query or parts.fragment or not path.startswith("/") or not path.isprintable():
        raise BadLocation(f"{redact(url)} is not file:// and a full path")
    return Location("local", "", path)


def _http(url: str, scheme: str) -> Location:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise BadLocation(f"{redact(url)} cannot be read: {error}") from error
    if "@" in parts.netloc:
        raise BadLocation("credentials do not belong into a source's URL", at=redact(url),
                          hint="put them into a secret and name it with --secret-ref")
    if parts.query or parts.fragment or " " in url or "\\" in url:
        raise BadLocation(f"{redact(url)} must have no query, fragment, blank or backslash")
    if ":" in host:
        host = f"[{_ipv6(host, url)}]"
    elif not _HOST.fullmatch(host):
        raise BadLocation(f"{redact(url)} has no usable host")
    if port == 0:
        raise BadLocation(f"{redact(url)} has port 0")
    if not parts.path.strip("/"):
        raise BadLocation(f"{redact(url)} names a host but no repository")
    # One slash: `//elsewhere/x`, joined to the origin, would name another host.
    path = "/" + parts.path.lstrip("/")
    return Location("http", f"{scheme}://{host}{'' if port is None else f':{port}'}", path)


def _ipv6(host: str, url: str) -> str:
    try:
        return str(ipaddress.IPv6Address(host))
    except ValueError as error:
        raise BadLocation(f"{redact(url)} has no usable host") from error


def is_loopback(location: Location) -> bool:
    """True where what is sent stays on this machine. Names are not looked up: one name is."""
    host = urlsplit(location.origin).hostname or ""
    if location.kind == "local" or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_credentials(secret: str, location: Location) -> Credentials:
    """`user:password`, or a token alone; BadCredentials where they would travel in clear."""
    if "PRIVATE KEY" in secret:
        raise BadCredentials("the source's secret is a private key; ssh sources are not built yet",
                             hint="use user:password or a token")
    check_may_carry_credentials(location)
    user, colon, password = secret.strip().partition(":")
    if not colon:
        # Forges take a token as the password of any user; this name is the one all of them know.
        user, password = "x-access-token", user
    if not password or not (user + password).isprintable():
        raise BadCredentials("the source's secret is empty or holds control characters",
                             hint="set it to user:password or a token")
    return Credentials(user, password)


def check_may_carry_credentials(location: Location) -> None:
    """BadCredentials where the place is reached over plain http beyond this machine."""
    if not location.encrypted and not is_loopback(location):
        raise BadCredentials("credentials are sent over plain http to loopback addresses only",
                             at=location.origin, hint="use https://")


def check_branch(branch: str) -> str:
    """The branch, as git-check-ref-format(1) allows it, or `HEAD`; BadLocation else."""
    wrong = (
        not branch or len(branch.encode(errors="replace")) > MAX_BRANCH_BYTES
        or branch.startswith(("-", "/", ".", "refs/")) or branch.endswith(("/", ".", ".lock"))
        or branch == "@" or ".lock/" in branch or not branch.isprintable()
        or _BRANCH_NEVER.search(branch) is not None
    )
    if wrong:
        raise BadLocation(f"{branch[:80]!r} is not the name of a branch",
                          hint="write it as `git branch` prints it")
    return branch


def path_parts(path: str) -> tuple[str, ...]:
    """The folders that lead to the manifests; `/` is none. BadLocation for `..` and its like."""
    parts = tuple(part for part in path.split("/") if part)
    if len(path) > MAX_PATH_CHARS or not path.isprintable() or "\\" in path \
            or any(part in (".", "..") or part.lower() == ".git" for part in parts):
        raise BadLocation(f"{path[:80]!r} is not the path of a folder inside a repository",
                          hint="write it from the root of the repository, such as /deploy/prod")
    return parts


def redact(text: str, *secrets: str) -> str:
    """The text without user and password in URLs and without any of `secrets`."""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _USERINFO.sub("***@", text)
