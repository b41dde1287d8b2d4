"""Lines in, files out, lines out again."""

import itertools
import re
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reconciler.executor.agent.logfile import (
    LINE_BYTES,
    NAMES,
    Follower,
    LineSplitter,
    LogFile,
    LogLine,
    decoded,
    tail,
)


def written(folder: Path, lines: list[bytes], stream: bytes = b"stdout") -> None:
    file = LogFile(folder)
    file.append(stream, lines)
    file.close()


def texts(lines: list[LogLine]) -> list[str]:
    return [line.line for line in lines]


@settings(deadline=None)
@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=8))
def test_lines_are_the_same_however_the_bytes_arrive(data: bytes, cuts: list[int]) -> None:
    splitter = LineSplitter()
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    lines = [
        line
        for start, end in itertools.pairwise(bounds)
        for line in splitter.feed(data[start:end])
    ]  # fmt: skip
    whole = data.split(b"\n")
    assert lines + splitter.flush() == (whole if whole[-1] else whole[:-1])
    assert splitter.flush() == []


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "ä", "€", "😀"]), st.integers(1, 40_000)), max_size=4),
    st.integers(1, 70_000),
)
def test_long_lines_are_split_between_characters(runs: list[tuple[str, int]], step: int) -> None:
    text = "".join(char * count for char, count in runs)
    data = text.encode() + b"\n"
    splitter = LineSplitter()
    pieces = [
        piece
        for start in range(0, len(data), step)
        for piece in splitter.feed(data[start : start + step])
    ]
    assert "".join(piece.decode() for piece in pieces) == text
    assert all(len(piece) <= LINE_BYTES for piece in pieces)
    assert len(pieces) <= len(data) // (LINE_BYTES - 3) + 1


def test_bytes_that_are_no_text_are_split_all_the_same() -> None:
    splitter = LineSplitter()
    pieces = splitter.feed(b"\x80" * (LINE_BYTES * 2) + b"\n")
    assert b"".join(pieces) == b"\x80" * (LINE_BYTES * 2)
    assert all(len(piece) <= LINE_BYTES for piece in pieces)


def test_each_line_has_its_own_stamp_in_rfc_3339_utc(tmp_path: Path) -> None:
    written(tmp_path, [b"one", b"two"])
    written(tmp_path, [b"three"], b"stderr")  # opened again: goes on after the last stamp
    lines = tail(tmp_path, 10)
    assert [(line.stream, line.line) for line in lines] == [
        ("stdout", "one"),
        ("stdout", "two"),
        ("stderr", "three"),
    ]
    stamps = [line.ts for line in lines]
    assert stamps == sorted(set(stamps))
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", stamp) for stamp in stamps)
    assert all(datetime.fromisoformat(stamp).tzname() == "UTC" for stamp in stamps)


def test_stamps_stay_in_order_over_the_end_of_a_second(tmp_path: Path) -> None:
    count = 300_000
    for _ in range(4):  # a microsecond each: 1.2 s worth of stamps
        written(tmp_path, [b""] * count)
    lines = tail(tmp_path, 4 * count)
    stamps = [line.ts for line in lines]
    assert stamps == sorted(set(stamps))
    assert len({stamp[:19] for stamp in stamps}) > 1


def test_text_comes_back_as_written_but_for_what_is_no_utf8(tmp_path: Path) -> None:
    written(tmp_path, [b"", b" two  spaces ", b"cr\rlf\x0b\x0c\x85", b"\xff\xfe", "ä€".encode()])
    assert texts(tail(tmp_path, 9)) == [
        "", " two  spaces ", "cr\rlf\x0b\x0c\ufffd", "\ufffd\ufffd", "ä€"
    ]  # fmt: skip


def test_a_log_keeps_three_files_of_bounded_size(tmp_path: Path) -> None:
    file = LogFile(tmp_path, file_bytes=1000)
    for number in range(100):
        file.append(b"stdout", [b"%03d" % number])
    file.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    assert all(path.stat().st_size <= 1000 for path in tmp_path.iterdir())
    kept = texts(tail(tmp_path, 1000))
    assert kept == [f"{number:03}" for number in range(100 - len(kept), 100)]
    assert len(kept) > 2 * (1000 // 40)
    assert texts(tail(tmp_path, 30)) == kept[-30:]


def test_a_line_torn_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    written(tmp_path, [b"one"])
    with (tmp_path / "current").open("ab") as file:
        file.write(b"2026-01-01T00:00:0")
    written(tmp_path, [b"two"])
    assert texts(tail(tmp_path, 10)) == ["one", "two"]


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_garbage_in_a_file_is_never_an_error(garbage: bytes) -> None:
    decoded(garbage)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "current").write_bytes(garbage)
        written(folder, [b"after"])
        assert texts(tail(folder, 100))[-1:] == ["after"]


def test_a_tail_of_no_log_is_empty(tmp_path: Path) -> None:
    assert tail(tmp_path / "none", 5) == []
    assert tail(tmp_path, 0) == []


@settings(max_examples=40, deadline=None)
@given(
    bursts=st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=12),
    file_bytes=st.integers(200, 1500),
)
def test_a_follower_sees_every_line_once_across_rotations(
    bursts: list[tuple[int, bool]], file_bytes: int
) -> None:
    with TemporaryDirectory() as name:
        folder, seen, numbers = Path(name), [], itertools.count()
        file = LogFile(folder, file_bytes)
        follower = Follower(folder, "")
        for size, catch_up in bursts:
            # At most one file's worth between two looks: more than three may rightly be gone.
            burst = [b"%d" % next(numbers) for _ in range(min(size, file_bytes // 40))]
            for line in burst:
                file.append(b"stdout", [line])
            while catch_up or burst:
                lines = follower.read()
                seen += texts(lines)
                if not lines:
                    break
        seen += texts(follower.read())
        follower.close()
        file.close()
        assert seen == [str(number) for number in range(next(numbers))]


def test_a_follower_begins_after_the_line_that_it_is_told(tmp_path: Path) -> None:
    file = LogFile(tmp_path, file_bytes=1000)
    for number in range(60):
        file.append(b"stdout", [b"%d" % number])
    lines = tail(tmp_path, 60)
    for begin in (0, 10, len(lines) - 1):
        follower = Follower(tmp_path, lines[begin].ts)
        seen: list[LogLine] = []
        while more := follower.read():
            seen += more
        follower.close()
        assert seen == lines[begin + 1 :]
    file.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "mill-test", disk], check=True)
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.containers
def test_a_full_disk_costs_lines_and_the_log_says_how_many(small_disk: Path) -> None:
    folder = small_disk / "log"
    folder.mkdir()
    file = LogFile(folder)
    file.append(b"stdout", [b"before"])
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as filling:
        try:
            while filling.write(b"x" * 512):
                pass
        except OSError:
            pass
    for _ in range(5):
        file.append(b"stdout", [b"y" * 3000] * 2)
    ballast.unlink()
    file.append(b"stdout", [b"after"])
    file.close()
    lines = texts(tail(folder, 100))
    told = [line for line in lines if line.startswith("mill: ")]
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert len(told) == 1
    lost = int(told[0].split()[1])
    assert lost > 0
    assert lost + len(lines) - 3 == 10
