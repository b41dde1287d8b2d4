"""The closed schema: which attributes and blocks there are, and how a block is read by it.

Nothing is guessed or dropped: an unknown or repeated name, a block for an attribute or the
reverse, a missing or extra label is a flaw, and reading goes on behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar, assert_never

from reconciler.language.ledger import Cursor
from reconciler.language.problems import Flaw, quoted
from reconciler.language.syntax import Attribute, Block, Label, Statement, Str, Value
from reconciler.language.values import Reader, Unfit, text

_T = TypeVar("_T")

# A value that fits, for a hint where the message has nothing better to say.
_EXAMPLES = {
    "bake": '"1s"', "command": '["serve", "-v"]', "content": '"text"', "cpu": "0.5",
    "deadline": '"60s"', "depends_on": '["api"]', "entrypoint": '["/bin/web"]', "healthy": "1",
    "image": '"registry.example.com/web:v1"', "interval": '"5s"', "listen": "5432",
    "max_parallel": "1", "memory": '"512M"', "mode": '"0440"', "overlap": '"skip"',
    "path": '"/api"', "per_node": "true", "port": "8080", "pull": '"always"',
    "read_only": "true", "registry_auth": '"ghcr"', "replicas": "2", "run": '"before"',
    "schedule": '"0 3 * * *"', "singleton": "true", "size": '"5Gi"', "stop_timeout": '"10s"',
    "strategy": '"auto"', "strip_prefix": "true", "tcp": "true", "timeout": '"10s"',
    "timezone": '"UTC"', "tls": "true", "tmpfs": '["/tmp"]', "unhealthy": "3",
    "user": '"1000:1000"', "websocket": "true", "workdir": '"/srv"',
}


class Field(NamedTuple):
    """An attribute: the spec's field it fills, its reader, whether it must be there."""

    to: str
    read: Reader
    required: bool = False


class Sub(NamedTuple):
    """A block within: the spec's field it fills, its reader, 0 or 1 labels, one or many."""

    to: str
    read: Callable[[Cursor, Block], object]
    labels: int = 0
    many: bool = False


class Schema(NamedTuple):
    """What may stand in a block."""

    what: str
    attributes: Mapping[str, Field]
    blocks: Mapping[str, Sub] = {}


class Found(NamedTuple):
    """What stood in a block: values by the spec's field, and where each name was written.

    A name in `starts` whose field is not in `values` was written, but could not be read.
    """

    values: dict[str, object]
    starts: dict[str, int]

    def has(self, name: str) -> bool:
        """Whether the attribute or block is written, readable or not."""
        return name in self.starts


def read_block(cursor: Cursor, block: Block, schema: Schema) -> Found:
    """Read every statement of a block by its schema, and miss what is required."""
    found = Found({}, {})
    for statement in block.body:
        try:
            _read(cursor, statement, schema, found)
        except Flaw as flaw:
            cursor.flaw(flaw)
    for name, field in schema.attributes.items():
        if field.required and not found.has(name):
            cursor.flaw(Flaw(block.start, f"{schema.what} needs `{name}`",
                             f"add {name} = ... to the block"))
    return found


def _read(cursor: Cursor, statement: Statement, schema: Schema, found: Found) -> None:
    match statement:
        case Attribute():
            _read_attribute(cursor, statement, schema, found)
        case Block():
            _read_sub(cursor, statement, schema, found)
        case _:
            assert_never(statement)


def _read_attribute(
    cursor: Cursor, attribute: Attribute, schema: Schema, found: Found
) -> None:
    name, start = attribute.name, attribute.start
    field = schema.attributes.get(name)
    if field is None:
        if name in schema.blocks:
            raise Flaw(start, f"`{name}` is a block, not an attribute", f"write {name} {{ ... }}")
        raise Flaw(start, f"unknown attribute {quoted(name)}", _near(cursor, name, schema))
    _check_once(cursor, name, start, found)
    cursor.mark(name, start)
    found.values[field.to] = read_value(cursor, attribute, field.read)


def read_value(cursor: Cursor, attribute: Attribute, read: Callable[[Cursor, Value], _T]) -> _T:
    """The typed value; a value that does not fit is told with the attribute's name."""
    try:
        return read(cursor, attribute.value)
    except Unfit as unfit:
        message = f"{quoted(attribute.name)} {unfit.message}"
        raise Flaw(unfit.offset, message, unfit.hint or _example(attribute.name)) from None


def _example(name: str) -> str:
    return f"such as {name} = {_EXAMPLES[name]}" if name in _EXAMPLES else ""


def _read_sub(cursor: Cursor, block: Block, schema: Schema, found: Found) -> None:
    name, start = block.kind, block.start
    sub = schema.blocks.get(name)
    if sub is None:
        if name in schema.attributes:
            raise Flaw(start, f"`{name}` is an attribute, not a block", f"write {name} = ...")
        raise Flaw(start, f"unknown block {quoted(name)}", _near(cursor, name, schema))
    if len(block.labels) != sub.labels:
        form = f'{name} "NAME" {{ ... }}' if sub.labels else f"{name} {{ ... }}"
        wanted = "one name" if sub.labels else "no name"
        raise Flaw(start, f"`{name}` takes {wanted}, not {len(block.labels)}", f"write {form}")
    if sub.many:
        found.starts.setdefault(name, start)
    else:
        _check_once(cursor, name, start, found)
    cursor.mark(name, start)
    value = sub.read(cursor, block)
    if not sub.many:
        found.values[sub.to] = value
        return
    listed = found.values.setdefault(sub.to, [])
    assert isinstance(listed, list)
    listed.append(value)


def _check_once(cursor: Cursor, name: str, start: int, found: Found) -> None:
    if found.has(name):
        line = cursor.source.position(found.starts[name])[0]
        raise Flaw(start, f"`{name}` is already set at line {line}", "keep one of them")
    found.starts[name] = start


def _near(cursor: Cursor, name: str, schema: Schema) -> str:
    known = [*schema.attributes, *schema.blocks]
    near = cursor.ledger.near(name, known)
    return near or f"{schema.what} knows " + ", ".join(sorted(known))


def label_text(cursor: Cursor, label: Label) -> str:
    """The text of a block's label; a bare word is refused."""
    if not label.quoted:
        word = cursor.source.text[label.start : label.end]
        raise Flaw(label.start, f"the name {quoted(word)} must stand in quotes",
                   f'write "{word[:40]}"')
    return text(cursor, Str(label.start, label.end))
