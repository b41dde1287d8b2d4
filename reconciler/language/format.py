"""The canonical layout of a file: what `mill fmt` writes. Meaning and comments stay.

A body is read as rows: the statements and comments that share a line. A row of several
statements stays one where it fits; otherwise each gets a row of its own. `=` and trailing
comments of neighbouring single attributes are aligned.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

import msgspec

from reconciler.language.problems import Flaw, InvalidManifest
from reconciler.language.source import Refused, Source, read_source
from reconciler.language.syntax import (
    Attribute,
    Block,
    Bool,
    Document,
    Items,
    Num,
    Statement,
    Str,
    Value,
    parse,
)

WIDTH = 100  # columns that a row of several statements may take
_STEP = 2  # columns of indentation a block


class _Comment(msgspec.Struct, frozen=True):
    start: int
    end: int


_Element = Attribute | Block | _Comment


class _Row(msgspec.Struct, frozen=True):
    """Elements of one line; `blank` asks for an empty line before it."""

    elements: tuple[_Element, ...]
    blank: bool


def format_text(text: str, file: str = "") -> str:
    """The canonical form of a file; formatting it again changes nothing.

    Raises `InvalidManifest` where the text does not parse. What the schema would refuse is
    formatted all the same.
    """
    document = _document(text, file)
    rows = _Layout(document).body(document.body, 0, len(document.source.text), 0)
    formatted = "".join(line + "\n" for line in rows)
    assert _gist(_document(formatted, file)) == _gist(document), "the layout changed the meaning"
    return formatted


def _document(text: str, file: str) -> Document:
    source = Source(file, text)
    try:
        source = read_source(file, text.encode("utf-8", "surrogatepass"))
        document = parse(source)
    except Refused as refused:
        raise InvalidManifest([refused.source.problem(refused.flaw)]) from None
    except Flaw as flaw:
        raise InvalidManifest([source.problem(flaw)]) from None
    if document.flaws:
        raise InvalidManifest([source.problem(Flaw(*flaw)) for flaw in sorted(document.flaws)])
    return document


class _Layout:
    """Lines of one document. Methods named `lines` indent what they give, but for its first."""

    def __init__(self, document: Document) -> None:
        self.text = document.source.text
        self.comments = [_Comment(*span) for span in document.comments]
        self.starts = [comment.start for comment in self.comments]

    def body(
        self, statements: tuple[Statement, ...], start: int, end: int, indent: int
    ) -> list[str]:
        """The lines between two offsets, which hold these statements and comments."""
        return self._print(list(self._rows(self._elements(statements, start, end))), indent)

    # Rows, as the file has them

    def _elements(
        self, statements: tuple[Statement, ...], start: int, end: int
    ) -> list[_Element]:
        elements: list[_Element] = []
        at = start
        for statement in statements:
            elements += self._comments_in(at, statement.start)
            elements.append(statement)
            at = statement.end
        return elements + self._comments_in(at, end)

    def _comments_in(self, start: int, end: int) -> list[_Comment]:
        first, stop = bisect_left(self.starts, start), bisect_left(self.starts, end)
        return self.comments[first:stop]

    def _rows(self, elements: list[_Element]) -> Iterator[_Row]:
        row: list[_Element] = []
        blank = False
        for element in elements:
            if row:
                gap = self.text[row[-1].end : element.start].count("\n")
                if gap:
                    yield _Row(tuple(row), blank)
                    row, blank = [], gap > 1
            row.append(element)
        if row:
            yield _Row(tuple(row), blank)

    # Rows, as they are printed

    def _print(self, rows: list[_Row], indent: int) -> list[str]:
        lines: list[str] = []
        group: list[Attribute] = []
        trailing: list[str] = []
        pad = " " * indent

        def flush() -> None:
            lines.extend(pad + line for line in self._aligned(group, trailing))
            group.clear()
            trailing.clear()

        for row in self._split(rows, indent):
            if row.blank:
                flush()
                lines.append("")
            first, *rest = row.elements
            if isinstance(first, Attribute) and not _statements(rest) and self._flat(first):
                group.append(first)
                trailing.append(" ".join(map(self._verbatim, rest)))
                continue
            flush()
            lines += self._row_lines(row, indent)
        flush()
        return lines

    def _split(self, rows: Iterable[_Row], indent: int) -> Iterator[_Row]:
        """Rows that fit; others come apart, each comment with the statement before it."""
        for row in rows:
            inline = self._inline_row(row.elements)
            alone = len(_statements(row.elements)) < 2
            if inline is not None and (alone or indent + len(inline) <= WIDTH):
                block = any(isinstance(one, Block) for one in row.elements)
                if not block or indent + len(inline) <= WIDTH:
                    yield row
                    continue
            piece: list[_Element] = []
            blank = row.blank
            for element in row.elements:
                if piece and not isinstance(element, _Comment):
                    yield _Row(tuple(piece), blank)
                    piece, blank = [], False
                piece.append(element)
            yield _Row(tuple(piece), blank)

    def _row_lines(self, row: _Row, indent: int) -> list[str]:
        pad = " " * indent
        inline = self._inline_row(row.elements)
        block = any(isinstance(one, Block) for one in row.elements)
        if inline is not None and (not block or indent + len(inline) <= WIDTH):
            return [pad + inline]
        first, *rest = row.elements
        if isinstance(first, _Comment):
            return [pad + " ".join(map(self._verbatim, row.elements))]
        lines = (self._block_lines(first, indent) if isinstance(first, Block)
                 else self._attribute_lines(first, indent))
        lines[0] = pad + lines[0]
        if rest:
            lines[-1] += " " + " ".join(map(self._verbatim, rest))
        return lines

    def _aligned(self, group: list[Attribute], trailing: list[str]) -> Iterator[str]:
        name_width = max((len(one.name) for one in group), default=0)
        left = []
        for one in group:
            value = self._inline_value(one)
            plain = self._plain_head(one)
            left.append(f"{one.name.ljust(name_width)} = {value}" if plain
                        else self._verbatim(one))
        # Comments are aligned with those of the rows next to them, not over rows without.
        at = 0
        while at < len(left):
            stop = at + 1
            while trailing[at] and stop < len(left) and trailing[stop]:
                stop += 1
            width = max(len(line) for line in left[at:stop])
            for line, comment in zip(left[at:stop], trailing[at:stop], strict=True):
                yield f"{line.ljust(width)} {comment}" if comment else line
            at = stop

    # Statements

    def _inline_row(self, elements: tuple[_Element, ...]) -> str | None:
        """The elements on one line, or None where one of them needs more."""
        out, open_statement = "", False
        left = len(_statements(elements))
        for number, element in enumerate(elements):
            if isinstance(element, _Comment):
                piece: str | None = self._verbatim(element)
            else:
                piece = self._inline(element)
                left -= 1
            if piece is None or "\n" in piece:
                return None
            if number:
                gap = self.text[elements[number - 1].end : element.start]
                more = left > 0 or not isinstance(element, _Comment)
                ends = open_statement and ";" in gap and more
                out += "; " if ends else " "
                open_statement = open_statement and not ends
            open_statement = open_statement or not isinstance(element, _Comment)
            out += piece
        return out

    def _inline(self, statement: Statement) -> str | None:
        """The statement on one line, or None where it needs more."""
        if isinstance(statement, Attribute):
            value = self._inline_value(statement)
            if not self._plain_head(statement):
                return self._verbatim(statement)
            return None if value is None else f"{statement.name} = {value}"
        elements = self._elements(statement.body, statement.brace + 1, statement.end - 1)
        if not elements:
            return f"{self._header(statement)}}}"
        if "\n" in self._slice(statement.brace, statement.end):
            return None
        inner = self._inline_row(tuple(elements))
        return None if inner is None else f"{self._header(statement)} {inner} }}"

    def _flat(self, attribute: Attribute) -> bool:
        inline = self._inline(attribute)
        return inline is not None and "\n" not in inline

    def _plain_head(self, attribute: Attribute) -> bool:
        """Whether nothing but `=` stands between the name and the value."""
        between = self._slice(attribute.start + len(attribute.name), attribute.value.start)
        return between.strip() == "="

    def _header(self, block: Block) -> str:
        written = self._slice(block.start, block.brace)
        if self._comments_in(block.start, block.brace):
            return f"{written.strip()} {{"
        labels = [self._slice(label.start, label.end) for label in block.labels]
        return " ".join([block.kind, *labels, "{"])

    def _block_lines(self, block: Block, indent: int) -> list[str]:
        elements = self._elements(block.body, block.brace + 1, block.end - 1)
        header = self._header(block)
        rows = list(self._rows(elements))
        if rows and len(rows[0].elements) == 1 and isinstance(rows[0].elements[0], _Comment):
            first = rows[0].elements[0]
            if "\n" not in self._slice(block.brace, first.end):
                header += " " + self._verbatim(first)
                rows = [rows[1], *rows[2:]] if len(rows) > 1 else []
                rows[:1] = [_Row(row.elements, False) for row in rows[:1]]
        return [header, *self._print(rows, indent + _STEP), " " * indent + "}"]

    def _attribute_lines(self, attribute: Attribute, indent: int) -> list[str]:
        if not self._plain_head(attribute):
            return self._verbatim(attribute).split("\n")
        value, head = attribute.value, f"{attribute.name} = "
        if isinstance(value, Items) and _simple(self.text, value):
            return [head + "[", *self._item_lines(value, " " * (indent + _STEP)),
                    " " * indent + "]"]
        return (head + self._slice(value.start, value.end)).split("\n")

    # Values

    def _inline_value(self, attribute: Attribute) -> str | None:
        value = attribute.value
        written = self._slice(value.start, value.end)
        commented = bool(self._comments_in(value.start, value.end))
        if isinstance(value, Items) and _simple(self.text, value):
            if not value.items and not commented:
                return "[]"
            if "\n" in written:
                return None
            if not commented:
                items = (self._slice(item.start, item.end) for item in value.items)
                return f"[{', '.join(items)}]"
        return None if "\n" in written else written

    def _item_lines(self, value: Items, pad: str) -> list[str]:
        """One item a line; a comment stays behind the item that it shares a line with."""
        inside = self._comments_in(value.start, value.end)
        lines: list[str] = []
        last: Value | _Comment | None = None
        for element in sorted([*value.items, *inside], key=lambda one: one.start):
            written = self._slice(element.start, element.end)
            if not isinstance(element, _Comment):
                lines.append(f"{pad}{written},")
            elif last is not None and "\n" not in self._slice(last.end, element.start):
                lines[-1] += " " + written.rstrip()
            else:
                lines.append(pad + written.rstrip())
            last = element
        return lines

    def _verbatim(self, element: _Element) -> str:
        return self._slice(element.start, element.end).rstrip()

    def _slice(self, start: int, end: int) -> str:
        return self.text[start:end]


def _statements(elements: Iterable[_Element]) -> list[Statement]:
    return [one for one in elements if not isinstance(one, _Comment)]


def _simple(text: str, value: Items) -> bool:
    """Whether all items stand on one line each, so that the list can be laid out anew."""
    return all(isinstance(item, Num | Bool) or (isinstance(item, Str) and text[item.start] == '"')
               for item in value.items)


def _gist(document: Document) -> tuple[object, ...]:
    """What layout may not touch: names, values as written, comments."""
    text = document.source.text

    def value_gist(value: Value) -> object:
        if isinstance(value, Items):
            return tuple(map(value_gist, value.items))
        return text[value.start : value.end]

    def gist(statement: Statement) -> object:
        if isinstance(statement, Attribute):
            return statement.name, value_gist(statement.value)
        labels = [text[label.start : label.end] for label in statement.labels]
        return statement.kind, labels, [gist(one) for one in statement.body]

    comments = [text[start:end].rstrip() for start, end in document.comments]
    return [gist(one) for one in document.body], comments
