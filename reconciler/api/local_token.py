"""The token of root on a node: made of the cluster's key, which every node has, kept nowhere.

Whoever can read a node's `cluster.key` can open every secret and the CA's key with it, so that this
token gives nothing that was not theirs. With it the CLI works on every node, and a node can take
itself out of its cluster, without a token being handed around.
"""

from __future__ import annotations

import hashlib
import hmac

TOKEN_ID = "node-root"  # noqa: S105  a name, not a password
_PURPOSE = b"mill: the API token of root on a node, 1"


def local_token(cluster_key: bytes) -> str:
    """An admin's bearer token: HMAC-SHA256 (RFC 2104) of a fixed purpose, 64 hex digits."""
    return hmac.new(cluster_key, _PURPOSE, hashlib.sha256).hexdigest()
