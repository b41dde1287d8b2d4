"""The file with which an Envoy starts: where its agent is, and its own limits."""

from __future__ import annotations

from typing import Any

XDS_SOCKET = "xds.sock"
ADMIN_SOCKET = "admin.sock"
"""Names in Envoy's working folder: paths of unix sockets end at 107 bytes."""

MAX_CONNECTIONS = 50_000
"""Downstream, of one Envoy; each costs it some 50 KB."""


def bootstrap(node: str) -> dict[str, Any]:
    """What Envoy needs to reach the agent; all else comes from there. It serves nothing until
    the agent has answered, and comes back to an agent that was away within a second."""
    source = {"ads": {}, "resource_api_version": "V3", "initial_fetch_timeout": "0s"}
    http2 = {"connection_keepalive": {"interval": "10s", "timeout": "5s"}}
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    endpoint = {"endpoint": {"address": {"pipe": {"path": XDS_SOCKET}}}}
    back_off = {"retry_back_off": {"base_interval": "0.1s", "max_interval": "0.5s"}}
    return {
        "node": {"id": node, "cluster": "mill"},
        "admin": {"address": {"pipe": {"path": ADMIN_SOCKET, "mode": 0o600}}},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": True,
                "grpc_services": [
                    {"envoy_grpc": {"cluster_name": "xds", "retry_policy": back_off}}
                ],
            },
            "cds_config": source,
            "lds_config": source,
        },
        "static_resources": {
            "clusters": [
                {
                    "name": "xds",
                    "type": "STATIC",
                    "connect_timeout": "1s",
                    "typed_extension_protocol_options": {
                        options: {
                            "@type": f"type.googleapis.com/{options}",
                            "explicit_http_config": {"http2_protocol_options": http2},
                        }
                    },
                    "load_assignment": {
                        "cluster_name": "xds", "endpoints": [{"lb_endpoints": [endpoint]}],
                    },
                }
            ]
        },
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": "type.googleapis.com/envoy.extensions.resource_monitors."
                        "downstream_connections.v3.DownstreamConnectionsConfig",
                        "max_active_downstream_connections": MAX_CONNECTIONS,
                    },
                }
            ]
        },
    }
