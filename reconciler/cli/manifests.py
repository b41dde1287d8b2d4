"""The manifests that a command was given, by the names under which messages speak of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reconciler.errors import Malformed
from reconciler.language.source import MAX_MANIFEST_BYTES, Refused, read_source

DEFAULT = "mill.mill"


def collect(paths: Sequence[str]) -> dict[str, bytes]:
    """The files by name: those given, or of a folder every `*.mill`; with none given `mill.mill`,
    else every `*.mill` here. At most one byte over the bound is read of each."""
    if not paths:
        paths = [DEFAULT] if Path(DEFAULT).is_file() else ["."]
    files: dict[str, bytes] = {}
    for path in paths:
        for file in _of(Path(path)):
            files[str(file)] = _read(file)
    return files


def texts(files: dict[str, bytes]) -> dict[str, str]:
    """The files as text for the API; Rejected where one is no text."""
    from reconciler.cli.problems import Rejected

    for name, data in files.items():
        try:
            data.decode()
        except UnicodeDecodeError:
            try:
                read_source(name, data)
            except Refused as refused:
                raise Rejected((refused.source.problem(refused.flaw),), {}) from None
    return {name: data.decode() for name, data in files.items()}


def shown(files: dict[str, bytes]) -> dict[str, str]:
    """The files as text for caret lines, whatever is in them."""
    return {name: data.decode(errors="replace") for name, data in files.items()}


def variables(pairs: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE`s as a mapping."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise Malformed(f"--var cannot be {pair[:40]!r}", hint="write --var NAME=VALUE")
        if name in found:
            raise Malformed(f"the variable {name[:40]} is given twice", hint="give it once")
        found[name] = value
    return found


def _of(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.glob("*.mill") if file.is_file())
    if not found:
        where = "here" if str(path) == "." else f"in {path}"
        raise Malformed(f"there is no .mill file {where}", hint="name one with -f PATH")
    return found


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise Malformed(f"{path} cannot be read: {error.strerror}",
                        hint="name a .mill file or a folder of them") from error
