"""Generate the Python messages from the .proto files here: `python protos/generate.py [OUT]`.

Each folder beside this file goes to one package of the program (`PACKAGES`). The files are
registered under that package's path, so that no name of ours meets one of another library in
protobuf's process-wide pool. Generated code is committed; a test generates again and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

PROTOS = Path(__file__).resolve().parent
PACKAGES = {
    "containerd": "reconciler/executor/containerd/generated",
    "etcd": "bench/etcd_generated",
}


def generate(out: Path) -> None:
    """Write the messages of all of `PACKAGES` below `out`, the root of a source tree."""
    google = Path(protoc.__file__).parent / "_proto"
    for folder, package in PACKAGES.items():
        (out / package).mkdir(parents=True, exist_ok=True)
        names = [f"{package}/{path.name}" for path in sorted((PROTOS / folder).glob("*.proto"))]
        where = [f"-I{package}={PROTOS / folder}", f"-I{google}"]
        targets = [f"--python_out={out}", f"--pyi_out={out}"]
        if protoc.main(["protoc", *where, *targets, *names]) != 0:
            raise SystemExit(f"error: protoc refused a file of {PROTOS / folder}, see above")
        for stub in (out / package).glob("*.pyi"):
            # protoc writes bare `Mapping`s, which strict mypy refuses.
            stub.write_text("# mypy: ignore-errors\n" + stub.read_text())
        (out / package / "__init__.py").write_text(
            f'"""Messages generated from protos/{folder}: run protos/generate.py."""\n'
        )


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else PROTOS.parent)
