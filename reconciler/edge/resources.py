"""The table → what Envoy is to have, object by object; unchanged objects are not built again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import Any

from google.protobuf import any_pb2

from reconciler.edge.certificates import Identity
from reconciler.edge.delta import CDS, EDS, LDS, RDS, SDS, Packed, Resources
from reconciler.edge.listeners import (
    DEFAULT_CERTIFICATE,
    Ingress,
    ingress_listeners,
    secret,
    vip_listener,
    vip_name,
)
from reconciler.edge.routing import INGRESS, route_configuration, virtual_host
from reconciler.edge.table import EdgeTable, VirtualAddress
from reconciler.edge.upstreams import cluster, load_assignment


class ResourceBuilder:
    """Builds resources for one node's Envoy, and keeps what the last table needed.

    Without that, 5000 hosts cost most of a second a change, on the node's own loop.
    """

    def __init__(self, ingress: Ingress, certificate: Identity | None = None) -> None:
        self._ingress = ingress_listeners(ingress)
        self._exclusive = bool(ingress.netns_path)
        self._certificate = certificate
        self._last: dict[Hashable, Any] = {}
        self._next: dict[Hashable, Any] = {}

    @property
    def certificate(self) -> Identity | None:
        """What the https listener serves; set it to have it rotated with the next build."""
        return self._certificate

    @certificate.setter
    def certificate(self, identity: Identity) -> None:
        self._certificate = identity

    def build(self, table: EdgeTable) -> Resources:
        """All resources of a table, in a set that is not changed afterwards."""
        self._next = {}
        resources: dict[str, dict[str, Packed]] = {
            SDS: {},
            CDS: {c.service: self._packed(CDS, c.service, cluster) for c in table.clusters},
            EDS: {c.service: self._packed(EDS, c, load_assignment) for c in table.clusters},
            LDS: self._listeners(table),
            RDS: {},
        }
        if {"http", "https"} & resources[LDS].keys():
            resources[RDS][INGRESS] = self._packed(RDS, table.hosts, self._routes)
        if self._certificate is not None and "https" in resources[LDS]:
            resources[SDS][DEFAULT_CERTIFICATE] = self._packed(SDS, self._certificate, _secret)
        self._last = self._next
        return resources

    def _listeners(self, table: EdgeTable) -> dict[str, Packed]:
        """The ingress, https only once there is a certificate, and the virtual addresses."""
        listeners = {
            name: self._packed(LDS, name, self._ingress.__getitem__)
            for name in self._ingress
            if name != "https" or self._certificate is not None
        }
        for address in table.addresses:
            listeners[vip_name(address)] = self._packed(LDS, address, self._vip_listener)
        return listeners

    def _vip_listener(self, address: VirtualAddress) -> Any:
        return vip_listener(address, exclusive=self._exclusive)

    def _routes(self, hosts: Any) -> Any:
        return route_configuration(self._kept(("host", host), virtual_host, host) for host in hosts)

    def _packed(self, kind: str, key: Hashable, make: Callable[[Any], Any]) -> Packed:
        packed: Packed = self._kept((kind, key), lambda k: _pack(kind, make(k)), key)
        return packed

    def _kept(self, key: Hashable, make: Callable[[Any], Any], argument: Any) -> Any:
        value = self._next.get(key)
        if value is None:
            value = self._last.get(key)
        if value is None:
            value = make(argument)
        self._next[key] = value
        return value


def _secret(identity: Identity) -> Any:
    return secret(DEFAULT_CERTIFICATE, identity)


def _pack(kind: str, message: Any) -> Packed:
    raw = message.SerializeToString(deterministic=True)
    version = hashlib.blake2b(raw, digest_size=8).hexdigest()
    return Packed(version, any_pb2.Any(type_url=kind, value=raw))
