"""Real repositories made with the git program, and servers for them on loopback."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from reconciler.git.poll import Poller

GIT_ENV = {
    "PATH": os.environ["PATH"], "HOME": "/nonexistent", "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": "/dev/null", "LC_ALL": "C.UTF-8",
    "GIT_AUTHOR_NAME": "Ada", "GIT_AUTHOR_EMAIL": "ada@example.com",
    "GIT_COMMITTER_NAME": "Ada", "GIT_COMMITTER_EMAIL": "ada@example.com",
}


def git(folder: Path, *arguments: str | bytes, text: bytes | None = None) -> str:
    """Run git; its output, stripped."""
    done = subprocess.run(["git", *arguments], cwd=folder, env=GIT_ENV, input=text,
                          capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode(errors="replace").strip()


class Repository:
    """A work tree that is committed to with the git program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        git(folder, "init", "-q", "-b", "main")
        git(folder, "config", "uploadpack.allowFilter", "true")

    def commit(self, files: dict[str, str | bytes | None], message: str = "change") -> str:
        """Write (None: remove) and commit all; the commit."""
        for name, text in files.items():
            path = self.folder / name
            if text is None:
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode() if isinstance(text, str) else text)
        return self.commit_all(message)

    def commit_all(self, message: str = "change") -> str:
        """Commit the work tree as it is; the commit."""
        git(self.folder, "add", "-A")
        git(self.folder, "commit", "-q", "--allow-empty", "-m", message)
        return self.head()

    def commit_tree(self, tree: str) -> str:
        """Make `main` a commit of a tree made by hand."""
        sha = git(self.folder, "commit-tree", "-m", "by hand", tree)
        git(self.folder, "update-ref", "refs/heads/main", sha)
        return sha

    def blob(self, data: bytes) -> str:
        """Store a blob; its id."""
        return git(self.folder, "hash-object", "-w", "--stdin", text=data)

    def tree(self, *rows: tuple[str, str, str, bytes]) -> str:
        """Store a tree of (mode, type, id, name), whatever the names; its id."""
        text = b"".join(f"{mode} {kind} {sha}\t".encode() + name + b"\0"
                        for mode, kind, sha, name in rows)
        return git(self.folder, "mktree", "-z", "--missing", text=text)

    def head(self) -> str:
        """The commit that is checked out."""
        return git(self.folder, "rev-parse", "HEAD")

    @property
    def url(self) -> str:
        """For a source."""
        return f"file://{self.folder}"


def backend(root: Path, request: BaseHTTPRequestHandler, body: bytes) -> bytes:
    """What git's own CGI program answers."""
    path, _, query = request.path.partition("?")
    env = GIT_ENV | {
        "GIT_PROJECT_ROOT": str(root), "GIT_HTTP_EXPORT_ALL": "1", "PATH_INFO": path,
        "QUERY_STRING": query, "REQUEST_METHOD": request.command,
        "CONTENT_TYPE": request.headers.get("Content-Type", ""),
        "CONTENT_LENGTH": str(len(body)),
        "GIT_PROTOCOL": request.headers.get("Git-Protocol", ""),
        "HTTP_CONTENT_ENCODING": request.headers.get("Content-Encoding", ""),
    }
    return subprocess.run(["git", "http-backend"], env=env, input=body,
                          capture_output=True, check=False, timeout=120).stdout


class GitServer:
    """`git http-backend` behind a small HTTP server, as forges run it. Counts its requests.

    While `stalls` is set, a fetch gets one byte every 50 ms, and `stalled` tells that it began.
    """

    def __init__(self, root: Path, user_password: str | None = None) -> None:
        self.requests: list[str] = []
        self.stalls = threading.Event()
        self.stalled = threading.Event()
        self._closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer()

            def log_message(self, *_: object) -> None:
                pass

            def _answer(self) -> None:
                server.requests.append(f"{self.command} {self.path}")
                if user_password is not None:
                    wanted = "Basic " + base64.b64encode(user_password.encode()).decode()
                    if self.headers.get("Authorization") != wanted:
                        self.send_response(401)
                        self.send_header("WWW-Authenticate", 'Basic realm="git"')
                        self.end_headers()
                        return
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if server.stalls.is_set() and b"command=fetch" in body:
                    self._stall()
                    return
                out = backend(root, self, body)
                head, _, content = out.partition(b"\r\n\r\n")
                fields = dict(line.split(": ", 1) for line in head.decode().splitlines())
                self.send_response(int(fields.pop("Status", "200 OK").split()[0]))
                for name, value in fields.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self.wfile.write(content)

            def _stall(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/x-git-upload-pack-result")
                self.end_headers()
                server.stalled.set()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    while not server._closing.wait(0.05):
                        self.wfile.write(b"e")

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()

    def url(self, repository: Repository) -> str:
        """The repository's address, by its folder name."""
        return f"http://127.0.0.1:{self._http.server_port}/{repository.folder.name}"

    def close(self) -> None:
        """Stop serving."""
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class DrippingServer:
    """Answers every request with one byte every 50 ms, without end."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self.connected = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/app.git"

    def _accept(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError):
                connection, _ = self._socket.accept()
                self.connected.set()
                thread = threading.Thread(target=self._drip, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _drip(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n"
                               b"Content-Type: application/x-git-upload-pack-advertisement\r\n\r\n")
            while not self._stop.wait(0.05):
                connection.sendall(b"e")  # four of them announce a line of 61,166 bytes

    def close(self) -> None:
        """Stop dripping."""
        self._stop.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """An empty repository with the branch main."""
    return Repository(tmp_path / "app")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GitServer]:
    """Serves every repository in `tmp_path`."""
    running = GitServer(tmp_path)
    yield running
    running.close()


@pytest.fixture
def dripping() -> Iterator[DrippingServer]:
    """A server that never ends its answer."""
    running = DrippingServer()
    yield running
    running.close()


@pytest.fixture
async def poller() -> AsyncIterator[Poller]:
    """Reads for real, in real children."""
    async with Poller() as running:
        yield running
