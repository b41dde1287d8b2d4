from __future__ import annotations

import io
import pickle
import re
import zlib
from pathlib import Path

import msgspec
import pysyncobj.journal
import pysyncobj.pickle
import pysyncobj.serializer
import pysyncobj.syncobj
import pysyncobj.tcp_connection
import pytest

from reconciler.log import core, hardening, pinned, wire
from tests.sim.world import NullPoller

METHODS = vars(pysyncobj.syncobj.SyncObj)
FIELDS = frozenset(pysyncobj.syncobj.SyncObj.__init__.__code__.co_names)


def test_another_version_of_pysyncobj_is_refused() -> None:
    with pytest.raises(pinned.Unpinned, match=r"0\.3\.18"):
        pinned.check("0.3.18", METHODS, FIELDS)


@pytest.mark.parametrize("name", [*pinned.OVERRIDDEN, *pinned.CALLED])
def test_a_missing_method_is_refused(name: str) -> None:
    methods = {key: value for key, value in METHODS.items() if key != name}
    with pytest.raises(pinned.Unpinned, match=re.escape(name)):
        pinned.check(pinned.VERSION, methods, FIELDS)


@pytest.mark.parametrize("name", pinned.FIELDS)
def test_a_missing_field_is_refused(name: str) -> None:
    with pytest.raises(pinned.Unpinned, match=re.escape(name)):
        pinned.check(pinned.VERSION, METHODS, FIELDS - {name})


def test_every_private_name_that_the_package_uses_is_checked() -> None:
    folder = Path(hardening.__file__).parent
    used = {
        name
        for file in folder.glob("*.py")
        if file.name != "pinned.py"
        for name in re.findall(r"_SyncObj__\w+", file.read_text())
    }
    assert used <= {*pinned.OVERRIDDEN, *pinned.CALLED, *pinned.FIELDS}
    overriding = {name for name in (*vars(hardening.Raft), *vars(core.Core)) if name in METHODS}
    assert overriding - {"__init__", "__module__", "__doc__"} == set(pinned.OVERRIDDEN)


class Trap:
    """Unpickling it would say so."""

    sprung = False

    def __reduce__(self) -> tuple[object, tuple[()]]:
        return Trap.spring, ()

    @staticmethod
    def spring() -> None:
        Trap.sprung = True


def test_no_pickle_is_loaded_by_what_is_left_of_pysyncobj() -> None:
    frame = pickle.dumps(Trap())
    attempts = [
        lambda: pysyncobj.pickle.loads(frame),
        lambda: pysyncobj.pickle.load(io.BytesIO(frame)),
        lambda: pysyncobj.syncobj.pickle.loads(frame),
        lambda: pysyncobj.tcp_connection.pickle.loads(frame),
        lambda: pysyncobj.serializer.pickle.load(io.BytesIO(frame)),
        lambda: pysyncobj.journal.loads(frame),
    ]
    for attempt in attempts:
        with pytest.raises(pinned.PickleReached):
            attempt()
    # The path by which a peer's first frame was code: it ends in a bare except, so look inside.
    connection_type = pysyncobj.tcp_connection.TcpConnection
    connection = connection_type(NullPoller())
    packed = zlib.compress(frame)
    connection._TcpConnection__readBuffer = len(packed).to_bytes(4, "little") + packed
    assert connection._TcpConnection__processParseMessage() is None
    assert not Trap.sprung


def test_a_pickle_is_no_message() -> None:
    with pytest.raises(msgspec.MsgspecError):
        wire.decode(pickle.dumps(Trap()))
    assert not Trap.sprung
