"""Admission over a real state machine, a real reader and a real registry, as fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import pytest_asyncio

from reconciler.executor.admit import Admission, Admitted, Repeated
from reconciler.executor.containerd.registry import resolve
from reconciler.executor.reading import Reader
from reconciler.executor.requests import DeployRequest
from reconciler.fsm import commands as c
from reconciler.fsm.records import Secret
from reconciler.fsm.seal import seal, unseal
from reconciler.fsm.state import State
from reconciler.language.problems import InvalidManifest
from tests.images.build import File, image, layer, push
from tests.images.registry import local_registry
from tests.plan.cluster import Cluster, three_nodes

KEY = b"k" * 32
PINNED = "registry.example.com/x@sha256:" + "1" * 64


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with local_registry(tmp_path_factory.mktemp("registry")) as url:
        yield url


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader():
    reading = Reader()
    yield reading
    await reading.close()


@dataclass
class Desk:
    """Admission over a cluster; `asked` are the images that a registry was asked about."""

    reader: Reader
    registry: str
    cluster: Cluster
    asked: list[str] = field(default_factory=list)

    @property
    def admission(self) -> Admission:
        async def state() -> State:
            return self.cluster.state

        async def resolving(name: str, auth: str | None) -> str:
            self.asked.append(name)
            return await resolve(name, auth)

        return Admission(state, self.reader, resolving, opened)

    @property
    def host(self) -> str:
        return self.registry.removeprefix("http://")

    def push(self, name: str, content: str, auth: tuple[str, str] | None = None) -> str:
        one = image([layer([File("v", content.encode())])], {})
        return push(self.registry, name, "v1", one, auth)

    def secret(self, name: str, value: str) -> None:
        nonce = f"{self.cluster.state.index:012}".encode()
        self.cluster.do(c.SetSecret(name, nonce, seal(KEY, nonce, name, value)))

    async def admit(self, text: str, **fields: object) -> Admitted | Repeated:
        request = DeployRequest(files={"app.mill": text.encode()}, **fields)  # type: ignore[arg-type]  # keywords of a struct
        return await self.admission.admit(request)

    async def deploy(self, text: str, **fields: object) -> Admitted:
        admitted = await self.admit(text, **fields)
        assert isinstance(admitted, Admitted)
        self.carry_out(admitted)
        return admitted

    def carry_out(self, admitted: Admitted | Repeated) -> str:
        assert isinstance(admitted, Admitted)
        for store in admitted.stores:
            self.cluster.do(store)
        return self.cluster.start(admitted.start)

    async def refused(self, text: str, **fields: object) -> list[tuple[int, int, str]]:
        with pytest.raises(InvalidManifest) as caught:
            await self.admit(text, **fields)
        assert caught.value.status == 422
        return [(p.line, p.column, p.message) for p in caught.value.problems]


def opened(secret: Secret) -> str:
    newest = secret.versions[-1]
    return unseal(KEY, newest.nonce, secret.name, newest.sealed)


@pytest.fixture
def desk(reader: Reader, registry: str) -> Desk:
    return Desk(reader, registry, three_nodes())


def one(name: str = "web", image: str = PINNED, more: str = "") -> str:
    return f'service "{name}" {{\n  image = "{image}"\n  port = 80\n  cpu = 0.1\n{more}\n}}\n'
