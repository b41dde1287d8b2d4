"""`validate` and `fmt`: what needs no cluster."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import click

from reconciler.cli import manifests
from reconciler.cli.output import document
from reconciler.cli.problems import INVALID, Rejected, shown
from reconciler.cli.problems import show as show_error
from reconciler.cli.settings import Command, Settings, pass_settings


@click.command(cls=Command)
@click.option("-f", "--file", "paths", multiple=True, metavar="PATH", help="a file or a folder")
@click.option("--var", "pairs", multiple=True, metavar="NAME=VALUE", help="for ${var.NAME}")
@pass_settings
def validate(settings: Settings, paths: tuple[str, ...], pairs: tuple[str, ...]) -> int:
    """Check manifests: all mistakes at once, each with its place."""
    from reconciler.language.read import read_manifest
    from reconciler.language.spec import ServiceSpec, spec_hash

    files = manifests.collect(paths)
    reading = read_manifest(files, manifests.variables(pairs))
    if settings.json:
        rows = [(isinstance(spec, ServiceSpec), {"name": spec.name, "hash": spec_hash(spec)})
                for spec in reading.in_order()]
        document({
            "errors": reading.problems,
            "services": [row for service, row in rows if service],
            "tasks": [row for service, row in rows if not service],
        })
        return INVALID if reading.problems else 0
    if reading.problems:
        raise Rejected(reading.problems, manifests.shown(files), reading.omitted)
    if not settings.quiet:
        for line in _not_yet(reading):
            click.echo(line)
        manifest = reading.manifest
        counts = [_counted(len(manifest.services), "service")]
        counts += [_counted(len(manifest.tasks), "task")] if manifest.tasks else []
        click.echo(f"  valid: {', '.join(counts)} in {_counted(len(files), 'file')}")
    return 0


def _not_yet(reading: object) -> list[str]:
    from reconciler.language.read import Reading
    from reconciler.language.unbuilt import unbuilt

    assert isinstance(reading, Reading)
    found = []
    for one in unbuilt(reading.manifest):
        at = reading.at(one.name, one.field)
        found.append(f"  warning: {shown(at.file)}:{at.line}:{at.column}: not built yet: "
                     f"{shown(one.what)}")
    return found


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@click.command(cls=Command)
@click.option("--check", is_flag=True, help="change nothing; name what is not laid out so, exit 1")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@pass_settings
def fmt(settings: Settings, paths: tuple[str, ...], check: bool) -> int:
    """Rewrite manifests in the one layout; comments and meaning stay."""
    from reconciler.language.format import format_text
    from reconciler.language.problems import InvalidManifest
    from reconciler.language.source import over_bounds

    files = manifests.collect(paths)
    changed: list[str] = []
    code = 0
    for name, data in files.items():
        # What is no UTF-8 comes through as it is and is refused at its place.
        text = data.decode(errors="surrogateescape")
        try:
            if excess := over_bounds({name: data}):
                raise InvalidManifest([excess])
            formatted = format_text(text, name).encode()
        except InvalidManifest as error:
            code = show_error(
                Rejected(error.problems, manifests.shown({name: data}), error.omitted), settings)
            continue
        if formatted != data:
            changed.append(name)
            if not check:
                _rewrite(Path(name), formatted)
    if not settings.quiet:
        for name in changed:
            click.echo(shown(name))
    return code or (1 if check and changed else 0)


def _rewrite(path: Path, data: bytes) -> None:
    """Whole or not at all, with the mode it had; a link's target is rewritten, not the link."""
    path = path.resolve()
    handle, new = tempfile.mkstemp(dir=path.parent, prefix=".mill-fmt-")
    try:
        with open(handle, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), path.stat().st_mode & 0o7777)
        Path(new).replace(path)
    except BaseException:
        Path(new).unlink(missing_ok=True)
        raise
