"""TLS (1.2 and newer) of the API: what a server shows, and what a caller believes."""

from __future__ import annotations

import ssl
from pathlib import Path


def server_context(cert: Path, key: Path) -> ssl.SSLContext:
    """Shows a certificate (PEM files; the chain, if there is one, after it) and asks for none.

    Raises ssl.SSLError or OSError where the files are no pair, or are not there.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(cert, key)
    return context


def show_instead(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """New handshakes are shown these files; connections that stand are not touched.

    Raises as `server_context` does, with the context as it was.
    """
    server_context(cert, key)  # tried apart: a failed load would leave half of the pair behind
    context.load_cert_chain(cert, key)


def client_context(ca: bytes | None) -> ssl.SSLContext:
    """Believes servers with a certificate of this CA (PEM) that names the host; without one,
    nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca is not None:
        context.load_verify_locations(cadata=ca.decode("ascii"))
    return context


def why_unverified(error: BaseException) -> str:
    """What was wrong with the other's TLS, in a few words; "" where that was not it."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return f"its certificate is not accepted: {seen.verify_message}"
        if isinstance(seen, ssl.SSLError):
            return f"no TLS: {seen.reason or 'the handshake failed'}"
        seen = seen.__cause__ or seen.__context__
    return ""
