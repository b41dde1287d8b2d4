"""Files to manifest: parse, read by the schema, check across; every mistake of all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, assert_never

import msgspec

from reconciler.language.blocks import check_name
from reconciler.language.check import check
from reconciler.language.ledger import Cursor, Header, Ledger, Place, Use
from reconciler.language.problems import Flaw, InvalidManifest, Problem, quoted
from reconciler.language.schema import label_text, read_value
from reconciler.language.source import Refused, Source, over_bounds, read_source
from reconciler.language.spec import Manifest, ServiceSpec, TaskSpec
from reconciler.language.strings import parts
from reconciler.language.syntax import Attribute, Block, Document, Statement, Str, Value, parse
from reconciler.language.values import Unfit, text
from reconciler.language.workloads import SERVICE, read_port, read_service, read_task

MAX_SERVICES = 1_000
MAX_TASKS = 1_000
MAX_TOKENS = 240_000  # together: 1,000 services of 2 KB have 170,000
MAX_VARIABLES = 1_000
_MAX_VARIABLE_CHARS = 4_096
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_NO_VARIABLES: Mapping[str, str] = MappingProxyType({})

# Names of the typed result that are written otherwise in a file.
_WRITTEN = {
    "cpu_milli": "cpu", "memory_bytes": "memory", "bake_ms": "bake", "timeout_ms": "timeout",
    "stop_timeout_ms": "stop_timeout", "routes": "route", "listens": "listen",
    "volumes": "volume", "files": "file",
}


class Position(msgspec.Struct, frozen=True, array_like=True):
    """A place in a file; line and column count from 1."""

    file: str
    line: int
    column: int


class Reference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A secret, or a service of this or another manifest, that `owner` needs in `field`."""

    kind: Literal["secret", "service"]
    owner: str
    name: str
    field: str
    position: Position


class Reading(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a manifest says, and what is wrong with it.

    `manifest` holds the services and tasks that are right in themselves, so it may run only
    where `problems` is empty: see `valid`. `problems` are the first 50 in the order of the
    files, `omitted` counts the rest. `positions` go from a name to its fields; "" is its header.
    """

    manifest: Manifest
    problems: tuple[Problem, ...] = ()
    omitted: int = 0
    positions: dict[str, dict[str, Position]] = {}
    references: tuple[Reference, ...] = ()

    def valid(self) -> Manifest:
        """The manifest; raises `InvalidManifest` where it has problems."""
        if self.problems:
            raise InvalidManifest(self.problems, self.omitted)
        return self.manifest

    def at(self, name: str, field: str = "") -> Position:
        """Where a field of a service or task is written, or else the block that lacks it.

        Fields are called as in the file (`port`, `health.path`, `env.KEY`, `route.HOST/PATH`,
        `listen.tcp:5432`, `volume.NAME`, `file.PATH`) or as in the spec (`cpu_milli`).
        """
        fields = self.positions[name]
        if field in fields:
            return fields[field]
        return fields.get(_WRITTEN.get(field, field)) or fields[""]

    def in_order(self) -> tuple[ServiceSpec | TaskSpec, ...]:
        """Services and tasks in the order in which they are written."""
        def written(spec: ServiceSpec | TaskSpec) -> tuple[str, int, int]:
            header = self.positions[spec.name][""]
            return header.file, header.line, header.column

        return tuple(sorted([*self.manifest.services, *self.manifest.tasks], key=written))


class Documents:
    """Trees of files read before, by name and content, to `max_tokens` together."""

    def __init__(self, max_tokens: int = 2 * MAX_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._known: dict[tuple[str, bytes], Document] = {}
        self._tokens = 0

    def find(self, file: str, data: bytes) -> Document | None:
        """The tree of a file, if it was read before."""
        return self._known.get((file, data))

    def add(self, file: str, data: bytes, document: Document) -> None:
        """Keep a tree; the oldest go where there is no room."""
        self._known[file, data] = document
        self._tokens += document.tokens
        while self._tokens > self._max_tokens:
            oldest = next(iter(self._known))
            self._tokens -= self._known.pop(oldest).tokens


def read_manifest(
    files: Mapping[str, bytes],
    variables: Mapping[str, str] = _NO_VARIABLES,
    documents: Documents | None = None,
) -> Reading:
    """Read all files of a manifest together; the order in which they are given never matters.

    `variables` override those that the files declare; `documents` spares parsing again what an
    earlier reading parsed. Nothing is raised for what the files say: mistakes are in the result.
    """
    excess = over_bounds(files)
    if excess is not None:
        return Reading(Manifest(), (excess,))
    ledger = Ledger()
    blocks = _top(ledger, _parse_all(ledger, files, documents or Documents()))
    _variables(ledger, blocks, variables)
    _headers(ledger, blocks)
    manifest = _read_all(ledger, blocks)
    check(ledger)
    return _reading(ledger, manifest)


def _parse_all(
    ledger: Ledger, files: Mapping[str, bytes], known: Documents
) -> list[Document | None]:
    """One document a file, in order of name; None for a file with an error of syntax."""
    documents: list[Document | None] = []
    tokens = 0
    for number, file in enumerate(sorted(files)):
        source, document = Source(file, ""), None
        try:
            if tokens < MAX_TOKENS:
                document = known.find(file, files[file])
                source = document.source if document else read_source(file, files[file])
                if document is None:
                    document = parse(source)
                    known.add(file, files[file], document)
                tokens += document.tokens
                if tokens >= MAX_TOKENS:
                    ledger.flaw(Place(number, 0), f"more than {MAX_TOKENS} words and signs in "
                                "the files together", "split the manifest into several sources")
        except Refused as refused:
            source = refused.source
            Cursor(ledger, source, number).flaw(refused.flaw)
        except Flaw as flaw:
            Cursor(ledger, source, number).flaw(flaw)
        ledger.unread |= document is None
        ledger.sources.append(source)
        documents.append(document)
    return documents


class _Top(NamedTuple):
    """A block at the top of a file."""

    cursor: Cursor
    block: Block


def _top(ledger: Ledger, documents: list[Document | None]) -> list[_Top]:
    """The blocks at the top of all files; anything else there is a flaw."""
    found = []
    for number, document in enumerate(documents):
        if document is None:
            continue
        cursor = Cursor(ledger, document.source, number)
        for offset, message, hint in document.flaws:
            cursor.flaw(Flaw(offset, message, hint))
        for statement in document.body:
            wrong = _misplaced(cursor, statement)
            if wrong is not None:
                cursor.flaw(wrong)
            elif isinstance(statement, Block):
                found.append(_Top(cursor, statement))
    return found


_KINDS = {"service": 1, "task": 1, "variables": 0}
_IN_SERVICE = frozenset([*SERVICE.attributes, *SERVICE.blocks])


def _misplaced(cursor: Cursor, statement: Statement) -> Flaw | None:
    match statement:
        case Attribute(name=name, start=start):
            hint = "attributes stand inside service and task blocks"
            if name not in _IN_SERVICE:
                hint = cursor.ledger.near(name, _KINDS) or hint
            return Flaw(start, f"the attribute {quoted(name)} stands outside any block", hint)
        case Block(kind=kind, start=start, labels=labels):
            if kind not in _KINDS:
                hint = cursor.ledger.near(kind, _KINDS)
                if kind in _IN_SERVICE:
                    hint = f"`{kind}` stands inside a service block"
                return Flaw(start, f"unknown block {quoted(kind)}",
                            hint or 'a file holds service "NAME", task "NAME" and variables blocks')
            if len(labels) != _KINDS[kind]:
                form = f'{kind} "NAME" {{ ... }}' if _KINDS[kind] else f"{kind} {{ ... }}"
                wanted = "one name" if _KINDS[kind] else "no name"
                return Flaw(start, f"`{kind}` takes {wanted}, not {len(labels)}", f"write {form}")
            return None
        case _:
            assert_never(statement)


def _variables(ledger: Ledger, tops: list[_Top], overrides: Mapping[str, str]) -> None:
    """Fill in the variables first: anything else may name them."""
    places: dict[str, Place] = {}
    blocks = [top for top in tops if top.block.kind == "variables"]
    for cursor, block in blocks:
        for item in block.body:
            try:
                name, value = _variable(cursor, item, places)
                ledger.variables[name] = overrides.get(name, value)
            except Flaw as flaw:
                cursor.flaw(flaw)
                if isinstance(item, Attribute):
                    # What names it is not wrong too.
                    ledger.variables.setdefault(item.name, overrides.get(item.name, ""))
    where = blocks[0].cursor.place(blocks[0].block.start) if blocks else Place(0, 0)
    for name, value in sorted(overrides.items()):
        if name not in ledger.variables and not ledger.unread and ledger.sources:
            ledger.flaw(where, f"the variable {quoted(name)} is given, but no file declares it",
                        ledger.near(name, ledger.variables)
                        or f'declare it: variables {{ {name[:40]} = "..." }}')
        elif len(value) > _MAX_VARIABLE_CHARS or "\0" in value:
            ledger.flaw(places.get(name, where), f"the value given for the variable "
                        f"{quoted(name)} is over {_MAX_VARIABLE_CHARS} characters or holds NUL",
                        "give a shorter text")


def _variable(
    cursor: Cursor, item: Statement, places: dict[str, Place]
) -> tuple[str, str]:
    if not isinstance(item, Attribute):
        raise Flaw(item.start, "`variables` holds no blocks", 'write NAME = "value"')
    if not _VARIABLE_NAME.fullmatch(item.name):
        raise Flaw(item.start, f"{quoted(item.name)} is not a name of a variable",
                   "at most 64 letters, digits, `_` and `-`")
    held = places.setdefault(item.name, cursor.place(item.start))
    if held.offset != item.start or held.file != cursor.file:
        raise Flaw(item.start, f"the variable {quoted(item.name)} is already declared at "
                   f"{cursor.ledger.where(held)}", "keep one of them")
    if len(places) > MAX_VARIABLES:
        raise Flaw(item.start, f"more than {MAX_VARIABLES} variables", "leave some out")
    value = read_value(cursor, item, _variable_text)
    if len(value) > _MAX_VARIABLE_CHARS:
        raise Flaw(item.start, f"the variable is over {_MAX_VARIABLE_CHARS} characters",
                   "put long text into a file block")
    return item.name, value


def _variable_text(cursor: Cursor, value: Value) -> str:
    """Plain text: a variable that names another would need an order."""
    if isinstance(value, Str) and any(
        not isinstance(part, str) for part in parts(cursor.source, value)
    ):
        raise Unfit(value.start, "must be plain text, without references")
    return text(cursor, value)


def _headers(ledger: Ledger, tops: list[_Top]) -> None:
    """The names of all services and tasks, before any is read: each may name any other."""
    counts = {"service": 0, "task": 0}
    for cursor, block in tops:
        if block.kind not in counts:
            continue
        counts[block.kind] += 1
        limit = MAX_SERVICES if block.kind == "service" else MAX_TASKS
        if counts[block.kind] == limit + 1:
            cursor.flaw(Flaw(block.start, f"more than {limit} {block.kind}s in one manifest",
                             "split it into several sources"))
        try:
            _header(cursor, block)
        except Flaw as flaw:
            cursor.flaw(flaw)


def _header(cursor: Cursor, block: Block) -> None:
    label = block.labels[0]
    name = label_text(cursor, label)
    check_name(name, label, f"a {block.kind}")
    place = cursor.place(block.start)
    held = cursor.ledger.headers.setdefault(
        name, Header("service" if block.kind == "service" else "task", place, _port(cursor, block)))
    if held.place != place:
        raise Flaw(label.start, f"the name `{name}` is already taken by a {held.kind} at "
                   f"{cursor.ledger.where(held.place)}",
                   "services and tasks share one space of names")
    cursor.ledger.marks.setdefault(name, {})[""] = place


def _port(cursor: Cursor, block: Block) -> int | None:
    """The port, for those who name the address; what is wrong with it is told later."""
    for item in block.body:
        if isinstance(item, Attribute) and item.name == "port":
            try:
                return read_port(cursor, item.value)
            except Flaw:
                return -1
    return None


def _read_all(ledger: Ledger, tops: list[_Top]) -> Manifest:
    owners = {header.place: name for name, header in ledger.headers.items()}
    services: list[ServiceSpec] = []
    tasks: list[TaskSpec] = []
    for cursor, block in tops[: MAX_SERVICES + MAX_TASKS + MAX_VARIABLES]:
        # A block whose name is wrong or taken is still read, for what else is wrong with it.
        name = owners.get(cursor.place(block.start), "")
        inside = cursor._replace(owner=name)
        if block.kind == "service":
            service = read_service(inside, block)
            if service is not None and name:
                services.append(service)
        elif block.kind == "task":
            task = read_task(inside, block)
            if task is not None and name:
                tasks.append(task)
    return Manifest(tuple(sorted(services, key=lambda one: one.name)),
                    tuple(sorted(tasks, key=lambda one: one.name)))


def _reading(ledger: Ledger, manifest: Manifest) -> Reading:
    def position(place: Place) -> Position:
        source = ledger.sources[place.file]
        return Position(source.file, *source.position(place.offset))

    def reference(kind: Literal["secret", "service"], use: Use) -> Reference:
        return Reference(kind, use.owner, use.name, use.field, position(use.place))

    problems, omitted = ledger.problems()
    return Reading(
        manifest, problems, omitted,
        {name: {field: position(place) for field, place in marks.items()}
         for name, marks in ledger.marks.items()},
        tuple(reference("secret", use) for use in ledger.secrets)
        + tuple(reference("service", use) for use in ledger.addresses),
    )
