"""Deploys: plan, start, follow, cancel, look back; restart, rollback and scale are deploys too."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import msgspec
from starlette.responses import Response

from reconciler.api import replies
from reconciler.api.bodies import decode_json, read_manifest
from reconciler.api.calls import Asked, BadQuery, Call, Query
from reconciler.api.events import facts, frame, last_event_id
from reconciler.api.idempotency import key_of
from reconciler.api.scope import known_service, must_reach, must_reach_all, scope
from reconciler.api.services import Ask
from reconciler.api.stream import beside, encode
from reconciler.api.types import (
    DeployAnswer,
    DeployList,
    DeployOrigin,
    DeployRecord,
    DeployService,
    Detached,
    Plan,
    PlanAnswer,
    RollbackBody,
    ScaleBody,
)
from reconciler.errors import Conflict, NotFound, Unprocessable
from reconciler.executor.requests import DEFAULT_PULL_BUDGET_MS, DeployRequest
from reconciler.fsm.events import Event, Pulled, Pulling
from reconciler.fsm.records import Deploy, Origin
from reconciler.fsm.state import State
from reconciler.language.spec import Strategy

DEPLOY_HEADER = "mill-deploy"
MAX_REPLICAS = 1_000
"""Rule 8 of the language."""
DEFAULT_DEPLOYS, MAX_DEPLOYS = 100, 1_000
MAX_VARIABLES = 1_000

_STRATEGIES: dict[str, Strategy] = {
    "auto": "auto", "surge": "surge", "rolling": "rolling", "recreate": "recreate"
}


def record(deploy: Deploy, now_ms: int) -> DeployRecord:
    """A deploy as the API shows it; `now_ms` measures one that still runs."""
    end_ms = deploy.ended_ms if deploy.finished else max(now_ms, deploy.started_ms)
    origin = deploy.origin
    return DeployRecord(
        id=deploy.id, outcome=deploy.outcome, started_at=replies.rfc3339(deploy.started_ms),
        elapsed=(end_ms - deploy.started_ms) / 1000,
        reason=deploy.failure.reason if deploy.failure else "",
        services=tuple(
            DeployService(c.service, c.action, c.from_revision, c.to_revision)
            for c in deploy.changes
        ),
        origin=DeployOrigin(
            kind=origin.kind, source=origin.source, commit=origin.commit, author=origin.author,
            subject=origin.subject, token=origin.token,
        ),
    )


async def start(asked: Asked) -> Response:
    """Admit, then stream; or only say where the stream is."""
    request = await _deploy_request(asked)
    if scope(asked):
        await _must_reach_deploy(asked, request)
    return await _told(asked, await asked.backend.deploys.start(request))


async def _must_reach_deploy(asked: Asked, request: DeployRequest) -> None:
    """Forbidden where a deploy goes beyond the token's scope."""
    if request.prune:  # takes what the manifest does not name
        must_reach_all(asked, "prune")
    repeated = next((deploy for deploy in asked.state.deploys.values()
                     if request.key and deploy.key == request.key), None)
    if repeated is not None:  # whatever is sent along, it is this one, which may run still
        must_reach(asked, (change.service for change in repeated.changes))
        return
    # What it does name is known from its plan, in which unchanged services stand too.
    view = await asked.backend.deploys.plan(request)
    found = msgspec.convert(view, Plan, from_attributes=True)
    must_reach(asked, (service.name for service in found.services))


async def plan(asked: Asked) -> Response:
    """What `start` would do."""
    view = await asked.backend.deploys.plan(await _deploy_request(asked))
    plan = msgspec.convert(view, Plan, from_attributes=True)
    return replies.json(PlanAnswer(
        index=asked.state.index, services=plan.services, warnings=plan.warnings
    ))


async def restart(asked: Asked) -> Response:
    """New containers of the live spec."""
    name = known_service(asked, asked.path("name"))
    return await _told(asked, await asked.backend.deploys.restart(name, _ask(asked)))


async def rollback(asked: Asked) -> Response:
    """An earlier revision; which ones there are is in the service's answer."""
    name = known_service(asked, asked.path("name"))
    to = decode_json(asked.request.headers, asked.body, RollbackBody).to
    if to is not None and to < 1:
        raise Unprocessable(f"no revision {to}", hint="revisions are numbered from 1")
    return await _told(asked, await asked.backend.deploys.rollback(name, to, _ask(asked)))


async def scale(asked: Asked) -> Response:
    """Another number of replicas of the live spec."""
    name = known_service(asked, asked.path("name"))
    replicas = decode_json(asked.request.headers, asked.body, ScaleBody).replicas
    if not 0 <= replicas <= MAX_REPLICAS:
        raise Unprocessable(f"replicas cannot be {replicas}", hint=f"0 to {MAX_REPLICAS}")
    return await _told(asked, await asked.backend.deploys.scale(name, replicas, _ask(asked)))


async def list_deploys(asked: Asked) -> Response:
    """Newest first."""
    state = await asked.confirmed()
    now_ms = asked.backend.clock.wall_ms()
    newest = sorted(state.deploys.values(), key=_number, reverse=True)
    shown = newest[: asked.integer("limit", DEFAULT_DEPLOYS)]
    return replies.json(DeployList(
        index=state.index, deploys=tuple(record(deploy, now_ms) for deploy in shown),
        stale=replies.stale(asked),
    ))


async def show(asked: Asked) -> Response:
    """One deploy's record."""
    state = await asked.confirmed()
    return _shown(asked, state, _known(state, asked.path("id")))


async def follow(asked: Asked) -> Response:
    """A deploy's stream, from the start or after Last-Event-ID, from this node's own state."""
    deploy_id = asked.path("id")
    after = last_event_id(asked) or 0
    if deploy_id not in asked.state.deploys and not asked.stale:
        # A follower may not have heard of it yet; the leader knows, or it is not.
        await asked.confirmed()
    _known(asked.state, deploy_id)
    return replies.events(asked, _frames(asked, deploy_id, after), {DEPLOY_HEADER: deploy_id})


async def cancel(asked: Asked) -> Response:
    """Ask a running deploy to roll back; its stream says when it has."""
    deploy = _known(asked.state, asked.path("id"))
    must_reach(asked, (change.service for change in deploy.changes))
    if deploy.finished:
        raise Conflict(f"{deploy.id} has ended: {deploy.outcome}",
                       hint="there is nothing left to cancel")
    await asked.backend.deploys.cancel(deploy.id)
    state = asked.state
    return _shown(asked, state, _known(state, deploy.id), status=202)


async def _deploy_request(asked: Asked) -> DeployRequest:
    strategy = asked.text("strategy")
    return DeployRequest(
        files=await read_manifest(asked.request.headers, asked.body),
        variables=_variables(asked),
        prune=asked.flag("prune"),
        strategy=_STRATEGIES[strategy] if strategy else None,
        pull_budget_ms=asked.integer("timeout", DEFAULT_PULL_BUDGET_MS),
        origin=Origin(kind="manual", token=asked.token_id),
        key=key_of(asked),
    )


def _variables(asked: Asked) -> dict[str, str]:
    pairs = asked.texts("var")
    if len(pairs) > MAX_VARIABLES:
        raise BadQuery(f"{len(pairs)} variables, over the bound of {MAX_VARIABLES}")
    variables: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise BadQuery(f"var cannot be {pair[:40]!r}", hint="write var=NAME=VALUE")
        if name in variables:
            raise BadQuery(f"variable {name[:40]} is given twice", hint="give it once")
        variables[name] = value
    return variables


def _ask(asked: Asked) -> Ask:
    return Ask(token=asked.token_id, key=key_of(asked))


def _known(state: State, deploy_id: str) -> Deploy:
    deploy = state.deploys.get(deploy_id)
    if deploy is None:
        raise NotFound(f"no deploy {deploy_id}", hint="list them with: mill deploys")
    return deploy


def _shown(asked: Asked, state: State, deploy: Deploy, status: int = 200) -> Response:
    row = record(deploy, asked.backend.clock.wall_ms())
    return replies.json(
        DeployAnswer(**msgspec.structs.asdict(row), index=state.index, stale=replies.stale(asked)),
        status,
    )


async def _told(asked: Asked, deploy_id: str) -> Response:
    """The answer to what started a deploy: its stream, or with `detach` where that is."""
    headers = {DEPLOY_HEADER: deploy_id}
    if asked.flag("detach"):
        events = f"/v1/deploys/{deploy_id}/events"
        return replies.json(Detached(index=asked.state.index, id=deploy_id, events=events),
                            202, {**headers, "location": f"/v1/deploys/{deploy_id}"})
    return replies.events(asked, _frames(asked, deploy_id, 0), headers)


async def _frames(asked: Asked, deploy_id: str, after: int) -> AsyncGenerator[bytes, None]:
    ledger = asked.backend.ledger
    told = facts(ledger, deploy_id, after)
    if not ledger.is_leader:
        async for event in told:
            yield frame(event)
        return
    pulling = False
    async for item in beside(told, asked.backend.deploys.progress(deploy_id)):
        if isinstance(item, Event):
            yield frame(item)
            pulling = _pulling(item, pulling)
        elif pulling:  # bytes make sense between `pulling` and the last `pulled` alone
            known = msgspec.structs.replace(item, total=max(item.total, 0))
            yield encode("progress", known)


def _pulling(event: Event, before: bool) -> bool:
    match event.data:
        case Pulling():
            return True
        case Pulled(image=""):
            return False
        case _:
            return before and event.kind == "progress"


def _number(deploy: Deploy) -> int:
    return int(deploy.id.removeprefix("d-"))


_DETACH = Query("detach", "answer 202 at once, with where the stream is", "flag")
_MANIFEST = (
    Query("prune", "remove the owner's services that the manifest does not name", "flag"),
    Query("strategy", "for every service, instead of its own", values=tuple(_STRATEGIES)),
    Query("timeout", "the time for pulls, such as 5m", "duration"),
    Query("var", "NAME=VALUE, for ${var.NAME}; may repeat", "list"),
)

CALLS = (
    Call("POST", "/v1/deploy", start, "Deploy a manifest", role="deploy", serve="lead",
         scoped=True,
         answer=Detached, status=202, streams="deploy", manifest=True,
         query=(*_MANIFEST, _DETACH)),
    Call("POST", "/v1/plan", plan, "What a deploy of this manifest would do", role="read",
         serve="lead", answer=PlanAnswer, manifest=True, query=_MANIFEST),
    Call("GET", "/v1/deploys", list_deploys, "Deploys, newest first", role="read", serve="read",
         answer=DeployList,
         query=(Query("limit", "how many", "integer", low=1, high=MAX_DEPLOYS),)),
    Call("GET", "/v1/deploys/{id}", show, "One deploy", role="read", serve="read",
         answer=DeployAnswer),
    Call("GET", "/v1/deploys/{id}/events", follow,
         "A deploy's stream, from the start or after Last-Event-ID", role="read", serve="here",
         streams="deploy",
         query=(Query("stale", "answer from what this node knows", values=("ok",)),)),
    Call("POST", "/v1/deploys/{id}/cancel", cancel, "Roll a running deploy back", role="deploy",
         serve="lead", scoped=True, answer=DeployAnswer, status=202),
    Call("POST", "/v1/services/{name}/restart", restart, "New containers of the live spec",
         role="deploy", serve="lead", scoped=True, answer=Detached, status=202, streams="deploy",
         query=(_DETACH,)),
    Call("POST", "/v1/restart/{name}", restart, "The same as /v1/services/{name}/restart",
         role="deploy", serve="lead", scoped=True, answer=Detached, status=202, streams="deploy",
         query=(_DETACH,)),
    Call("POST", "/v1/services/{name}/rollback", rollback, "Deploy an earlier revision",
         role="deploy", serve="lead", scoped=True, answer=Detached, status=202, streams="deploy",
         body=RollbackBody, query=(_DETACH,)),
    Call("POST", "/v1/services/{name}/scale", scale, "Another number of replicas",
         role="deploy", serve="lead", scoped=True, answer=Detached, status=202, streams="deploy",
         body=ScaleBody, query=(_DETACH,)),
)
