"""Services as Envoy sees them: clusters (how to talk to them) and their endpoints (where)."""

from __future__ import annotations

from typing import Any

from envoy.config.cluster.v3 import cluster_pb2
from envoy.config.core.v3 import health_check_pb2
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2
from google.protobuf import json_format

from reconciler.edge.table import Cluster

NAMED = (http_protocol_options_pb2,)
"""Types that the dictionary below names in `@type`: found only once they are loaded."""

ADS: dict[str, Any] = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
"""Wait for the agent for as long as it takes: going on with nothing would serve 503."""

CONNECT_TIMEOUT = "0.5s"
"""A node that is gone answers to no SYN. With one ejection this is out of traffic within 2 s."""

UNACKED_TIMEOUT_MS = 1_000
"""TCP_USER_TIMEOUT: a kept connection to a node that is gone ends, where else it would hang for
minutes, as requests have no time limit of their own."""

UPSTREAM_IDLE = "3s"
"""Below the idle time of app servers (2 to 5 s, mostly 5): the side that closes first must be
ours, or a request runs into the closing connection."""

UNLIMITED = 1_000_000
"""Envoy's circuit breakers (1024, and 3 retries) would turn a crash into failed requests."""

_IPPROTO_TCP, _TCP_USER_TIMEOUT = 6, 18
_STATE_PREBIND = "STATE_PREBIND"

_CLUSTER: dict[str, Any] = {
    "type": "EDS",
    "eds_cluster_config": {"eds_config": ADS},
    "connect_timeout": CONNECT_TIMEOUT,
    "lb_policy": "LEAST_REQUEST",
    "common_lb_config": {
        # With most endpoints unhealthy or draining, Envoy would by default use all of them.
        "healthy_panic_threshold": {"value": 0},
        # Envoy documents that it may gather changes of health alone for a second. That was not
        # seen to delay a drain, with or without this; nothing here may depend on it either way.
        "update_merge_window": "0s",
    },
    "circuit_breakers": {
        "thresholds": [
            {
                "max_connections": UNLIMITED,
                "max_pending_requests": UNLIMITED,
                "max_requests": UNLIMITED,
                "retry_budget": {"budget_percent": {"value": 50}, "min_retry_concurrency": 100},
            }
        ]
    },
    # A dead endpoint refuses fastest and so looks least loaded: one failure to connect, or a
    # reset, takes it out for a moment. Answers never do: health is the probes' affair. Up to
    # two of three may be out; the only endpoint of a service never is.
    "outlier_detection": {
        "split_external_local_origin_errors": True,
        "consecutive_local_origin_failure": 1,
        "enforcing_consecutive_local_origin_failure": 100,
        "enforcing_consecutive_5xx": 0,
        "enforcing_consecutive_gateway_failure": 0,
        "enforcing_success_rate": 0,
        "enforcing_local_origin_success_rate": 0,
        "interval": "0.5s",
        "base_ejection_time": "2s",
        "max_ejection_time": "5s",
        "max_ejection_percent": 67,
    },
    "upstream_connection_options": {
        "tcp_keepalive": {"keepalive_probes": 3, "keepalive_time": 5, "keepalive_interval": 1}
    },
    "upstream_bind_config": {
        "socket_options": [
            {
                "description": "TCP_USER_TIMEOUT",
                "level": _IPPROTO_TCP,
                "name": _TCP_USER_TIMEOUT,
                "int_value": UNACKED_TIMEOUT_MS,
                "state": _STATE_PREBIND,
            }
        ]
    },
    "typed_extension_protocol_options": {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/"
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "common_http_protocol_options": {"idle_timeout": UPSTREAM_IDLE},
            "explicit_http_config": {"http_protocol_options": {}},
        }
    },
}

_TEMPLATE = json_format.ParseDict(_CLUSTER, cluster_pb2.Cluster())


def cluster(service: str) -> Any:
    """The Cluster of a service; its endpoints come by EDS."""
    message = cluster_pb2.Cluster()
    message.CopyFrom(_TEMPLATE)
    message.name = service
    return message


def load_assignment(of: Cluster) -> Any:
    """The ClusterLoadAssignment: what serves and what drains, in one message."""
    message = endpoint_pb2.ClusterLoadAssignment(cluster_name=of.service)
    locality = message.endpoints.add()
    locality.load_balancing_weight.value = 1
    for endpoint in of.endpoints:
        host = locality.lb_endpoints.add()
        address = host.endpoint.address.socket_address
        address.address, address.port_value = endpoint.ip, endpoint.port
        host.health_status = (
            health_check_pb2.DRAINING if endpoint.draining else health_check_pb2.HEALTHY
        )
    return message
