"""Hosts and paths as Envoy sees them: virtual hosts, matches, retries."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from envoy.config.route.v3 import route_components_pb2, route_pb2
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2
from google.protobuf import json_format

from reconciler.edge.table import HostRoutes, PathRoute

NAMED = (previous_hosts_pb2,)
"""Types that the dictionary below names in `@type`: found only once they are loaded."""

INGRESS = "ingress"
"""The name of the one RouteConfiguration, which http and https share."""

WEBSOCKET_IDLE_S = 3600

SAFE_METHODS = "GET|HEAD|OPTIONS"
"""Methods that may be sent twice (RFC 9110, 9.2.1): retried even after they were sent."""

_UNSENT = "connect-failure,refused-stream,reset-before-request"

_RETRY: dict[str, Any] = {
    "retry_on": _UNSENT,
    "num_retries": 4,
    "retry_back_off": {"base_interval": "0.025s", "max_interval": "0.25s"},
    "host_selection_retry_max_attempts": 5,
    "retry_host_predicate": [
        {
            "name": "envoy.retry_host_predicates.previous_hosts",
            "typed_config": {
                "@type": "type.googleapis.com/"
                "envoy.extensions.retry.host.previous_hosts.v3.PreviousHostsPredicate"
            },
        }
    ],
}


_SAFE = json_format.ParseDict(
    {
        "match": {
            "headers": [
                {"name": ":method", "string_match": {"safe_regex": {"regex": SAFE_METHODS}}}
            ]
        },
        "route": {
            "timeout": "0s",
            "retry_policy": {**_RETRY, "retry_on": f"{_UNSENT},reset"},
        },
    },
    route_components_pb2.Route(),
)
_ANY = json_format.ParseDict({"route": {"timeout": "0s"}}, route_components_pb2.Route())
_HOST = json_format.ParseDict({"retry_policy": _RETRY}, route_components_pb2.VirtualHost())


def virtual_host(host: HostRoutes) -> Any:
    """The VirtualHost of a host: two routes a path, as safe methods are retried further.

    No time limit: how long a request may take is the service's affair.
    """
    message = route_components_pb2.VirtualHost()
    message.CopyFrom(_HOST)
    message.name = host.host
    message.domains.append(host.host)
    for path in host.paths:
        for template in (_SAFE, _ANY):
            route = message.routes.add()
            route.CopyFrom(template)
            _fill(route, path)
    return message


def route_configuration(virtual_hosts: Iterable[Any]) -> Any:
    """The RouteConfiguration of the ingress. Routes to clusters that are still on their way are
    taken (503 until they come); a port in `Host` takes no part, and reaches the service."""
    message = route_pb2.RouteConfiguration(name=INGRESS, ignore_port_in_host_matching=True)
    message.validate_clusters.value = False
    message.virtual_hosts.extend(virtual_hosts)
    return message


def _fill(route: Any, path: PathRoute) -> None:
    """Match, cluster, rewrite and upgrade. A prefix `/api` takes `/api` and `/api/…`, not
    `/apix`; stripped, the service sees `/` and `/…` (by a regex: a plain rewrite of the
    prefix to `/` would leave `//…`)."""
    if path.path == "/":
        route.match.prefix = "/"
    else:
        route.match.path_separated_prefix = path.path
    action = route.route
    action.cluster = path.service
    if path.strip_prefix and path.path != "/":
        action.regex_rewrite.pattern.regex = f"^{re.escape(path.path)}/?"
        action.regex_rewrite.substitution = "/"
    if path.websocket:
        action.upgrade_configs.add(upgrade_type="websocket")
        action.idle_timeout.seconds = WEBSOCKET_IDLE_S
