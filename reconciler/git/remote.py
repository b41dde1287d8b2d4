"""What dulwich is asked, inside a reading child: a branch's head, and one commit whole.

Everything here blocks and may take any time or memory; the child's limits and its parent's
deadline are the guard. Nothing is written to a disk.
"""

from __future__ import annotations

import io
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import urllib3.exceptions as http_errors
from dulwich.client import (
    GitClient,
    HTTPProxyUnauthorized,
    HTTPUnauthorized,
    Urllib3HttpGitClient,
)
from dulwich.config import ConfigFile
from dulwich.errors import GitProtocolError, HangupException, NotGitRepository
from dulwich.object_format import DEFAULT_OBJECT_FORMAT
from dulwich.objects import Blob, Commit, ObjectID, ShaFile, Tag
from dulwich.pack import PackData, PackInflater
from dulwich.refs import Ref
from dulwich.repo import MemoryRepo, Repo

from reconciler.git import findings
from reconciler.git.findings import Answer, Bounds, Head, Missing, Refused, Target, Unreachable
from reconciler.git.location import HEAD, path_parts
from reconciler.git.tree import Lookup, PathMissing, TreeRefused, read_manifests

READ_TIMEOUT_S = 10.0
"""Of one socket read; the whole has its own deadline in the parent."""

MAX_LINE_CHARS = 200
MAX_TAGS_DEEP = 5


class FetchTooLarge(Exception):
    """The server sent more than the bound."""


def read_head(target: Target) -> Answer:
    """Where the branch stands: one small request, no objects."""
    try:
        if target.location.kind == "local":
            with _opened(target) as repo:
                sha = _local_head(repo, target)
        else:
            refs = _client(target).get_refs(
                target.location.path.encode(), ref_prefix=[_ref(target)]).refs
            sha = refs.get(_ref(target))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a stranger's server can make dulwich raise anything
        return Unreachable(explain(error, target))
    return Head(sha.decode()) if sha else _no_branch(target)


def read_commit(target: Target, bounds: Bounds) -> Answer:
    """The newest commit of the branch, and its manifests."""
    sha = ""
    try:
        if target.location.kind == "local":
            with _opened(target) as repo:
                ref = _local_head(repo, target)
                if ref is None:
                    return _no_branch(target)
                sha = ref.decode()
                return _read(repo.object_store.__getitem__, ref, target, bounds)
        fetched = _fetch(target, bounds)
        if fetched is None:
            return _no_branch(target)
        sha = fetched[0].decode()
        return _read(fetched[1].__getitem__, fetched[0], target, bounds)
    except PathMissing as error:
        return Missing(f"the commit has no folder {error}", sha)
    except TreeRefused as error:
        return Refused(str(error), sha)
    except MemoryError:
        return Refused(f"reading it takes more than {bounds.memory_bytes >> 20} MiB of memory", sha)
    except FetchTooLarge:
        return Refused(f"fetching it takes more than {bounds.fetched_bytes >> 20} MiB", sha)
    except Exception as error:  # noqa: BLE001  as above
        return Unreachable(explain(error, target))


def _no_branch(target: Target) -> Missing:
    if target.branch == HEAD:
        return Missing("the repository has no commit yet")
    return Missing(f"the repository has no branch {target.branch}")


def _ref(target: Target) -> Ref:
    return Ref(HEAD.encode() if target.branch == HEAD else b"refs/heads/" + target.branch.encode())


@contextmanager
def _opened(target: Target) -> Iterator[Repo]:
    repo = Repo(target.location.path)
    try:
        yield repo
    finally:
        repo.close()


def _local_head(repo: Repo, target: Target) -> ObjectID | None:
    """Where the branch stands; None where it is not, or has no commit yet."""
    try:
        return repo.refs[_ref(target)]
    except KeyError:
        return None


def _client(target: Target) -> GitClient:
    held = target.credentials
    return Urllib3HttpGitClient(
        target.location.origin,
        # An empty configuration: the machine's own could redirect URLs or run credential helpers.
        config=ConfigFile(), timeout=READ_TIMEOUT_S, thin_packs=False, quiet=True,
        username=held.username if held else None, password=held.password if held else None,
    )


def _fetch(target: Target, bounds: Bounds) -> tuple[ObjectID, dict[ObjectID, ShaFile]] | None:
    """The head and the objects of its one commit, large blobs left out; None: no such branch."""
    heads: list[ObjectID] = []
    pack = io.BytesIO()

    def wants(refs: Mapping[Ref, ObjectID], depth: int | None = None) -> list[ObjectID]:
        heads.extend(sha for name, sha in refs.items() if name == _ref(target))
        return heads

    def keep(data: bytes) -> int:
        if pack.tell() + len(data) > bounds.fetched_bytes:
            raise FetchTooLarge
        return pack.write(data)

    _client(target).fetch_pack(
        target.location.path.encode(), wants, MemoryRepo().get_graph_walker(), keep, depth=1,
        ref_prefix=[_ref(target)], filter_spec=b"blob:limit=%d" % (bounds.file_bytes + 1),
    )
    if not heads:
        return None
    return heads[0], _inflate(pack, bounds)


def _inflate(pack: io.BytesIO, bounds: Bounds) -> dict[ObjectID, ShaFile]:
    """All objects of the pack but blobs over the bound, which a server may send all the same."""
    size = pack.tell()
    pack.seek(0)
    data = PackData.from_file(pack, DEFAULT_OBJECT_FORMAT, size)
    data.check()
    objects: dict[ObjectID, ShaFile] = {}
    for found in PackInflater.for_pack_data(data):
        if not isinstance(found, Blob) or found.raw_length() <= bounds.file_bytes:
            objects[found.id] = found
    return objects


def _read(lookup: Lookup, sha: ObjectID, target: Target, bounds: Bounds) -> findings.Commit:
    found = lookup(sha)
    for _ in range(MAX_TAGS_DEEP):
        if not isinstance(found, Tag):
            break
        found = lookup(found.object[1])
    if not isinstance(found, Commit):
        raise TreeRefused("the branch does not point at a commit")
    files = read_manifests(lookup, found, path_parts(target.path), bounds)
    return findings.Commit(sha.decode(), files, author=one_line(found.author),
                           subject=one_line(found.message.strip()))


def one_line(text: bytes) -> str:
    """A stranger's text on one line: the first, cut, with a mark for each control character."""
    first = text[: 4 * MAX_LINE_CHARS].decode(errors="replace").partition("\n")[0].rstrip("\r")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in first)[
        :MAX_LINE_CHARS]


def explain(error: BaseException, target: Target) -> str:
    """A sentence for people that is the same each time: no object addresses, ports or secrets."""
    where = target.location.shown
    if target.location.kind == "local":
        if isinstance(error, NotGitRepository):
            return f"{where} is not a git repository"
        return f"{where} cannot be read: {_kind(error)}"
    for cause in _causes(error):
        sentence = _sentence(cause, where, has_credentials=target.credentials is not None)
        if sentence:
            return sentence
    return f"{where} does not answer as a git server does: {_kind(error)}"


def _kind(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The innermost first: urllib3 wraps what went wrong several times."""
    chain: list[BaseException] = [error]
    while len(chain) < 10:
        last = chain[-1]
        inner = last.__cause__ or last.__context__
        if isinstance(last, http_errors.MaxRetryError):
            inner = last.reason or inner
        if inner is None:
            break
        chain.append(inner)
    yield from reversed(chain)


def _sentence(cause: BaseException, where: str, *, has_credentials: bool) -> str:
    match cause:
        case HTTPUnauthorized():
            return (f"{where} does not accept the source's credentials" if has_credentials
                    else f"{where} asks for credentials: name a secret with --secret-ref")
        case HTTPProxyUnauthorized():
            return f"the proxy on the way to {where} asks for credentials"
        case http_errors.NameResolutionError() | socket.gaierror():
            return f"the name of {where} cannot be resolved"
        case http_errors.TimeoutError() | TimeoutError():
            return f"{where} does not answer in time"
        case http_errors.SSLError():
            return f"{where} has no certificate that this machine trusts"
        case ConnectionRefusedError():
            return f"{where} refuses the connection"
        case NotGitRepository():
            return f"{where} has no git repository there, or hides it from these credentials"
        case GitProtocolError() if status := re.search(r"http resp (\d{3})\b", str(cause)):
            return f"{where} answers with HTTP status {status[1]}"
        case HangupException() | http_errors.ProtocolError() | ConnectionError():
            return f"{where} breaks off the connection"
        case OSError() if cause.strerror:
            return f"{where} cannot be reached: {cause.strerror}"
        case _:
            return ""
