"""Debian's docker-registry on a free port, anonymous or behind a password."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

USER, PASSWORD = "robot", "pass:word"  # a colon, as only the first one parts the two
_HASHED = "$2b$04$GJPjWAUVex7HJSPmognwLuNbPnMBurC7Wp8rjzAfPv5u81Ozq8HHO"
_READY_S, _STOP_S, _PORT_TRIES = 30.0, 10.0, 5

_CONFIG = """\
version: 0.1
log: {{level: error}}
storage:
  filesystem: {{rootdirectory: {folder}/blobs}}
  delete: {{enabled: true}}
http: {{addr: "127.0.0.1:{port}"}}
"""
_AUTH = "auth: {{htpasswd: {{realm: test, path: {folder}/htpasswd}}}}\n"


@contextlib.contextmanager
def local_registry(folder: Path, *, password: bool = False) -> Iterator[str]:
    """A registry that keeps its images in `folder`; its URL. `password` asks for USER, PASSWORD."""
    folder.mkdir(parents=True, exist_ok=True)
    process, url = _start(folder, password=password)
    try:
        yield url
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP_S)


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _start(folder: Path, *, password: bool) -> tuple[subprocess.Popen[bytes], str]:
    for _ in range(_PORT_TRIES):  # another program may take the port between look and listen
        port = free_port()
        text = _CONFIG + (_AUTH if password else "")
        (folder / "config.yml").write_text(text.format(folder=folder, port=port))
        (folder / "htpasswd").write_text(f"{USER}:{_HASHED}\n")
        with (folder / "registry.log").open("ab") as log:
            command = ["docker-registry", "serve", str(folder / "config.yml")]
            process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        if _answers(process, url):
            return process, url
        process.kill()
        process.wait()
    raise RuntimeError(f"docker-registry does not start: see {folder}/registry.log")


def _answers(process: subprocess.Popen[bytes], url: str) -> bool:
    deadline = time.monotonic() + _READY_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            status = httpx.get(f"{url}/v2/", trust_env=False, timeout=5).status_code
            return status in (httpx.codes.OK, httpx.codes.UNAUTHORIZED)
        time.sleep(0.01)
    return False
