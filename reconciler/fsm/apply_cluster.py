"""Commands on the cluster itself: its founding, secrets, and what is forgotten."""

from __future__ import annotations

from msgspec.structs import replace

from reconciler.fsm import commands as c
from reconciler.fsm.apply_deploys import collect_specs
from reconciler.fsm.apply_tokens import expired_tokens
from reconciler.fsm.events import Note
from reconciler.fsm.records import ENDED, Secret, SecretVersion, Token
from reconciler.fsm.state import State
from reconciler.fsm.step import Refused, emit, put, without

KEPT_SECRET_VERSIONS = 20
"""Old versions that a rollback may still need; those that a kept revision pins stay anyway."""
KEPT_DEPLOYS = 20
KEPT_EVENTS = 10_000


def init_cluster(state: State, command: c.InitCluster) -> State | Refused:
    """Once only: the cluster's id and its first token."""
    if state.cluster:
        return Refused(f"the cluster {state.cluster} exists already")
    token = Token(id=command.token_id, sha256=command.token_sha256, at_ms=state.time_ms)
    return replace(state, cluster=command.cluster, tokens=put(state.tokens, token.id, token))


def set_secret(state: State, command: c.SetSecret) -> State | Refused:
    """A new version; versions that no kept revision pins are dropped past the bound."""
    old = state.secrets.get(command.name)
    versions = old.versions if old else ()
    number = versions[-1].version + 1 if versions else 1
    pinned = _pinned(state, command.name)
    kept = tuple(
        v for v in versions if v.version in pinned or v.version > number - KEPT_SECRET_VERSIONS
    )
    new = SecretVersion(number, command.nonce, command.sealed, state.time_ms)
    secret = Secret(command.name, (*kept, new))
    state = replace(state, secrets=put(state.secrets, secret.name, secret))
    return emit(state, "", Note(kind="secret_set", subject=command.name))


def delete_secret(state: State, command: c.DeleteSecret) -> State | Refused:
    """Refused while a live revision or the running deploy needs it, naming who does."""
    if command.name not in state.secrets:
        return Refused(f"no secret {command.name}")
    users = secret_users(state, command.name)
    if users:
        return Refused(f"secret {command.name} is used by {', '.join(users)}",
                       "deploy them without it first")
    state = replace(state, secrets=without(state.secrets, command.name))
    return emit(state, "", Note(kind="secret_deleted", subject=command.name))


def secret_users(state: State, name: str) -> list[str]:
    """Services and sources that need the secret now: live, being deployed, or to be fetched."""
    users: set[str] = set()
    for service in state.services.values():
        live = service.revision(service.live)
        if live and any(pin.name == name for pin in live.secrets):
            users.add(service.name)
        spec = state.live_spec(service.name)
        if spec and spec.registry_auth == name:
            users.add(service.name)
    deploy = state.running_deploy()
    for change in deploy.changes if deploy else ():
        if any(pin.name == name for pin in change.secrets):
            users.add(change.service)
    users.update(f"source {s.name}" for s in state.sources.values() if s.secret_ref == name)
    return sorted(users)


def _pinned(state: State, name: str) -> set[int]:
    pinned = {
        pin.version
        for service in state.services.values()
        for revision in service.revisions
        for pin in revision.secrets
        if pin.name == name
    }
    deploy = state.running_deploy()
    for change in deploy.changes if deploy else ():
        pinned.update(pin.version for pin in change.secrets if pin.name == name)
    return pinned


def trim(state: State, command: c.Trim) -> State | Refused:
    """Forget what ended before `before_ms`, tokens too: but the last 20 deploys and 10,000 events
    stay."""
    ended = [
        alloc.id for alloc in state.allocations.values()
        if alloc.status in ENDED and alloc.ended_ms < command.before_ms
    ]
    newest_first = sorted(state.deploys.values(), key=_deploy_number, reverse=True)
    gone = [
        deploy.id for deploy in newest_first[KEPT_DEPLOYS:]
        if deploy.finished and deploy.ended_ms < command.before_ms
    ]
    chunks = list(state.events)
    total = sum(len(chunk) for chunk in chunks)
    while chunks and total - len(chunks[0]) >= KEPT_EVENTS \
            and chunks[0][-1].at_ms < command.before_ms:
        total -= len(chunks.pop(0))
    requests = {
        key: each for key, each in state.requests.items() if each.at_ms >= command.before_ms
    }
    return collect_specs(replace(
        state, requests=requests,
        allocations=without(state.allocations, *ended),
        deploys=without(state.deploys, *gone),
        deploy_events=without(state.deploy_events, *gone),
        events=tuple(chunks),
        tokens=without(state.tokens, *expired_tokens(state, command.before_ms)),
    ))


def _deploy_number(deploy: object) -> int:
    return int(str(getattr(deploy, "id", "d-0")).removeprefix("d-"))
