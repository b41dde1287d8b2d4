"""Answers on standard output: JSON documents, JSON lines, aligned tables; figures in words."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import datetime

import click
import msgspec

from reconciler.cli.problems import shown

_JSON_INDENT = 2


def document(answer: object) -> None:
    """One JSON document."""
    click.echo(json_text(answer, _JSON_INDENT))


def json_line(answer: object) -> None:
    """One JSON object of a stream."""
    click.echo(json_text(answer))


def json_text(answer: object, indent: int | None = None) -> str:
    """JSON in ASCII, so that no control character of others is in it; null stays, unset goes."""
    text = json.dumps(msgspec.to_builtins(answer), indent=indent)
    return text.replace("\x7f", "\\u007f")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, quiet: bool = False) -> list[str]:
    """Lines with their columns aligned; `quiet`: the first column alone."""
    clean = [[shown(cell) for cell in row] for row in rows]
    if quiet:
        return [row[0] for row in clean]
    widths = [max(map(len, column)) for column in zip(heads, *clean, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [heads, *clean]
    ]


def lines(texts: Sequence[str]) -> None:
    """Lines, as they are."""
    if texts:
        click.echo("\n".join(texts))


def memory(count: int) -> str:
    """Bytes as manifests write them: `512M`, `1.5G`, or in powers of 1024 where those are even."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f}".removesuffix(".0") + unit
    return str(count)


def cores(count: float) -> str:
    """Cores: `0.5`, `2`."""
    return f"{count:.3f}".rstrip("0").rstrip(".")


def seconds(count: float | None) -> str:
    """`4.8s`."""
    return f"{count or 0.0:.1f}s"


def age(at: str | None) -> str:
    """How long ago a time of RFC 3339 was: `12s`, `5m`, `3h`, `2d`; `-` where there is none."""
    if at is None:
        return "-"
    passed_s = max(0, int(time.time() - datetime.fromisoformat(at).timestamp()))
    for unit, size in (("d", 86_400), ("h", 3_600), ("m", 60)):
        if passed_s >= size:
            return f"{passed_s // size}{unit}"
    return f"{passed_s}s"
