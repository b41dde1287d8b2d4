"""What the kernel tells of containers; of cgroup v2 from stored messages and files alone."""

from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.text_format import Parse

from reconciler.executor.containerd.cgroups import Usage, oom_kills, read_usage, remove_cgroup
from reconciler.executor.containerd.generated import (
    cgroups1_pb2,
    cgroups2_pb2,
    events_pb2,
    task_events_pb2,
)
from reconciler.executor.containerd.watch import Exit, Exited, OutOfMemory, read_event

# As containerd 1.6 packs them on a host of each version, other fields left out.
V1 = """
  pids { current: 3 limit: 4096 }
  cpu { usage { total: 51234567 user: 30000000 } throttling { periods: 9 throttled_time: 7000 } }
  memory { total_inactive_file: 4096 usage { limit: 67108864 usage: 1052672 } }
  memory_oom_control { oom_kill: 2 }
"""
V2 = """
  pids { current: 3 limit: 4096 }
  cpu { usage_usec: 51234 user_usec: 30000 nr_periods: 9 throttled_usec: 7 }
  memory { inactive_file: 4096 usage: 1052672 usage_limit: 67108864 swap_limit: 0 }
  memory_events { max: 40 oom: 2 oom_kill: 2 }
"""
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"
EVENTS = "low 0\nhigh 0\nmax 40\noom 2\noom_kill 2\noom_group_kill 0\n"


def packed(version: int, text: str) -> Any:
    kind = {1: cgroups1_pb2.Metrics, 2: cgroups2_pb2.Metrics}[version]
    value = Parse(text, kind()).SerializeToString()
    return Any(type_url=f"io.containerd.cgroups.v{version}.Metrics", value=value)


def test_both_versions_are_read_in_the_same_units() -> None:
    want = Usage(
        cpu_ns=51_234_567,
        throttled_ns=7_000,
        memory_bytes=1_048_576,
        memory_limit_bytes=64 << 20,
        oom_kills=2,
        pids=3,
    )
    assert read_usage(packed(1, V1)) == want
    two = read_usage(packed(2, V2))
    assert two is not None
    assert two.cpu_ns == 51_234_000
    assert (two.throttled_ns, two.memory_bytes) == (want.throttled_ns, want.memory_bytes)
    assert (two.memory_limit_bytes, two.oom_kills, two.pids) == (64 << 20, 2, 3)


@pytest.mark.parametrize(
    ("version", "text"),
    [
        (1, "memory { usage { limit: 9223372036854771712 } }"),
        (2, "memory { usage_limit: 18446744073709551615 }"),
    ],
)
def test_no_limit_reads_as_none_in_either_versions_words(version: int, text: str) -> None:
    used = read_usage(packed(version, text))
    assert used is not None
    assert used.memory_limit_bytes == 0


def test_metrics_of_another_kind_are_none() -> None:
    assert read_usage(Any(type_url="io.containerd.cgroups.v3.Metrics", value=b"x")) is None


@pytest.mark.parametrize(
    ("path", "text"),
    [("memory/mill/web-1/memory.oom_control", CONTROL), ("mill/web-1/memory.events", EVENTS)],
)
def test_kills_are_counted_from_either_versions_file(tmp_path: Path, path: str, text: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(text)
    assert oom_kills("/mill/web-1", tmp_path) == 2
    assert oom_kills("/mill/web-2", tmp_path) == 0


def test_a_cgroup_goes_with_its_children_in_every_hierarchy_and_nothing_else(
    tmp_path: Path,
) -> None:
    for path in ("mill-a/one/two", "cpu/mill-a/one", "memory/mill-a", "memory/mill-b", "cpu/other"):
        (tmp_path / path).mkdir(parents=True)
    remove_cgroup("/mill-a", tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"cpu", "cpu/other", "memory", "memory/mill-b"}
    with pytest.raises(ValueError, match="root"):
        remove_cgroup("/", tmp_path)


def test_events_are_of_first_processes_only() -> None:
    def envelope(kind: str, value: bytes) -> events_pb2.Envelope:
        return events_pb2.Envelope(event=Any(type_url=f"containerd.events.{kind}", value=value))

    first = task_events_pb2.TaskExit(container_id="web-1", id="web-1", exit_status=3)
    first.exited_at.FromMilliseconds(1_700_000_000_123)
    inner = task_events_pb2.TaskExit(container_id="web-1", id="probe-1", exit_status=3)
    oom = task_events_pb2.TaskOOM(container_id="web-1")
    assert read_event(envelope("TaskExit", first.SerializeToString())) == Exited(
        "web-1", Exit(3, 1_700_000_000_123)
    )
    assert read_event(envelope("TaskExit", inner.SerializeToString())) is None
    assert read_event(envelope("TaskOOM", oom.SerializeToString())) == OutOfMemory("web-1")
    assert read_event(envelope("TaskPaused", b"")) is None
