"""Text to syntax tree, through the grammar of python-hcl2; no meaning yet.

The tree is ours and small: what `schema` reads and `format` prints. Offsets are into
`Source.text`, ends are exclusive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from reconciler.language.problems import Flaw, quoted
from reconciler.language.source import Source
from reconciler.language.tokens import Scan, mask_length, scan

if TYPE_CHECKING:
    from lark import Token, Tree
    from lark.exceptions import UnexpectedInput


class Str(msgspec.Struct, frozen=True, gc=False, tag=True):
    """A string or heredoc, quotes and marks included; decoded by `strings`."""

    start: int
    end: int


class Num(msgspec.Struct, frozen=True, gc=False, tag=True):
    """A number as its digits were written."""

    start: int
    end: int
    text: str


class Bool(msgspec.Struct, frozen=True, gc=False, tag=True):
    """`true` or `false`."""

    start: int
    end: int
    value: bool


class Other(msgspec.Struct, frozen=True, gc=False, tag=True):
    """An expression that the grammar knows and the language refuses; `what` names its kind."""

    start: int
    end: int
    what: str


class Items(msgspec.Struct, frozen=True, tag=True):
    """A list."""

    start: int
    end: int
    items: tuple[Str | Num | Bool | Other | Items, ...]


Value = Str | Num | Bool | Other | Items


class Attribute(msgspec.Struct, frozen=True, tag=True):
    """`NAME = VALUE`."""

    start: int
    end: int
    name: str
    value: Value


class Label(msgspec.Struct, frozen=True, gc=False):
    """What stands between a block's kind and its `{`; `quoted` unless it is a bare word."""

    start: int
    end: int
    quoted: bool


class Block(msgspec.Struct, frozen=True, tag=True):
    """`KIND "LABEL" { ... }`; `brace` is the offset of its `{`."""

    start: int
    end: int
    kind: str
    labels: tuple[Label, ...]
    brace: int
    body: tuple[Attribute | Block, ...]


Statement = Attribute | Block


class Document(msgspec.Struct, frozen=True):
    """One file. `flaws` are mistakes of form that do not hinder reading on."""

    source: Source
    body: tuple[Statement, ...]
    comments: tuple[tuple[int, int], ...]
    flaws: tuple[tuple[int, str, str], ...]
    tokens: int


def parse(source: Source) -> Document:
    """The tree of one file; raises `Flaw` at the first error of syntax."""
    scanned = scan(source)
    tree = _tree(scanned)
    builder = _Builder(scanned)
    body = builder.body(tree.children[0])
    return Document(source, body, scanned.comments, tuple(builder.flaws), scanned.tokens)


def _tree(scanned: Scan) -> Tree[Token]:
    import hcl2  # here and not above: 80 ms that `mill --help` need not pay
    from lark.exceptions import UnexpectedInput

    try:
        return hcl2.parses_to_tree(scanned.masked)
    except UnexpectedInput as error:
        # Its text repeats what it read, to any length; ours is made from the place alone.
        raise _explain(error, scanned) from None


_WORD = re.compile(r"[\w.-]{1,60}")
_OTHER = {
    "object": "an object `{ ... }`",
    "function_call": "a function call",
    "get_attr_expr_term": "a reference",
    "index_expr_term": "an index",
    "attr_splat_expr_term": "a splat",
    "full_splat_expr_term": "a splat",
    "for_tuple_expr": "a `for` expression",
    "for_object_expr": "a `for` expression",
    "conditional": "a condition",
    "binary_op": "an expression",
    "unary_op": "an expression",
}


class _Builder:
    """lark's tree to ours. Recursion is bounded by the scan's bound on nesting."""

    def __init__(self, scanned: Scan) -> None:
        self.masked = scanned.masked
        self.strings = scanned.strings
        self.flaws: list[tuple[int, str, str]] = []

    def body(self, tree: Tree[Token]) -> tuple[Statement, ...]:
        return tuple(self._statements(tree))

    def _statements(self, tree: Tree[Token]) -> Iterator[Statement]:
        for node in tree.children:
            if node.data == "new_line_or_comment":
                continue
            head = node.children[0].children[0]
            self._check_head(head)
            if node.data == "attribute":
                value = self.value(node.children[2])
                yield Attribute(head.start_pos, value.end, str(head), value)
            else:
                yield self._block(node, head)

    def _check_head(self, head: Token) -> None:
        start = head.start_pos
        if start in self.strings:
            self.flaws.append((start - 1, "a name is written without quotes", _AS_STATEMENT))
        at = start - 1
        while at >= 0 and self.masked[at] in " \t":
            at -= 1
        if at >= 0 and self.masked[at] not in "\n{":
            self.flaws.append((start, f"{quoted(str(head))} needs a new line or `;` before it",
                               "put it on a line of its own"))

    def _block(self, node: Tree[Token], head: Token) -> Block:
        *front, brace, body, closing = node.children
        labels = []
        for child in front[1:]:
            if child.data == "new_line_or_comment":
                self.flaws.append((brace.start_pos, "`{` must stand on the line of its block",
                                   "HCL ends the line there: move it up"))
                continue
            word = child.children[0]
            span = self._string(word)
            labels.append(Label(*span, True) if span
                          else Label(word.start_pos, word.end_pos, False))
        return Block(head.start_pos, closing.end_pos, str(head), tuple(labels),
                     brace.start_pos, self.body(body))

    def _string(self, word: Token) -> tuple[int, int] | None:
        """The string that a masked name stands for, if it is one and nothing is glued to it."""
        span = self.strings.get(word.start_pos)
        return span if span and len(word) == mask_length(*span) else None

    def value(self, node: Tree[Token]) -> Value:
        if node.data == "expr_term" and len(node.children) == 1:
            inner = node.children[0]
            kind = str(inner.data)
            if kind == "identifier":
                span = self._string(inner.children[0])
                return Str(*span) if span else self._other(node, "a bare word")
            if kind in {"int_lit", "float_lit"}:
                digits = inner.children[0]
                return Num(digits.start_pos, digits.end_pos, str(digits))
            if kind == "literal_value":
                return self._literal(node, inner.children[0])
            if kind == "tuple":
                return self._items(inner)
            return self._other(node, _OTHER.get(kind, "an expression"))
        if node.data == "unary_op" and str(node.children[0]) == "-":
            number = self.value(node.children[1])
            if isinstance(number, Num):
                # `-1` comes as an operator and its term, `-12` as one literal.
                return Num(node.children[0].start_pos, number.end, "-" + number.text)
        if node.data == "expr_term":
            return self._other(node, "an expression in parentheses")
        return self._other(node, _OTHER.get(str(node.data), "an expression"))

    def _literal(self, node: Tree[Token], word: Token) -> Value:
        if str(word) == "null":
            return self._other(node, "`null`")
        return Bool(word.start_pos, word.end_pos, str(word) == "true")

    def _items(self, node: Tree[Token]) -> Items:
        first, *inner, last = node.children
        found = tuple(self.value(child) for child in inner
                      if hasattr(child, "data") and child.data != "new_line_or_comment")
        return Items(first.start_pos, last.end_pos, found)

    def _other(self, node: Tree[Token], what: str) -> Other:
        start, end = node.meta.start_pos, node.meta.end_pos
        trimmed = self.masked[start:end].rstrip()
        span = self.strings.get(start)
        return Other(span[0] if span else start, start + len(trimmed), what)


_SIGNS = {"COMMA": "`,`", "RPAR": "`)`", "RSQB": "`]`"}
_AS_VALUE = 'a value is "text", a number, true, false or a list ["a", "b"]'
_AS_STATEMENT = "write NAME = VALUE for an attribute, or NAME { ... } for a block"


def _explain(error: UnexpectedInput, scanned: Scan) -> Flaw:
    """A flaw from a parser's error: its place, what stands there, what would have fitted."""
    text, token = scanned.source.text, getattr(error, "token", None)
    expected = frozenset(getattr(error, "expected", None) or ())
    at = error.pos_in_stream or 0
    if expected == {"LBRACE"}:
        # A name and nothing on its line: the grammar still waits for `{` on the next one.
        end = len(scanned.masked[:at].rstrip())
        if "\n" in scanned.masked[end:at]:
            return Flaw(end, "unexpected end of the line", _AS_STATEMENT)
    if at >= len(text) or (token is not None and token.type == "$END"):
        end = len(scanned.masked.rstrip())
        hint = _AS_STATEMENT if expected == {"LBRACE"} else _hint(scanned.masked[:end], expected)
        return Flaw(end, "unexpected end of the file", hint)
    at += len(scanned.masked[at:]) - len(scanned.masked[at:].lstrip(" \t"))
    hint = _hint(scanned.masked[:at], expected)
    if at in scanned.strings:
        return Flaw(at - 1, "unexpected string", hint)
    sign = text[at]
    if scanned.masked[at] == "\n":
        return Flaw(at, f"unexpected {'`;`' if sign == ';' else 'end of the line'}", hint)
    if sign == ":":
        hint = "attributes are written NAME = VALUE"
    elif sign == ",":
        hint = hint or "attributes are separated by `;` or a new line"
    elif not sign.isascii():
        hint = "names are ASCII letters, digits, `_` and `-`"
    word = _WORD.match(text, at)
    return Flaw(at, f"unexpected {quoted(word[0] if word else sign)}", hint)


def _hint(before: str, expected: frozenset[str]) -> str:
    if before.rstrip().endswith("="):
        return _AS_VALUE
    if "EQ" in expected:
        return _AS_STATEMENT
    if expected & {"COMMA", "RSQB"}:
        fitting = sorted(_SIGNS[name] for name in expected & _SIGNS.keys())
        return "expected " + " or ".join(fitting) if fitting else _AS_VALUE
    if "LBRACE" in expected and len(expected) < 8:
        return "expected `{`"
    return _AS_STATEMENT
