"""The description of the API (OpenAPI 3.1), made of the same calls that its routes are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import assert_never

import msgspec
from starlette.responses import Response

from reconciler.api import types
from reconciler.api.calls import Asked, Call, Handler, Query
from reconciler.api.problems import MEDIA_TYPE
from reconciler.api.replies import EVENT_STREAM
from reconciler.executor.requests import DrainStep
from reconciler.fsm import events as e

Schema = dict[str, object]

PATH = "/v1/openapi.json"
_REF = "#/components/schemas/{name}"
_STREAMS: dict[str, tuple[type, ...]] = {
    "deploy": (e.Started, e.Scheduled, e.Pulling, e.Pulled, e.Starting, e.Healthy, e.Routed,
               e.Stopped, e.RollingBack, e.Warned, e.Done, e.Failed),
    "drain": (DrainStep,),
    "EventRow": (types.EventRow,),
    "LogRow": (types.LogRow,),
}
_STREAM_TEXT = {
    "deploy": "Server-sent events. `id` is the log index of the fact, `event` is `progress`, "
              "`done` or `failed`, `data` one JSON object of these; those of `done` and `failed` "
              "carry no `phase`. Progress in bytes has no `id` and may be dropped. There is one "
              "terminal event.",
    "drain": "Server-sent events without ids: `event` is `progress`, `done` or `failed`, the data "
             "of the latter two have `success` in place of `phase`. Ask again where it breaks off: "
             "the drain goes on.",
    "EventRow": "Server-sent events: `id` is the log index, `data` a row of the list.",
    "LogRow": "Server-sent events of one line each.",
}
_BODY_PROBLEMS = (400, 413, 415, 422)


def describe(calls: Iterable[Call]) -> Schema:
    """The whole document."""
    calls = tuple(calls)
    structs: dict[type, None] = {types.Problem: None, types.Files: None}
    for call in calls:
        for struct in (call.answer, call.body, *_STREAMS.get(call.streams, ())):
            if struct is not None:
                structs[struct] = None
    _, schemas = msgspec.json.schema_components(
        list(structs), schema_hook=_anything, ref_template=_REF
    )
    paths: dict[str, dict[str, object]] = {}
    for call in calls:
        paths.setdefault(call.path, {})[call.method.lower()] = _operation(call)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "mill", "version": "1",
            "description": "Every node answers; one that does not lead forwards. Each answer "
                           "carries the log index it holds for.",
        },
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas,
        },
    }


def call_that_describes(calls: tuple[Call, ...]) -> Call:
    """The call that answers with the document, itself included; encoded once."""
    body = b""

    async def openapi(_asked: Asked) -> Response:
        return Response(body, 200, media_type="application/json")

    handler: Handler = openapi
    call = Call("GET", PATH, handler, "This document", role="read", serve="here")
    body = msgspec.json.encode(describe((*calls, call)))
    return call


def _anything(_kind: type) -> Schema:
    """The schema of `object`: an event's data, whose kinds the stream describes."""
    return {"description": "any JSON value"}


def _operation(call: Call) -> Schema:
    operation: Schema = {
        "summary": call.about,
        "operationId": _operation_id(call),
        "parameters": [*_path_parameters(call), *(_parameter(query) for query in call.queries),
                       *_headers(call)],
        "responses": _responses(call),
    }
    if call.open:
        operation["security"] = []
    if call.manifest:
        operation["requestBody"] = {"required": True, "content": {
            "text/plain": {"schema": {"type": "string"}},
            "multipart/form-data": {"schema": {
                "type": "object", "additionalProperties": {"type": "string"}}},
            "application/json": {"schema": _ref(types.Files)},
        }}
    elif call.upload:
        operation["requestBody"] = {"required": True, "content": {call.upload: {}}}
    elif call.body is not None:
        operation["requestBody"] = {"content": {"application/json": {"schema": _ref(call.body)}}}
    return operation


def _operation_id(call: Call) -> str:
    words = re.findall(r"[a-z0-9]+", call.path.removeprefix("/v1"))
    return "_".join([call.method.lower(), *words])


def _path_parameters(call: Call) -> list[Schema]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", call.path)
    ]


def _parameter(query: Query) -> Schema:
    schema: Schema
    match query.kind:
        case "flag":
            schema = {"type": "boolean", "default": False}
        case "integer":
            schema = {"type": "integer", "minimum": query.low, "maximum": query.high}
        case "list":
            schema = {"type": "array", "items": {"type": "string"}}
        case "duration":
            schema = {"type": "string", "examples": ["30s", "5m", "1h30m"]}
        case "text":
            schema = {"type": "string"}
        case _:
            assert_never(query.kind)
    if query.values:
        schema["enum"] = list(query.values)
    return {"name": query.name, "in": "query", "description": query.about, "schema": schema}


def _headers(call: Call) -> list[Schema]:
    names = list(call.headers)
    if call.streams == "deploy" and call.method == "POST":
        names.append(("Idempotency-Key", "a repeat with the same key is the same deploy"))
    if call.streams in ("deploy", "EventRow") and call.method == "GET":
        names.append(("Last-Event-ID", "go on after this log index"))
    return [
        {"name": name, "in": "header", "description": about, "schema": {"type": "string"}}
        for name, about in names
    ]


def _responses(call: Call) -> Schema:
    contents: dict[int, Schema] = {}
    if call.answer is not None:
        contents[call.status] = {"application/json": {"schema": _ref(call.answer)}}
    elif call.download:
        contents[200] = {call.download: {}}
    elif not call.streams:
        contents[200] = {"application/json": {"schema": {}}}
    if call.streams:
        schemas = [_ref(struct) for struct in _STREAMS[call.streams]]
        contents.setdefault(200, {})[EVENT_STREAM] = {"schema": {"anyOf": schemas}}
    responses: Schema = {}
    for status in sorted(contents):
        text = _STREAM_TEXT[call.streams] if EVENT_STREAM in contents[status] else call.about
        response: Schema = {"description": text, "content": contents[status]}
        if call.streams == "deploy":
            response["headers"] = {
                "Mill-Deploy": {"description": "the deploy's id", "schema": {"type": "string"}}
            }
        responses[str(status)] = response
    problem: Schema = {MEDIA_TYPE: {"schema": _ref(types.Problem)}}
    for status in _problems(call):
        responses[str(status)] = {"description": "A problem", "content": problem}
    return responses


def _problems(call: Call) -> list[int]:
    found = {503}
    found |= set(call.problems)
    if not call.open:
        found |= {401, 403, 429}
    if "{" in call.path:
        found.add(404)
    if call.queries or call.headers:
        found.add(422)
    if call.manifest or call.body is not None or call.upload:
        found.update(_BODY_PROBLEMS)
    if (call.method != "GET" and call.path != "/v1/plan") or call.manifest:
        found.add(409)
    return sorted(found)


def _ref(struct: type) -> Schema:
    return {"$ref": _REF.format(name=struct.__name__)}
