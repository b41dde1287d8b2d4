"""What a `deploy` token that is bound to some services may touch: those, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from reconciler.api.calls import Asked
from reconciler.api.problems import Forbidden
from reconciler.errors import NotFound


def must_reach(asked: Asked, services: Iterable[str]) -> None:
    """Forbidden, naming the services that the token's scope leaves out."""
    allowed = scope(asked)
    outside = sorted(set(services) - set(allowed)) if allowed else []
    if outside:
        more = f" and {len(outside) - 3} more" if len(outside) > 3 else ""
        raise Forbidden(f"this token may not touch {', '.join(outside[:3])}{more}",
                        hint=f"it is for {', '.join(allowed)}")


def must_reach_all(asked: Asked, what: str) -> None:
    """Forbidden for every token that is bound to services: `what` goes beyond any of them."""
    allowed = scope(asked)
    if allowed:
        raise Forbidden(f"this token may not {what}", hint=f"it is for {', '.join(allowed)}")


def scope(asked: Asked) -> tuple[str, ...]:
    """The services that the token is bound to; () for all."""
    return asked.token.services if asked.token else ()


def known_service(asked: Asked, name: str) -> str:
    """The name of a service that is there and within the token's scope."""
    must_reach(asked, (name,))
    if name not in asked.state.services:
        raise NotFound(f"no service {name}", hint="list them with: mill services")
    return name
