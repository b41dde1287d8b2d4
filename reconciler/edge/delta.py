"""The delta xDS protocol with one Envoy, without I/O: requests in, responses out.

Level-triggered: what is *wanted* is compared with what Envoy *holds*, and the difference goes out
in an order that never leaves a name without its object (make before break):

    additions  secrets → clusters → endpoints → listeners → routes     each after the ACKs of
               those before it
    removals   listeners → clusters, once every addition is taken; endpoints, routes and secrets
               are then unsubscribed by Envoy itself

https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#incremental-xds
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from envoy.service.discovery.v3 import discovery_pb2

_PREFIX = "type.googleapis.com/"
CDS = _PREFIX + "envoy.config.cluster.v3.Cluster"
EDS = _PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
LDS = _PREFIX + "envoy.config.listener.v3.Listener"
RDS = _PREFIX + "envoy.config.route.v3.RouteConfiguration"
SDS = _PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret"

ADD_ORDER = (SDS, CDS, EDS, LDS, RDS)
REMOVE_ORDER = (LDS, CDS)


class Packed(NamedTuple):
    """One resource, ready to send: a hash of its bytes, and an `Any` around them."""

    version: str
    body: Any


Resources = Mapping[str, Mapping[str, Packed]]
"""By type URL, then by name. A set is never changed once it was handed over."""


@dataclass
class _Subscription:
    """What Envoy asked for of one type, and what it was sent: name → version."""

    wildcard: bool
    held: dict[str, str]
    unanswered: bool
    names: set[str] = field(default_factory=set)


class _Sent(NamedTuple):
    kind: str
    names: tuple[str, ...]


class DeltaStream:
    """One stream's state. Call `receive` and `want` as things happen, then send `outgoing()`.

    At most one pushed response a type is out at a time, so the answers cannot pile up.
    """

    def __init__(self, wanted: Resources) -> None:
        self._wanted = wanted
        self._subscriptions: dict[str, _Subscription] = {}
        self._pending: dict[str, _Sent] = {}
        self._refused: dict[tuple[str, str], str] = {}
        self._asked: list[_Sent] = []
        self._rewarmed: set[str] = set()
        self._nonces = itertools.count(1)

    def want(self, wanted: Resources) -> None:
        """A newer target. What was refused is tried once more: a port may be free by now."""
        self._wanted = wanted
        for kind, name in self._refused:
            self._subscriptions[kind].held.pop(name, None)
        self._refused.clear()

    @property
    def refusals(self) -> tuple[str, ...]:
        """Envoy's own words on each object that it did not take, sorted, each once."""
        return tuple(sorted(set(self._refused.values())))

    @property
    def settled(self) -> bool:
        """Envoy has answered to everything that is wanted, and nothing is left to send."""
        return (
            not self._pending and not self._asked and self._all_asked()
            and self._next_addition() is None and self._next_removal() is None
        )

    def receive(self, request: Any) -> None:
        """Take in a DeltaDiscoveryRequest: a subscription, an ACK, a NACK, or several in one."""
        kind: str = request.type_url
        if request.response_nonce:
            self._acknowledge(request)
        first = kind not in self._subscriptions
        if first:
            # All clusters and listeners are sent unasked; an Envoy that holds none of them yet
            # waits for an answer, be it an empty one.
            unasked, held = kind in (CDS, LDS), dict(request.initial_resource_versions)
            self._subscriptions[kind] = _Subscription(unasked, held, unasked and not held)
        subscription = self._subscriptions[kind]
        named = [name for name in request.resource_names_subscribe if name != "*"]
        for name in request.resource_names_unsubscribe:
            subscription.names.discard(name)
            subscription.held.pop(name, None)
            self._refused.pop((kind, name), None)
        if named:
            self._subscribe(kind, subscription, named, first=first)

    def outgoing(self) -> list[Any]:
        """The responses that may be sent now, in order."""
        responses = []
        asked, self._asked = self._asked, []
        for question in asked:
            if question.kind == RDS and self._waits_for(EDS):
                self._asked.append(question)
            else:
                responses += self._answer(question)
        addition = self._next_addition()
        if addition is not None:
            out = {sent.kind for sent in self._pending.values()}
            before = ADD_ORDER[: ADD_ORDER.index(addition.kind) + 1]
            return responses if out.intersection(before) else [*responses, *self._add(addition)]
        removal = self._next_removal()
        # On a stream that begins anew, what Envoy holds is known only once it has asked for it.
        if removal is None or self._pending or self._asked or not self._all_asked():
            return responses
        return [*responses, self._response(removal.kind, (), removal.names)]

    def _all_asked(self) -> bool:
        """Envoy has subscribed to all that is wanted. With a refusal that may never be (the
        routes of a listener that was not taken): what was asked for is then all there is."""
        return {CDS, LDS} <= self._subscriptions.keys() and (
            bool(self._refused) or all(
                name in self._subscribed(kind)
                for kind in (SDS, EDS, RDS) for name in self._wanted.get(kind, {})
            )
        )

    def _waits_for(self, kind: str) -> bool:
        """Something of this kind, or of one that goes before it, is not with Envoy yet."""
        before = ADD_ORDER[: ADD_ORDER.index(kind) + 1]
        addition = self._next_addition()
        return (addition is not None and addition.kind in before) or any(
            sent.kind in before for sent in self._pending.values()
        )

    def _subscribed(self, kind: str) -> set[str]:
        subscription = self._subscriptions.get(kind)
        return subscription.names if subscription else set()

    def _acknowledge(self, request: Any) -> None:
        sent = self._pending.pop(request.response_nonce, None)
        if sent is None or not request.HasField("error_detail"):
            return
        for name in sent.names:
            self._refused[sent.kind, name] = request.error_detail.message

    def _subscribe(
        self, kind: str, subscription: _Subscription, named: list[str], *, first: bool
    ) -> None:
        """Names that Envoy lacks are answered ahead of the order, since an object is warming:
        at once, but for routes, whose clusters go first. What it holds already, on a stream that
        begins anew, is brought up to date in order."""
        for name in named:
            again = name in subscription.names
            subscription.names.add(name)
            # Asked for again, or a cluster changed before this type was subscribed to: resend.
            if (again and not first) or (kind == EDS and name in self._rewarmed):
                subscription.held.pop(name, None)
        if kind == EDS:
            self._rewarmed.difference_update(named)
        lacking = tuple(name for name in named if name not in subscription.held)
        if lacking:
            self._asked.append(_Sent(kind, lacking))

    def _answer(self, asked: _Sent) -> list[Any]:
        """What Envoy lacks of what it asked for; unknown names are told as removed, or the
        object that waits for them would wait until its timeout."""
        wanted = self._wanted.get(asked.kind, {})
        held = self._subscriptions[asked.kind].held
        present = tuple(
            name for name in asked.names
            if name in wanted and held.get(name) != wanted[name].version
        )
        absent = tuple(name for name in asked.names if name not in wanted)
        return [self._response(asked.kind, present, absent)] if present or absent else []

    def _next_addition(self) -> _Sent | None:
        for kind in ADD_ORDER:
            subscription = self._subscriptions.get(kind)
            if subscription is None:
                continue
            wanted = self._wanted.get(kind, {})
            names: Iterable[str] = wanted if subscription.wildcard else (
                name for name in sorted(subscription.names) if name in wanted
            )
            new = tuple(
                name for name in names if subscription.held.get(name) != wanted[name].version
            )
            if new or subscription.unanswered:
                return _Sent(kind, new)
        return None

    def _next_removal(self) -> _Sent | None:
        for kind in REMOVE_ORDER:
            subscription = self._subscriptions.get(kind)
            wanted = self._wanted.get(kind, {})
            held = subscription.held if subscription else {}
            gone = tuple(name for name in held if name not in wanted)
            if gone:
                return _Sent(kind, gone)
        return None

    def _add(self, addition: _Sent) -> list[Any]:
        """A changed cluster warms again and Envoy does not ask for its endpoints anew, while
        its ACK comes only when warming has ended: the endpoints go out together with it."""
        held = self._subscriptions[addition.kind].held
        rewarmed = [name for name in addition.names if name in held]
        responses = [self._response(addition.kind, addition.names, ())]
        if addition.kind != CDS or not rewarmed:
            return responses
        endpoints = self._subscriptions.get(EDS)
        if endpoints is None:
            self._rewarmed.update(rewarmed)
            return responses
        wanted = self._wanted.get(EDS, {})
        names = tuple(name for name in rewarmed if name in endpoints.names and name in wanted)
        return [*responses, self._response(EDS, names, ())] if names else responses

    def _response(self, kind: str, present: tuple[str, ...], absent: tuple[str, ...]) -> Any:
        subscription = self._subscriptions[kind]
        subscription.unanswered = False
        wanted = self._wanted.get(kind, {})
        nonce = str(next(self._nonces))
        response = discovery_pb2.DeltaDiscoveryResponse(type_url=kind, nonce=nonce)
        for name in present:
            response.resources.add(
                name=name, version=wanted[name].version, resource=wanted[name].body
            )
            subscription.held[name] = wanted[name].version
        response.removed_resources.extend(absent)
        for name in absent:
            subscription.held.pop(name, None)
        self._pending[nonce] = _Sent(kind, present)
        return response
