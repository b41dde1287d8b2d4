"""Where an API is, as people and records write it, and as a URL: the scheme follows from the host.

The API speaks TLS on every address that is not loopback (contracts: Ports and files).
"""

from __future__ import annotations

import ipaddress


def base_url(address: str) -> str:
    """`http://127.0.0.1:4400` or `https://10.0.0.1:4400` of host:port; one that names its scheme
    stays as it is, without a final slash."""
    if "://" in address:
        return address.rstrip("/")
    scheme = "http" if is_loopback(_host(address)) else "https"
    return f"{scheme}://{address.rstrip('/')}"


def is_loopback(host: str) -> bool:
    """127.0.0.0/8, ::1, localhost: nobody listens in between."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name; what it stands for may change


def _host(address: str) -> str:
    plain = address.partition("/")[0]
    if plain.startswith("["):
        return plain[1:].partition("]")[0]
    # Two colons or more without brackets: an IPv6 address that names no port.
    return plain if plain.count(":") > 1 else plain.partition(":")[0]
