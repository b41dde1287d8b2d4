"""Where Envoy listens: the node's ingress (http, https) and the services' virtual addresses."""

from __future__ import annotations

from typing import Any

import msgspec
from envoy.config.listener.v3 import listener_pb2
from envoy.extensions.filters.http.router.v3 import router_pb2
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2,
)
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2, tls_pb2
from google.protobuf import json_format

from reconciler.edge.certificates import Identity
from reconciler.edge.routing import INGRESS
from reconciler.edge.table import VirtualAddress
from reconciler.edge.upstreams import ADS, UNLIMITED

NAMED = (router_pb2, http_connection_manager_pb2, tcp_proxy_pb2, tls_pb2)
"""Types that the dictionaries below name in `@type`: found only once they are loaded."""

DEFAULT_CERTIFICATE = "default"
"""The secret that the https listener serves to whoever comes."""

STREAM_IDLE = "300s"
"""No byte either way for so long ends a request; websockets have their own, longer time."""

_EXTENSIONS = "type.googleapis.com/envoy.extensions."
_FILTERS = _EXTENSIONS + "filters."


class Ingress(msgspec.Struct, frozen=True):
    """Where a node takes traffic from outside. Port 0: no such listener.

    `netns_path` is a file of the network namespace to listen in, where it is not Envoy's own.
    """

    address: str
    http_port: int
    https_port: int = 0
    netns_path: str = ""


def ingress_listeners(ingress: Ingress) -> dict[str, Any]:
    """The Listeners of the ingress, by name."""
    listeners = {}
    if ingress.http_port:
        listeners["http"] = _ingress("http", ingress, ingress.http_port, {})
    if ingress.https_port:
        listeners["https"] = _ingress("https", ingress, ingress.https_port, _TLS)
    return listeners


def vip_name(address: VirtualAddress) -> str:
    """The name of a virtual address' listener. It is the address: a service that moves to
    another port gets a new listener, and nothing is ever bound twice."""
    return f"vip/{address.ip}:{address.port}"


def vip_listener(address: VirtualAddress, *, exclusive: bool) -> Any:
    """The Listener of a service's virtual address: plain TCP to its endpoints.

    No idle limit, since a database's connection may rest for hours; keepalive finds dead ones.
    """
    proxy = {
        "@type": _FILTERS + "network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "vip",
        "cluster": address.service,
        "max_connect_attempts": 4,
        "idle_timeout": "0s",
    }
    return _listener(
        vip_name(address), {"address": address.ip, "port_value": address.port},
        {"filters": [{"name": "tcp", "typed_config": proxy}]}, exclusive=exclusive,
    )


def secret(name: str, identity: Identity) -> Any:
    """The Secret with which a listener proves who it is."""
    message = secret_pb2.Secret(name=name)
    message.tls_certificate.certificate_chain.inline_bytes = identity.cert_pem
    message.tls_certificate.private_key.inline_bytes = identity.key_pem
    return message


_TLS: dict[str, Any] = {
    "transport_socket": {
        "name": "tls",
        "typed_config": {
            "@type": _EXTENSIONS + "transport_sockets.tls.v3.DownstreamTlsContext",
            "common_tls_context": {
                "alpn_protocols": ["h2", "http/1.1"],
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                "tls_certificate_sds_secret_configs": [
                    {"name": DEFAULT_CERTIFICATE, "sds_config": ADS}
                ],
            },
        },
    }
}

_ROUTER = {"@type": _FILTERS + "http.router.v3.Router", "suppress_envoy_headers": True}

_HTTP: dict[str, Any] = {
    "@type": _FILTERS + "network.http_connection_manager.v3.HttpConnectionManager",
    "codec_type": "AUTO",
    "rds": {"config_source": ADS, "route_config_name": INGRESS},
    # The peer's address is the client's: X-Forwarded-Proto and X-Request-ID from outside are
    # replaced, X-Forwarded-For is appended to.
    "use_remote_address": True,
    "normalize_path": True,
    "merge_slashes": True,
    "path_with_escaped_slashes_action": "UNESCAPE_AND_REDIRECT",
    "server_header_transformation": "PASS_THROUGH",
    "stream_idle_timeout": STREAM_IDLE,
    "request_headers_timeout": "30s",
    "common_http_protocol_options": {"idle_timeout": STREAM_IDLE},
    "http2_protocol_options": {"max_concurrent_streams": 256},
    "http_filters": [{"name": "envoy.filters.http.router", "typed_config": _ROUTER}],
}


def _ingress(name: str, ingress: Ingress, port: int, transport: dict[str, Any]) -> Any:
    address: dict[str, Any] = {"address": ingress.address, "port_value": port}
    if ingress.netns_path:
        address["network_namespace_filepath"] = ingress.netns_path
    manager = {"name": "http", "typed_config": {**_HTTP, "stat_prefix": name}}
    return _listener(
        name, address, {"filters": [manager], **transport}, exclusive=bool(ingress.netns_path)
    )


def _listener(
    name: str, address: dict[str, Any], chain: dict[str, Any], *, exclusive: bool
) -> Any:
    """`exclusive`: the port is this Envoy's alone. By default a second Envoy may bind the same
    port without an error and take half of its connections; but with 0.0.0.0:80 and VIP:80 in
    one namespace the two can only be bound as shared ports."""
    fields = {
        "name": name,
        "address": {"socket_address": address},
        "enable_reuse_port": not exclusive,
        "filter_chains": [chain],
        "per_connection_buffer_limit_bytes": UNLIMITED,
        "tcp_backlog_size": 4096,
    }
    return json_format.ParseDict(fields, listener_pb2.Listener())
