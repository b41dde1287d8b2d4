"""The first contact of a machine with its cluster-to-be, checked by what the join token carries."""

from __future__ import annotations

import hashlib
import ssl

import httpx
import msgspec

from reconciler.api.connection import refused
from reconciler.errors import MillError, Unavailable
from reconciler.executor.requests import JoinAnswer, JoinRequest


class WrongCluster(MillError):
    """Who answered there is not who the token names."""

    status = 403


TIMEOUT_S = 20.0
MAX_CA_BYTES = 64 << 10


async def fetch_ca(address: str, fingerprint: str) -> bytes:
    """The CA (PEM) of the cluster at `address` (host:port), if it is the one of `fingerprint`.

    The connection itself is not verified: what it brings is, by its SHA-256.
    """
    async with httpx.AsyncClient(verify=False, timeout=TIMEOUT_S) as client:  # noqa: S501  see above
        answer = await _ask(client, "GET", f"https://{address}/v1/join/ca", address)
    pem = answer.content[:MAX_CA_BYTES]
    try:
        der = ssl.PEM_cert_to_DER_cert(pem.decode("ascii"))
    except ValueError as error:
        raise MillError("what answered there is no mill node", at=address) from error
    if hashlib.sha256(der).hexdigest() != fingerprint:
        raise WrongCluster(
            "the cluster at this address is not the one of the token: its CA is another",
            at=address, hint="check the address; if it is right, somebody stands in between")
    return pem


async def ask_to_join(address: str, ca_pem: bytes, request: JoinRequest) -> JoinAnswer:
    """Hand the request in, over a connection that the CA vouches for."""
    context = ssl.create_default_context(cadata=ca_pem.decode("ascii"))
    async with httpx.AsyncClient(verify=context, timeout=TIMEOUT_S) as client:
        answer = await _ask(client, "POST", f"https://{address}/v1/join", address,
                            msgspec.json.encode(request))
    try:
        return msgspec.json.decode(answer.content, type=JoinAnswer)
    except msgspec.DecodeError as error:
        raise MillError(f"the node's answer cannot be read: {error}", at=address,
                        hint="is it of another version?") from error


async def _ask(
    client: httpx.AsyncClient, method: str, url: str, address: str, body: bytes = b""
) -> httpx.Response:
    try:
        answer = await client.request(
            method, url, content=body, headers={"content-type": "application/json"})
    except (httpx.HTTPError, ssl.SSLError) as error:  # one after the handshake comes as it is
        raise Unavailable(f"no answer from the node: {str(error) or type(error).__name__}",
                          at=address, hint="does its agent run, and is port 4400 reachable from "
                                           "here?") from error
    if answer.is_error:
        raise await refused(answer)
    return answer
