"""Names of images: what `docker pull` would understand, and nothing else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.errors import Malformed
from reconciler.executor.containerd.image_ref import ImageRef

DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    ("text", "registry", "repository", "tag", "digest", "url"),
    [
        ("nginx", "docker.io", "library/nginx", "latest", "", "https://registry-1.docker.io"),
        ("team/web:v1", "docker.io", "team/web", "v1", "", "https://registry-1.docker.io"),
        ("docker.io/nginx:1", "docker.io", "library/nginx", "1", "", "https://registry-1.docker.io"),
        ("ghcr.io/a/b/c:x", "ghcr.io", "a/b/c", "x", "", "https://ghcr.io"),
        (f"r.example:5000/web@{DIGEST}", "r.example:5000", "web", "latest", DIGEST, "https://r.example:5000"),
        (f"r.example/web:v2@{DIGEST}", "r.example", "web", "v2", DIGEST, "https://r.example"),
        ("localhost/web", "localhost", "web", "latest", "", "http://localhost"),
        ("localhost:5000/web:v1", "localhost:5000", "web", "v1", "", "http://localhost:5000"),
        ("127.0.0.1:41234/web:v1", "127.0.0.1:41234", "web", "v1", "", "http://127.0.0.1:41234"),
        ("127.9.9.9:1/web", "127.9.9.9:1", "web", "latest", "", "http://127.9.9.9:1"),
        ("[::1]:5000/web", "[::1]:5000", "web", "latest", "", "http://[::1]:5000"),
        ("10.0.0.1:5000/web", "10.0.0.1:5000", "web", "latest", "", "https://10.0.0.1:5000"),
    ],
)  # fmt: skip
def test_names_are_taken_apart_as_docker_does(
    text: str, registry: str, repository: str, tag: str, digest: str, url: str
) -> None:
    ref = ImageRef.parse(text)
    assert (ref.registry, ref.repository, ref.tag, ref.digest) == (
        registry,
        repository,
        tag,
        digest,
    )
    assert ref.base_url == url
    assert ref.name == f"{registry}/{repository}"


@pytest.mark.parametrize(
    "text",
    ["", ":v1", "Web", "web:", "web:-x", "web@sha256:12", "web@", "a//b", "/web", "r.ex/", "a b",
     "web:v1:v2", "r_x.y:z/web", "127.0.0.1.evil@x/web", "http://r.example/web", "../web", "web\n",
     "localhost:99999999/web", "a" * 300],
)  # fmt: skip
def test_what_is_no_name_is_malformed(text: str) -> None:
    with pytest.raises(Malformed) as told:
        ImageRef.parse(text)
    assert told.value.hint


@pytest.mark.parametrize(
    "host", ["127.0.0.1.example.com", "localhost.example.com", "0.0.0.0", "169.254.0.1:80"]
)
def test_a_host_that_only_looks_like_loopback_is_not_spoken_to_in_clear(host: str) -> None:
    assert ImageRef.parse(f"{host}/web").base_url == f"https://{host}"


@given(st.text(max_size=60))
def test_any_text_is_a_name_or_malformed(text: str) -> None:
    try:
        ref = ImageRef.parse(text)
    except Malformed:
        return
    whole = f"{ref.name}:{ref.tag}" + (f"@{ref.digest}" if ref.digest else "")
    assert ImageRef.parse(whole) == ref
