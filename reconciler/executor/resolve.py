"""Tags to digests, before a deploy: only what is new is asked about, many at once.

A tag is asked about when its spec is new or says `pull = "always"`. So a deploy of what is known,
and every way back, needs no registry.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import structlog

from reconciler.errors import MillError
from reconciler.executor.containerd.registry import PullFailed
from reconciler.fsm.records import Secret
from reconciler.fsm.state import State
from reconciler.language.problems import printable
from reconciler.language.spec import ServiceSpec, spec_hash

log = structlog.get_logger("mill.resolve")

Resolve = Callable[[str, str | None], Awaitable[str]]
"""`reconciler.executor.containerd.registry.resolve`: image and credentials to digest."""

Unseal = Callable[[Secret], str]
"""The clear text of a secret's newest version."""

AT_ONCE = 16
"""Questions to registries in flight: one deploy must not look like an attack."""

RESOLVE_S = 30.0
"""For all questions of a deploy together: somebody waits for the first byte of the answer."""


@dataclass(frozen=True, slots=True)
class Unresolved:
    """An image of a service that stands for no digest, and why."""

    service: str
    image: str
    reason: str
    hint: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """The digest of each service's image; `unresolved` are those without one."""

    digests: dict[str, str]
    unresolved: tuple[Unresolved, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Question:
    image: str
    auth_secret: str


@dataclass(slots=True)
class _Answer:
    digest: str = ""
    reason: str = ""
    hint: str = ""
    final: bool = False


@dataclass(slots=True)
class _Round:
    """All questions of one deploy."""

    state: State
    resolve: Resolve
    unseal: Unseal
    gate: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))

    async def ask(self, question: _Question) -> _Answer:
        secret = self.state.secrets.get(question.auth_secret)
        auth = self.unseal(secret) if secret is not None else None
        async with self.gate:
            try:
                return _Answer(digest=await self.resolve(question.image, auth))
            except PullFailed as error:
                return _Answer(reason=printable(error.reason), hint=error.hint, final=error.final)
            except MillError as error:
                return _Answer(reason=printable(error.what), hint=error.hint, final=True)


async def resolve_images(
    specs: Sequence[ServiceSpec], state: State, resolve: Resolve, unseal: Unseal,
    deadline_s: float = RESOLVE_S,
) -> Resolved:
    """The digest of every spec's image, asking registries where the state does not know.

    Where a registry cannot be asked, the digest last used for that image stands in, with a
    warning. Secrets named by `registry_auth` must exist.
    """
    digests: dict[str, str] = {}
    questions: dict[str, _Question] = {}
    for spec in sorted(specs, key=lambda s: s.name):
        known = known_digest(spec, state)
        if known:
            digests[spec.name] = known
        else:
            questions[spec.name] = _Question(spec.image, spec.registry_auth)
    asking = _Round(state, resolve, unseal)
    answers = await _ask_all(asking, list(questions.values()), deadline_s)
    unresolved: list[Unresolved] = []
    warnings: list[str] = []
    last = last_digests(state) if any(not a.digest for a in answers.values()) else {}
    for service, question in questions.items():
        answer = answers[question]
        if answer.digest:
            digests[service] = answer.digest
        elif not answer.final and question.image in last:
            digests[service] = last[question.image]
            warnings.append(f"{question.image} could not be looked up ({answer.reason}): the "
                            f"last known {last[question.image][:19]} is used")
        else:
            unresolved.append(Unresolved(service, question.image, answer.reason, answer.hint))
    return Resolved(digests, tuple(unresolved), tuple(dict.fromkeys(warnings)))


def known_digest(spec: ServiceSpec, state: State) -> str:
    """The digest that needs no asking: written in the image, or pinned by a kept revision of
    the same spec, the live one before all others; "" where the registry must be asked."""
    written = spec.image.partition("@")[2]
    if written:
        return written
    service = state.services.get(spec.name)
    if spec.pull == "always" or service is None:
        return ""
    wanted = spec_hash(spec)
    kept = [revision for revision in service.revisions if revision.spec_hash == wanted]
    best = max(kept, key=lambda r: (r.number == service.live, r.number), default=None)
    return best.digest if best else ""


def last_digests(state: State) -> dict[str, str]:
    """For each image that a kept revision names, the digest that was resolved last."""
    found: dict[str, tuple[int, str, int, str]] = {}
    for name, service in state.services.items():
        for revision in service.revisions:
            spec = state.specs.get(revision.spec_hash)
            if spec is not None:
                seen = (revision.at_ms, name, revision.number, revision.digest)
                found[spec.image] = max(found.get(spec.image, seen), seen)
    return {image: seen[3] for image, seen in found.items()}


async def _ask_all(
    asking: _Round, questions: Sequence[_Question], deadline_s: float
) -> dict[_Question, _Answer]:
    """Every question once, all within `deadline_s`; what is not answered by then counts as a
    registry that cannot be asked."""
    tasks = {question: asyncio.create_task(asking.ask(question))
             for question in dict.fromkeys(questions)}
    if not tasks:
        return {}
    try:
        await asyncio.wait(tasks.values(), timeout=deadline_s)
        late = [question for question, task in tasks.items() if not task.done()]
        if late:
            log.warning("images_not_resolved_in_time", images=[q.image for q in late[:10]],
                        count=len(late))
        return {
            question: task.result() if task.done()
            else _Answer(reason=f"no answer within {deadline_s:g} s", hint="try again")
            for question, task in tasks.items()
        }
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
