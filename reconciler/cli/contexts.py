"""Which cluster a command speaks to: options, then the environment, then the current context.

Contexts live in `~/.config/mill/contexts.toml` (0600: it holds tokens).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from reconciler.api.address import base_url
from reconciler.cli.settings import Settings
from reconciler.errors import MillError, NotFound, Unavailable

_PEM = "-----BEGIN "


@dataclass(frozen=True)
class Cluster:
    """Where a cluster's nodes answer, with what they are asked, and by which CA they are known:
    its PEM, or the path of a file that holds it; "" leaves that to the system."""

    addresses: tuple[str, ...]
    token: str
    ca: str = ""

    def ca_pem(self) -> bytes | None:
        """The CA, read where it is a file; None where there is none."""
        if not self.ca or self.ca.lstrip().startswith(_PEM):
            return self.ca.encode() or None
        try:
            pem = Path(self.ca).expanduser().read_bytes()
        except OSError as error:
            raise MillError(f"the cluster's CA cannot be read: {error.strerror}", at=self.ca,
                            hint="it is ca.pem in the data folder of each node") from error
        return pem

    def __repr__(self) -> str:
        return f"Cluster(addresses={self.addresses!r}, token=***)"


@dataclass
class Contexts:
    """Clusters by name, and the name of the current one ("" for none)."""

    current: str = ""
    clusters: dict[str, Cluster] = field(default_factory=dict)


def path() -> Path:
    """The file of contexts."""
    return Path.home() / ".config" / "mill" / "contexts.toml"


def find(settings: Settings) -> Cluster:
    """The cluster that the options, the environment or the contexts name."""
    address = settings.address or ("" if settings.context else os.environ.get("MILL_ADDRESS", ""))
    token = settings.token or ("" if settings.context else os.environ.get("MILL_TOKEN", ""))
    ca = os.environ.get("MILL_CA", "")
    if address and token and not _guarded(_split(address)):
        return Cluster(_split(address), token)
    known = load()
    if settings.context:
        cluster = _named(known, settings.context)
        return Cluster(_split(address) or cluster.addresses, token or cluster.token,
                       cluster.ca or ca)
    if address:
        kept = _at(known, _split(address)) or Cluster((), "")
        return Cluster(_split(address), token or kept.token, kept.ca or ca)
    if known.current:
        cluster = _named(known, known.current)
        return Cluster(cluster.addresses, token or cluster.token, cluster.ca or ca)
    raise Unavailable("no cluster is named",
                      hint="start one with mill dev, or name one with --address and --token")


def load() -> Contexts:
    """All contexts; none where there is no file."""
    try:
        written = tomllib.loads(path().read_text())
    except FileNotFoundError:
        return Contexts()
    except (OSError, ValueError) as error:
        raise MillError(f"the contexts cannot be read: {error}", at=str(path()),
                        hint="correct the file or remove it") from error
    try:
        return Contexts(str(written.get("current", "")), {
            name: Cluster(tuple(map(str, entry["addresses"])), str(entry["token"]),
                          str(entry.get("ca", "")))
            for name, entry in written.get("contexts", {}).items() if entry["addresses"]
        })
    except (KeyError, TypeError, AttributeError) as error:
        raise MillError("the contexts lack addresses or a token", at=str(path()),
                        hint="correct the file or remove it") from error


def select(name: str, cluster: Cluster) -> None:
    """Write a context and make it the current one."""
    with _changing() as known:
        known.clusters[name] = cluster
        known.current = name


def forget(name: str) -> None:
    """Remove a context, if it is there."""
    with _changing() as known:
        known.clusters.pop(name, None)
        if known.current == name:
            known.current = ""


def forget_node(name: str, address: str) -> bool:
    """Ask that node no more; whether others are left to ask. With none the context goes too."""
    with _changing() as known:
        cluster = known.clusters.get(name)
        rest = tuple(a for a in cluster.addresses if base_url(a) != base_url(address)) \
            if cluster is not None else ()
        if cluster is not None and rest:
            known.clusters[name] = replace(cluster, addresses=rest)
            return True
    forget(name)
    return False


@contextlib.contextmanager
def _changing() -> Iterator[Contexts]:
    """Read, change, write: one program at a time, and never half a file."""
    folder = path().parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(os.open(folder / "contexts.lock", os.O_CREAT | os.O_RDWR, 0o600), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = load()
        yield known
        new = path().with_suffix(".new")
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            file.write(_toml(known))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path())


def _toml(known: Contexts) -> str:
    texts = [f"current = {_quoted(known.current)}\n"]
    for name, cluster in sorted(known.clusters.items()):
        addresses = ", ".join(map(_quoted, cluster.addresses))
        texts.append(f"[contexts.{_quoted(name)}]\naddresses = [{addresses}]\n"
                     f"token = {_quoted(cluster.token)}\n"
                     + (f"ca = {_quoted(cluster.ca)}\n" if cluster.ca else ""))
    return "\n".join(texts)


def _quoted(text: str) -> str:
    """A basic string of TOML; but for DEL and surrogates, JSON's are the same."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _named(known: Contexts, name: str) -> Cluster:
    if name not in known.clusters:
        listed = ", ".join(sorted(known.clusters)) or "none"
        raise NotFound(f"no context {name}", hint=f"there is {listed}, in {path()}")
    return known.clusters[name]


def _at(known: Contexts, addresses: tuple[str, ...]) -> Cluster | None:
    """The cluster kept for an address; no other one's token is ever sent there."""
    for _, cluster in sorted(known.clusters.items()):
        if set(map(base_url, addresses)) & set(map(base_url, cluster.addresses)):
            return cluster
    return None


def _guarded(addresses: tuple[str, ...]) -> bool:
    """Whether one of them is asked over TLS, so that its CA has to be known."""
    return any(base_url(address).startswith("https:") for address in addresses)


def _split(address: str) -> tuple[str, ...]:
    return tuple(piece.strip() for piece in address.split(",") if piece.strip())
