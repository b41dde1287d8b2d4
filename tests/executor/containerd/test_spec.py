"""From what the agent asks for to what runc is told."""

import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reconciler.errors import Unprocessable
from reconciler.executor.containerd.generated.types_pb2 import Mount
from reconciler.executor.containerd.image_user import find_user
from reconciler.executor.containerd.pull import ImageConfig, PulledImage
from reconciler.executor.containerd.signals import read_signal
from reconciler.executor.containerd.snapshot import chain_ids
from reconciler.executor.containerd.spec import (
    ContainerSpec,
    User,
    process_args,
    process_env,
    runtime_spec,
)

IMAGE = ImageConfig(entrypoint=("/entry",), cmd=("a", "b"), env=("A=image", "PATH=/own"))


def spec_with(**changes: object) -> ContainerSpec:
    image = PulledImage(
        name="r/web", digest="sha256:0", config=IMAGE, chain_id="", size_bytes=0, cached=True
    )
    settings: dict[str, object] = {
        "id": "web-1", "image": image, "cgroup": "/mill/web-1", "stdout": "", "stderr": "",
    }  # fmt: skip
    return ContainerSpec(**(settings | changes))  # type: ignore[arg-type]  # names of its fields


@pytest.mark.parametrize(
    ("entrypoint", "command", "args"),
    [
        (None, None, ("/entry", "a", "b")),
        (None, ("c",), ("/entry", "c")),
        (None, (), ("/entry",)),
        (("/mine",), None, ("/mine",)),
        (("/mine", "x"), ("c",), ("/mine", "x", "c")),
        ((), ("c",), ("c",)),
    ],
)
def test_command_replaces_cmd_and_entrypoint_replaces_both(
    entrypoint: tuple[str, ...] | None, command: tuple[str, ...] | None, args: tuple[str, ...]
) -> None:
    assert process_args(IMAGE, entrypoint, command) == args


def test_an_image_that_names_nothing_to_run_is_refused() -> None:
    with pytest.raises(Unprocessable, match="nothing to run"):
        process_args(ImageConfig(), None, None)


def test_our_environment_wins_and_there_is_always_a_path() -> None:
    assert process_env(IMAGE, ("A=ours", "B=")) == ("PATH=/own", "A=ours", "B=")
    (path,) = process_env(ImageConfig(), ())
    assert path.startswith("PATH=/usr/local/sbin:")


@given(st.lists(st.tuples(st.sampled_from("ABCD"), st.text(max_size=5))))
def test_each_variable_is_there_once_with_its_last_value(pairs: list[tuple[str, str]]) -> None:
    env = process_env(ImageConfig(), tuple(f"{name}={value}" for name, value in pairs))
    found = dict(pair.split("=", 1) for pair in env)
    assert len(found) == len(env)
    assert {name: found[name] for name in dict(pairs)} == dict(pairs)


@given(st.integers(1, 1_000_000), st.integers(1 << 22, 1 << 50))
def test_ceilings_are_the_fractions_asked_for(cpu_milli: int, memory_bytes: int) -> None:
    spec = spec_with(cpu_milli=cpu_milli, memory_bytes=memory_bytes)
    resources = runtime_spec(spec, User(), cgroup_v2=True)["linux"]["resources"]
    cpu, memory = resources["cpu"], resources["memory"]
    assert memory == {"limit": memory_bytes, "swap": memory_bytes}
    assert cpu["quota"] >= 1000
    assert cpu["shares"] >= 2
    assert cpu["quota"] / cpu["period"] == max(cpu_milli / 1000, 0.01)
    assert resources["pids"]["limit"] > 0


def test_no_ceiling_is_written_where_none_is_asked_for() -> None:
    resources = runtime_spec(spec_with(), User(), cgroup_v2=False)["linux"]["resources"]
    assert "cpu" not in resources
    assert "memory" not in resources


def test_a_network_namespace_is_joined_and_otherwise_new() -> None:
    joined = runtime_spec(spec_with(netns="/run/netns/x"), User(), cgroup_v2=False)["linux"]
    assert {"type": "network", "path": "/run/netns/x"} in joined["namespaces"]
    fresh = runtime_spec(spec_with(), User(), cgroup_v2=False)["linux"]
    assert {"type": "network"} in fresh["namespaces"]
    assert "sysctl" not in fresh


def test_only_cgroup_v2_hosts_get_a_cgroup_namespace() -> None:
    def kinds(version: int) -> list[str]:
        linux = runtime_spec(spec_with(), User(), cgroup_v2=version == 2)["linux"]
        return [namespace["type"] for namespace in linux["namespaces"]]

    assert "cgroup" in kinds(2)
    assert "cgroup" not in kinds(1)


def test_other_users_than_root_hold_no_capability() -> None:
    root = runtime_spec(spec_with(), User(), cgroup_v2=False)["process"]["capabilities"]
    other = runtime_spec(spec_with(), User(uid=7), cgroup_v2=False)["process"]["capabilities"]
    assert root["effective"] == root["bounding"]
    assert "CAP_SYS_ADMIN" not in root["bounding"]
    assert other["effective"] == []


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("", signal.SIGTERM),
        ("SIGQUIT", signal.SIGQUIT),
        ("int", signal.SIGINT),
        ("3", signal.SIGQUIT),
        ("SIGNONE", signal.SIGTERM),
        ("999", signal.SIGTERM),
    ],
)
def test_an_images_stop_signal_is_read_as_written(name: str, number: signal.Signals) -> None:
    assert read_signal(name) == number


@pytest.fixture
def layers(tmp_path: Path) -> list[Mount]:
    """An overlay of three: an empty top, a layer that changes passwd, the base."""
    for name in ("upper", "middle", "base"):
        (tmp_path / name / "etc").mkdir(parents=True)
    (tmp_path / "base/etc/passwd").write_text("old:x:9:9::/:\n")
    (tmp_path / "base/etc/group").write_text("wheel:x:10:root,app\nbad\napp:x:1000:\n")
    (tmp_path / "middle/etc/passwd").write_text(
        "bad line\nroot:x:0:0\napp:x:1000:1001::/:/bin/sh\n"
    )
    lower = f"lowerdir={tmp_path / 'middle'}:{tmp_path / 'base'}"
    options = ["index=off", f"workdir={tmp_path}/work", f"upperdir={tmp_path / 'upper'}", lower]
    return [Mount(type="overlay", source="overlay", options=options)]


@pytest.mark.parametrize(
    ("text", "user"),
    [
        ("", User()),
        ("root", User()),
        ("1234:5678", User(1234, 5678)),
        ("1234", User(1234, 0)),
        ("1000", User(1000, 1001, (10,))),
        ("app", User(1000, 1001, (10,))),
        ("app:wheel", User(1000, 10)),
        ("app:77", User(1000, 77)),
        ("55:app", User(55, 1000)),
    ],
)
def test_users_are_looked_up_in_the_images_own_files(
    layers: list[Mount], text: str, user: User
) -> None:
    assert find_user(text, layers) == user


@pytest.mark.parametrize("text", ["old", "nobody", "app:none", "99999999999", "-1", "1000:-1"])
def test_a_user_that_is_not_there_is_told(layers: list[Mount], text: str) -> None:
    with pytest.raises(Unprocessable, match=r"the image has no|highest id"):
        find_user(text, layers)


def test_links_in_an_image_do_not_lead_out_of_it(layers: list[Mount], tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "passwd").write_text("stolen:x:1:1::/:\n")
    (tmp_path / "upper/etc/passwd").symlink_to(outside / "passwd")
    with pytest.raises(Unprocessable):
        find_user("stolen", layers)
    (tmp_path / "upper/etc/passwd").unlink()
    (tmp_path / "upper/etc").rmdir()
    (tmp_path / "upper/etc").symlink_to(outside)
    with pytest.raises(Unprocessable):
        find_user("stolen", layers)


def test_chain_ids_are_those_of_the_specification() -> None:
    a, b = "sha256:" + "a" * 64, "sha256:" + "b" * 64
    assert chain_ids([]) == []
    assert chain_ids([a]) == [a]
    # printf 'sha256:aa..aa sha256:bb..bb' | sha256sum
    assert chain_ids([a, b]) == [
        a, "sha256:ccd722928bd92476ba1745586fed6e45a102504185ad88cd89e01ff116fd146c",
    ]  # fmt: skip
