"""`mill backup` and `mill restore`: a cluster as one file under a passphrase, and back."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reconciler.cli.output import document, memory
from reconciler.cli.problems import shown, warn
from reconciler.cli.session import ask
from reconciler.cli.settings import Command, Settings, pass_settings
from reconciler.errors import Conflict, Malformed, NotFound

if TYPE_CHECKING:
    from reconciler.api.client import Client
    from reconciler.api.types import Restored

MAGIC = b"mill backup 1\n"
MAX_FILE_BYTES = 64 << 20
"""What a cluster takes."""
MAX_PASSPHRASE_BYTES = 4096
_LENGTH_BYTES = 4

_passphrase_file = click.option(
    "--passphrase-file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="read it from here; - is standard input; asked for on a terminal")


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_passphrase_file
@click.option("--stale", is_flag=True, help="what one node knows, where no majority is left")
@pass_settings
def backup(settings: Settings, file: Path, passphrase_file: Path | None, stale: bool) -> None:
    """Write services, secrets and sources to FILE, sealed with a passphrase.

    The file and its passphrase are all that `mill restore` needs, in a new cluster too. It holds no
    data of volumes, no tokens and no images.
    """
    _check_replaceable(file)
    passphrase = _passphrase(passphrase_file, confirm=True)

    async def work(client: Client) -> bytes:
        return await client.backup(passphrase, stale=stale)

    data = ask(settings, work)
    cluster, index = _about(data)
    _write(file, data)
    if settings.json:
        document({"file": str(file), "bytes": len(data), "cluster": cluster, "index": index})
    elif not settings.quiet:
        click.echo(f"  {shown(cluster)} at index {index}: {shown(str(file))} "
                   f"({memory(len(data))})")
    if stale:
        warn("this is what one node knew, and may lack the newest changes", settings)


@click.command(cls=Command)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@_passphrase_file
@pass_settings
def restore(settings: Settings, file: Path, passphrase_file: Path | None) -> None:
    """Take the backup in FILE over into a cluster that is empty.

    Services start at once on the nodes that there are. Sources come suspended, so that nothing is
    deployed from git before you have looked.
    """
    data = _read(file, MAX_FILE_BYTES)
    _about(data)
    passphrase = _passphrase(passphrase_file, confirm=False)

    async def work(client: Client) -> Restored:
        return await client.restore(data, passphrase)

    answer = ask(settings, work)
    if settings.json:
        document(answer)
    elif not settings.quiet:
        found = ", ".join(_count(names, noun) for names, noun in (
            (answer.services, "service"), (answer.secrets, "secret"), (answer.sources, "source")))
        click.echo(f"  {shown(answer.cluster)} restored as of index {answer.backup_index}, "
                   f"{answer.taken_at}: {found}")
        for name in answer.sources:
            click.echo(f"  source {shown(name)} is suspended")


def _count(names: tuple[str, ...], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"


def _about(data: bytes) -> tuple[str, int]:
    """Of which cluster and index a backup is, from its header in clear."""
    begin = len(MAGIC) + _LENGTH_BYTES
    length = int.from_bytes(data[len(MAGIC) : begin], "big")
    try:
        if not data.startswith(MAGIC):
            raise ValueError
        header = json.loads(data[begin : begin + length])
        return str(header["cluster"]), int(header["index"])
    except (ValueError, KeyError, TypeError):
        raise Malformed("this is no backup of mill", hint="mill backup FILE makes one") from None


def _passphrase(file: Path | None, *, confirm: bool) -> str:
    if file is None:
        if not sys.stdin.isatty():
            raise Malformed("there is nobody to ask for a passphrase",
                            hint="name a file that holds it: --passphrase-file FILE")
        typed = click.prompt("passphrase", hide_input=True, confirmation_prompt=confirm, err=True)
        assert isinstance(typed, str)
        return typed
    data = sys.stdin.buffer.read(MAX_PASSPHRASE_BYTES + 1) if str(file) == "-" \
        else _read(file, MAX_PASSPHRASE_BYTES)
    try:
        return data[:MAX_PASSPHRASE_BYTES].decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise Malformed("the passphrase is no UTF-8 text", at=str(file)) from None


def _read(file: Path, max_bytes: int) -> bytes:
    try:
        with file.open("rb") as opened:
            data = opened.read(max_bytes + 1)
    except OSError as error:
        raise NotFound(f"cannot be read: {error.strerror}", at=str(file)) from error
    if len(data) > max_bytes:
        raise Malformed(f"the file is over {memory(max_bytes)}", at=str(file))
    return data


def _check_replaceable(file: Path) -> None:
    """An older backup may be replaced, and nothing else: names are mistyped."""
    try:
        with file.open("rb") as opened:
            begins = opened.read(len(MAGIC))
    except FileNotFoundError:
        return
    except OSError as error:
        raise Malformed(f"cannot be written: {error.strerror}", at=str(file)) from error
    if begins != MAGIC:
        raise Conflict("a file that is no backup is there already", at=str(file),
                       hint="give another name")


def _write(file: Path, data: bytes) -> None:
    """All of it or nothing, on the disk, readable for its owner alone."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise Malformed(f"cannot be written: {error.strerror}", at=str(file)) from error
