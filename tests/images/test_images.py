"""The test images themselves: the same bytes each time, and a server that behaves."""

import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.images import compile as compiling
from tests.images.build import DEMO_NAMES, DEMO_TAGS, publish_demo_images, server_image
from tests.images.registry import PASSWORD, USER, free_port, local_registry

DEADLINE_S = 30.0


@pytest.fixture(scope="module", params=[compiling.with_tcc, compiling.with_gcc])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server, as each of the two compilers makes it."""
    try:
        code = request.param()
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"{request.param.__name__}: {error}")
    path = tmp_path_factory.mktemp("server") / "server"
    path.write_bytes(code)
    path.chmod(0o755)
    return path


@contextmanager
def serving(program: Path, **env: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    port = free_port()
    settings = {"PORT": str(port), "VERSION": "v1", "MILL_SERVICE": "web", "MILL_ALLOC": "web-1"}
    process = subprocess.Popen(
        [program],
        env=settings | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, trust_env=False, timeout=DEADLINE_S) as client:
        try:
            yield process, client
        finally:
            process.kill()
            process.communicate()


def answered(client: httpx.Client) -> httpx.Response:
    """The first answer of a server that has just started."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return client.get("/health")
        except httpx.ConnectError:
            assert time.monotonic() < deadline, "the server does not listen"


def test_it_answers_probes_and_says_who_it_is(program: Path) -> None:
    with serving(program) as (process, client):
        assert answered(client).status_code == 200
        assert client.get("/healthz").status_code == 200
        assert client.get("/any").text == "service=web version=v1 alloc=web-1\n"
        assert client.post("/work", content=b"x" * 20_000).text.startswith("service=web")
        assert client.post("/", content=iter([b"chunk", b"ed"])).status_code == 200
        assert client.head("/").text == ""
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read().count("\n") == 1
        assert process.stderr.read().count("\n") == 1


def test_many_requests_share_one_connection(program: Path) -> None:
    with serving(program) as (_, client):
        answered(client)
        with closing(socket.create_connection((client.base_url.host, client.base_url.port))) as raw:
            raw.settimeout(DEADLINE_S)
            raw.sendall(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n")
            got = b""
            while got.count(b"service=web") < 2:
                got += raw.recv(4096)
    assert got.count(b"HTTP/1.1 200 OK") == 2
    assert b"keep-alive" in got


def test_a_request_in_flight_is_finished_after_term(program: Path) -> None:
    with serving(program) as (process, client):
        answered(client)
        with closing(socket.create_connection((client.base_url.host, client.base_url.port))) as raw:
            raw.settimeout(DEADLINE_S)
            raw.sendall(b"GET /work HTTP/1.1\r\nHost: x\r\n\r\n")
            process.send_signal(signal.SIGTERM)
            answer = raw.recv(4096)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert process.wait(DEADLINE_S) == 0


def test_it_fails_waits_and_ends_as_its_settings_say(program: Path) -> None:
    with serving(program, FAIL_HEALTH="1", LOG_LINES="4") as (process, client):
        assert answered(client).status_code == 500
        assert client.get("/").status_code == 200
        process.kill()
        out, err = process.communicate()
        assert [line for line in out.splitlines() if "line" in line] == ["line 1", "line 3"]
        assert [line for line in err.splitlines() if "line" in line] == ["line 2", "line 4"]
    with serving(program, EXIT_AFTER_MS="1", EXIT_CODE="7") as (process, _):
        assert process.wait(DEADLINE_S) == 7
    with serving(program, READY_AFTER_MS="300000") as (process, client):
        assert process.stdout is not None
        assert "serving" in process.stdout.readline()
        with pytest.raises(httpx.ConnectError):
            client.get("/health")


def test_its_other_modes_exit_as_told(program: Path, tmp_path: Path) -> None:
    assert subprocess.run([program, "exit", "9"], check=False).returncode == 9
    file = tmp_path / "file"
    file.write_text("text")
    read = subprocess.run([program, "read", file], check=True, capture_output=True)
    assert read.stdout == b"text"
    with serving(program, FAIL_HEALTH="1") as (_, client):
        answered(client)
        port = str(client.base_url.port)
        codes = [
            subprocess.run([program, "get", port, path], check=False).returncode
            for path in ("/", "/health")
        ]
    assert codes == [0, 1]


def test_images_are_the_same_bytes_each_time_and_share_their_base() -> None:
    one, again, other = server_image("v1"), server_image("v1"), server_image("v2")
    assert one == again
    assert one.digest != other.digest
    assert len(one.blobs.keys() & other.blobs.keys()) == 1


def test_the_demos_images_are_published_by_tag(tmp_path: Path) -> None:
    with local_registry(tmp_path) as url:
        published = publish_demo_images(url)
        assert published == publish_demo_images(url)
        assert set(published) == {f"{name}:{tag}" for name in DEMO_NAMES for tag in DEMO_TAGS}
        assert len(set(published.values())) == len(published)
        for name_and_tag, digest in published.items():
            name, tag = name_and_tag.split(":")
            headers = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
            found = httpx.head(f"{url}/v2/{name}/manifests/{tag}", headers=headers, trust_env=False)
            assert found.headers["Docker-Content-Digest"] == digest
    with pytest.raises(httpx.ConnectError):
        httpx.get(url, trust_env=False)


def test_a_registry_behind_a_password_takes_only_that(tmp_path: Path) -> None:
    with local_registry(tmp_path, password=True) as url:
        assert httpx.get(f"{url}/v2/", trust_env=False).status_code == 401
        right = httpx.get(f"{url}/v2/", auth=(USER, PASSWORD), trust_env=False)
        assert right.status_code == 200
