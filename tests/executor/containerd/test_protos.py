"""Our messages against containerd's own: generated code is current, each number is the wire's."""

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorProto, FileDescriptorSet
from grpc_tools import protoc

from reconciler.executor.containerd import generated, rpc
from reconciler.executor.containerd.rpc import Method

ROOT = Path(__file__).parents[3]
GENERATED = Path(generated.__file__).parent
GO = Path("usr/share/gocode/src")
DEBS = ("golang-github-containerd-containerd-dev", "golang-github-containerd-cgroups-dev")
ORIGINALS = (
    "containerd/api/types/*.proto",
    "containerd/api/types/task/task.proto",
    "containerd/api/events/task.proto",
    "containerd/api/services/[!it]*/v1/*.proto",
    "containerd/api/services/images/v1/*.proto",
    "containerd/api/services/tasks/v1/*.proto",
    "containerd/runtime/v2/runc/options/oci.proto",
    "cgroups/stats/v1/metrics.proto",
    "cgroups/v2/stats/metrics.proto",
)


def ours() -> list[FileDescriptorProto]:
    files = []
    for path in sorted(GENERATED.glob("*_pb2.py")):
        module = importlib.import_module(f"{generated.__name__}.{path.stem}")
        files.append(FileDescriptorProto.FromString(module.DESCRIPTOR.serialized_pb))
    return files


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[FileDescriptorProto]:
    folder = tmp_path_factory.mktemp("debs")
    command = ["apt-get", "download", "-q", *DEBS]
    got = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False)
    if got.returncode:
        pytest.skip(f"apt has no {', '.join(DEBS)}: {got.stderr.decode()[-200:]}")
    for deb in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", deb, folder / "x"], check=True)
    clean, source = folder / "clean", folder / "x" / GO
    names = []
    for pattern in ORIGINALS:
        found = sorted((source / "github.com/containerd").glob(pattern))
        assert found, f"no {pattern} in Debian's packages"
        for path in found:
            name = path.relative_to(source)
            (clean / name).parent.mkdir(parents=True, exist_ok=True)
            (clean / name).write_text(without_go_options(path.read_text()))
            names.append(str(name))
    google = Path(protoc.__file__).parent / "_proto"
    out = folder / "set"
    where = [f"-I{clean}", f"-I{google}"]
    assert protoc.main(["protoc", *where, f"--descriptor_set_out={out}", *names]) == 0
    return list(FileDescriptorSet.FromString(out.read_bytes()).file)


def without_go_options(text: str) -> str:
    """What shapes Go code alone, in no way the wire, and is imported from packages of Go."""
    text = re.sub(r'^\s*import\s+(weak\s+)?"(gogoproto|.*plugin)/.*$', "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*option\s*\(.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\s*\[[^\]]*gogoproto[^\]]*\]", "", text)


def messages(files: list[FileDescriptorProto]) -> dict[str, dict[int, tuple[object, ...]]]:
    """Per message, number to name, type, whether repeated, and the type's own name."""
    return {
        name: {f.number: (f.name, f.type, f.label, f.type_name) for f in message.field}
        for file in files
        for name, message in _nested(f".{file.package}", list(file.message_type))
    }


def enums(files: list[FileDescriptorProto]) -> dict[str, dict[str, int]]:
    return {
        f"{file.package}.{enum.name}": {value.name: value.number for value in enum.value}
        for file in files
        for enum in file.enum_type
    }


def calls(files: list[FileDescriptorProto]) -> dict[str, tuple[str, str, bool, bool]]:
    return {
        f"/{file.package}.{service.name}/{m.name}": (
            m.input_type, m.output_type, m.client_streaming, m.server_streaming,
        )
        for file in files
        for service in file.service
        for m in service.method
    }  # fmt: skip


def _nested(prefix: str, found: list[DescriptorProto]) -> Iterator[tuple[str, DescriptorProto]]:
    for message in found:
        name = f"{prefix}.{message.name}"
        yield name, message
        yield from _nested(name, list(message.nested_type))


def test_generated_code_is_what_the_protos_say(tmp_path: Path) -> None:
    script = ROOT / "protos" / "generate.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, timeout=120)
    made = {path.name: path.read_text() for path in tmp_path.rglob("generated/*") if path.is_file()}
    kept = {path.name: path.read_text() for path in GENERATED.iterdir() if path.is_file()}
    assert made == kept


def test_every_field_is_the_wires(originals: list[FileDescriptorProto]) -> None:
    real = messages(originals)
    wrong = {
        f"{name} field {number}": (field, real.get(name, {}).get(number))
        for name, fields in messages(ours()).items()
        for number, field in fields.items()
        if real.get(name, {}).get(number) != field
    }
    assert wrong == {}


def test_every_enum_is_whole(originals: list[FileDescriptorProto]) -> None:
    real = enums(originals)
    assert {name: real.get(name) for name in enums(ours())} == enums(ours())


def test_every_call_is_the_services(originals: list[FileDescriptorProto]) -> None:
    real = calls(originals)
    assert {path: real.get(path) for path in calls(ours())} == calls(ours())


def test_the_table_of_calls_is_that_of_the_protos() -> None:
    table = {
        method.path: (
            f".{method.ask.DESCRIPTOR.full_name}",
            f".{method.answer.DESCRIPTOR.full_name}",
        )
        for method in vars(rpc).values()
        if isinstance(method, Method)
    }
    assert table == {path: call[:2] for path, call in calls(ours()).items()}


def test_our_messages_load_beside_those_of_other_libraries() -> None:
    """protobuf has one pool for the process: two files of one name, or two of a type, refuse."""
    modules = [f"{generated.__name__}.{path.stem}" for path in sorted(GENERATED.glob("*_pb2.py"))]
    others = ["envoy.service.discovery.v3.ads_pb2", "google.rpc.status_pb2"]
    code = f"import importlib\nfor name in {others + modules}: importlib.import_module(name)"
    ran = subprocess.run([sys.executable, "-c", code], check=False, timeout=120, cwd=ROOT)
    assert ran.returncode == 0
