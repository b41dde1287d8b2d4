"""The text of strings and heredocs: escapes, and the three references that may stand in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import msgspec

from reconciler.language.problems import Flaw, quoted
from reconciler.language.source import Source
from reconciler.language.syntax import Str

SECRET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
REFERENCES = "write ${secret(NAME)}, ${service.NAME.address} or ${var.NAME}"


class Ref(msgspec.Struct, frozen=True):
    """`${secret(NAME)}`, `${service.NAME.address}` or `${var.NAME}`, at the offset of its `$`."""

    kind: Literal["secret", "service", "variable"]
    name: str
    offset: int


_QUOTED = re.compile(r"(?P<plain>[^\\$%]+)|(?P<escape>\\(?:u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.))"
                     r"|(?P<literal>\$\$\{|%%\{)|(?P<ref>\$\{[^{}\"\n]*\})|(?P<sign>[$%])")
_HEREDOC = re.compile(r"(?P<plain>[^$%]+)|(?P<literal>\$\$\{|%%\{)|(?P<ref>\$\{[^{}\"\n]*\})"
                      r"|(?P<broken>[$%]\{)|(?P<sign>[$%])")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\"}
_SECRET = re.compile(r"\s*secret\s*\(\s*([^()\s]*)\s*\)\s*")
_SERVICE = re.compile(r"\s*service\.([^.\s]*)\.address\s*")
_VARIABLE = re.compile(r"\s*var\.([A-Za-z_][A-Za-z0-9_-]*)\s*")


def parts(source: Source, value: Str) -> list[str | Ref]:
    """What the string says, references apart; raises `Flaw` at what it cannot say."""
    text = source.text
    if text[value.start] == "<":
        found = _heredoc(text, value)
    else:
        content = text[value.start + 1 : value.end - 1]
        if not ("\\" in content or "$" in content or "%" in content):
            return [content] if content else []
        found = _quoted(content, value.start + 1)
    return _merge(found)


def _merge(found: Iterator[str | Ref]) -> list[str | Ref]:
    """Neighbouring pieces of text as one, none empty: one meaning has one form."""
    merged: list[str | Ref] = []
    buffer: list[str] = []
    for piece in found:
        if isinstance(piece, str):
            buffer.append(piece)
            continue
        if buffer:
            merged.append("".join(buffer))
            buffer = []
        merged.append(piece)
    if buffer:
        merged.append("".join(buffer))
    return [piece for piece in merged if piece != ""]


def _quoted(content: str, base: int) -> Iterator[str | Ref]:
    for found in _QUOTED.finditer(content):
        at, piece = base + found.start(), found[0]
        kind = found.lastgroup
        if kind == "escape":
            yield _escape(piece, at)
        elif kind == "ref":
            yield _reference(piece, at)
        else:
            yield piece[1:] if kind == "literal" else piece


def _escape(piece: str, at: int) -> str:
    sign = piece[1]
    if sign in _ESCAPES:
        return _ESCAPES[sign]
    if len(piece) > 2:
        code = int(piece[2:], 16)
        if code == 0 or 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise Flaw(at, f"{quoted(piece)} is not a character that a string may hold",
                       "U+0000 and surrogates are no text")
        return chr(code)
    if sign in "uU":
        raise Flaw(at, f"`\\{sign}` needs {4 if sign == 'u' else 8} hexadecimal digits",
                   r"such as \u00e9")
    raise Flaw(at, f"unknown escape {quoted(piece)}",
               r"the escapes are \n \r \t \" \\ \uXXXX \UXXXXXXXX; a backslash itself is \\")


def _heredoc(text: str, value: Str) -> Iterator[str | Ref]:
    """Lines as written; `<<-` takes away the indentation that all lines share."""
    head = text.index("\n", value.start)
    last = text.rindex("\n", value.start, value.end)
    lines = text[head + 1 : last + 1].splitlines(keepends=True)
    indent = 0
    if text[value.start + 2] == "-":
        indents = [len(line) - len(line.lstrip(" \t")) for line in lines if line.strip()]
        indent = min(indents, default=0)
    at = head + 1
    for line in lines:
        cut = min(indent, len(line) - len(line.lstrip(" \t")))
        yield from _heredoc_line(line[cut:], at + cut)
        at += len(line)


def _heredoc_line(line: str, base: int) -> Iterator[str | Ref]:
    for found in _HEREDOC.finditer(line):
        at, piece = base + found.start(), found[0]
        kind = found.lastgroup
        if kind == "broken":
            raise Flaw(at, f"`{piece}` opens nothing that the language knows",
                       f"{REFERENCES}; `{piece[0]}{piece}` is a literal `{piece}`")
        if kind == "ref":
            yield _reference(piece, at)
        else:
            yield piece[1:] if kind == "literal" else piece


def _reference(piece: str, at: int) -> Ref:
    inner = piece[2:-1]
    if found := _SECRET.fullmatch(inner):
        if not SECRET_NAME.fullmatch(found[1]):
            raise Flaw(at, f"{quoted(found[1])} is not a name of a secret",
                       "1 to 128 letters, digits, `.`, `_`, `-`; the first a letter or digit")
        return Ref("secret", found[1], at)
    if found := _SERVICE.fullmatch(inner):
        return Ref("service", found[1], at)
    if found := _VARIABLE.fullmatch(inner):
        return Ref("variable", found[1], at)
    raise Flaw(at, f"unknown reference {quoted(piece)}",
               f"{REFERENCES}; `$${{` is a literal `${{`")
