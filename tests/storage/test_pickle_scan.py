"""The static scan of pickles: it tells what would be called, takes what torch.save writes, and runs nothing."""

from __future__ import annotations

import collections
import io
import os
import pickle
import pickletools
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapterops.storage import pickle_scan
from adapterops.storage.pickle_scan import SAFE, Scan, scan, scan_bytes

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Evil:
    """Runs a command."""

    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


class Wrapped:
    """Runs a command in a pickle of its own."""

    def __reduce__(self) -> Any:
        return pickle.loads, (pickle.dumps(Evil(), 4),)


class Stated:
    """Has a state that is set."""

    def __init__(self) -> None:
        self.a = 1


class Named:
    """Is made with a named argument."""

    def __new__(cls, *, a: int = 0) -> Named:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> Any:
        return (), {"a": 1}


def test_every_instruction_is_known() -> None:
    known = {opcode.code.encode("latin-1") for opcode in pickletools.opcodes}
    assert known == {*pickle_scan._TABLE, b"."}


def test_what_torch_allows_is_safe() -> None:
    from torch._weights_only_unpickler import _get_allowed_globals

    assert [name for name in _get_allowed_globals() if not SAFE.fullmatch(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "torch.load",
        "torch.hub.load",
        "torch.storage._load_from_bytes",
        "torch.jit.load",
        "torch.serialization.load",
        "torch._utils._import_dotted_name",
        "collections.namedtuple",
        "torch.nn.modules.linear.Linear",
        "builtins.setattr",
        "torch.floats.x",
        "xtorch.FloatStorage",
    ],
)
def test_what_is_not_safe(name: str) -> None:
    assert not SAFE.fullmatch(name)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_is_told_in_every_protocol(protocol: int) -> None:
    found = scan_bytes(pickle.dumps({"a": [1, 2.5, (None, True)], "b": Evil()}, protocol))
    assert found.imports == ("os.system",)
    assert found.does == "call os.system('exit 1')"
    assert not found.damage


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_pickle_in_a_pickle_is_looked_into(protocol: int) -> None:
    calls = scan_bytes(pickle.dumps(Wrapped(), protocol)).calls
    assert calls[0].startswith("_pickle.loads(<")
    assert calls[1] == "os.system('exit 1') (in a pickle within the pickle)"


@pytest.mark.parametrize(
    ("program", "does"),
    [
        (b"cos\nsystem\n(S'ls'\ntR.", "call os.system('ls')"),
        (b"(S'ls'\nios\nsystem\n.", "call os.system('ls')"),
        (b"(cos\nsystem\nS'ls'\no.", "call os.system('ls')"),
        (b"\x80\x02cos\nsystem\nX\2\0\0\0ls\x85\x81.", "call os.system('ls')"),
        (b"\x80\x04\x8c\2os\x8c\6system\x93\x8c\2ls\x85R.", "call os.system('ls')"),
        (b"\x80\x04\x8c\2os\x94\x8c\6system\x940h\0h\1\x93\x8c\2ls\x85R.", "call os.system('ls')"),
        (b"cposix\nsystem\n(S'ls'\ntR.", "call os.system('ls')"),
        (b"c__builtin__\neval\n(S'1'\ntR.", "call builtins.eval('1')"),
        (b"c__builtin__\ngetattr\n(cos\npath\nS'join'\ntR(S'a'\ntR.", "call builtins.getattr(os.path, 'join')"),
        (b"cos\nsystem\n.", "import os.system"),
        (b"\x82\x01.", "import copyreg.extension_1"),
        (b"\x80\x04}}\x93)R.", "call something whose name is put together while loading()"),
        (
            b"\x80\x04\x8c\2os\x8c\6system\x93" + b"X\xe8\x03\0\0" + b"x" * 1000 + b"\x85R.",
            "call os.system(a long string)",
        ),
    ],
)
def test_programs(program: bytes, does: str) -> None:
    assert scan_bytes(program).does.startswith(does)


def test_a_legacy_file_goes_on_in_any_protocol() -> None:
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    start = buffer.getvalue()[: buffer.getvalue().index(b"}q") - 2]
    assert scan_bytes(start + b"cos\nsystem\n(S'ls'\ntR.").does == "call os.system('ls')"


def test_classes_that_are_made_are_told() -> None:
    here = __name__
    assert scan_bytes(pickle.dumps(Stated(), 2)).does == f"call {here}.Stated()"
    assert scan_bytes(pickle.dumps(Named(), 4)).does == f"call {here}.Named()"


def test_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never_imported.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    assert scan_bytes(b"cnever_imported\nf\n)R.").does == "call never_imported.f()"
    assert "never_imported" not in sys.modules


TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "parameter": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
    "view": torch.ones(4, 4)[::2],
    "sparse": torch.eye(3).to_sparse(),
    "meta": torch.ones(3, device="meta"),
}


@pytest.mark.parametrize(
    "value", [TENSORS, torch.ones(3), {"state_dict": TENSORS, "step": 3}, collections.Counter("aab")]
)
def test_what_torch_saves_is_taken(value: Any) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    assert scan_bytes(buffer.getvalue()) == Scan(pickles=5)
    buffer = io.BytesIO()
    torch.save(value, buffer)
    raw = buffer.getvalue()
    start = raw.index(b"\x80\x02")
    assert scan(io.BytesIO(raw), start, len(raw)) == Scan(pickles=1)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner) | st.frozensets(st.text())
    ),
    max_leaves=30,
)


@settings(max_examples=150, deadline=None)
@given(value=PLAIN, protocol=st.sampled_from(PROTOCOLS))
def test_plain_values_do_nothing(value: Any, protocol: int) -> None:
    found = scan_bytes(pickle.dumps(value, protocol))
    assert not found.damage
    # Byte strings and sets are calls in the protocols that have no instruction for them.
    assert set(found.imports) <= {"builtins.frozenset", "_codecs.encode", "builtins.bytes"}


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_have_an_answer(data: bytes) -> None:
    assert isinstance(scan_bytes(b"\x80\x02" + data), Scan)


def test_cut_short_anywhere() -> None:
    whole = pickle.dumps({"a": [1, "b" * 300, (b"c", 2.0)], "b": collections.OrderedDict(x=1)}, 2)
    assert not scan_bytes(whole).damage
    for length in range(len(whole)):
        assert scan_bytes(whole[:length]).damage, length


def test_a_damaged_pickle_never_hides_a_call_that_python_would_make() -> None:
    """Whatever Python's own unpickler imports of a damaged pickle, the scan has told of."""
    whole = pickle.dumps({"a": Evil(), "b": collections.deque([1])}, 2)
    dice = random.Random(0)
    asked = 0

    class Watching(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            seen.append(f"{module}.{name}")
            raise pickle.UnpicklingError

    for _ in range(2000):
        changed = bytearray(whole)
        for _ in range(dice.randrange(4)):
            changed[dice.randrange(len(changed))] = dice.randrange(256)
        seen: list[str] = []
        try:
            Watching(io.BytesIO(changed)).load()
        except Exception:  # noqa: BLE001  # whatever damaged bytes make of it
            asked += bool(seen)
        if seen:
            found = scan_bytes(bytes(changed))
            assert found.imports or found.bomb or all(SAFE.fullmatch(name) for name in seen), bytes(changed)
    assert asked > 500


@pytest.mark.parametrize(
    "program",
    [
        b"N" * (pickle_scan.MAX_INSTRUCTIONS + 1),
        b"ccollections\nOrderedDict\nq\0" + b"h\0)R" * (pickle_scan.MAX_CALLS + 1),
        b"\x80\x04N" + b"\x94" * (pickle_scan.MAX_MEMO + 1),
        b")" + b"2\x86" * 40,
        b")" + b"\x85" * (pickle_scan.MAX_DEPTH + 1),
        b"c__builtin__\nbytearray\nJ\0\0\0\x7f\x85R",
        b"c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R",
        b"c__builtin__\nbytearray\nI999999999999\n\x85R",
    ],
)
def test_bombs(program: bytes) -> None:
    assert scan_bytes(program + b".").bomb


def test_a_byte_array_of_bytes_is_none() -> None:
    for protocol in PROTOCOLS:
        assert scan_bytes(pickle.dumps({"a": bytearray(b"\x80abc" * 100)}, protocol)) == Scan(pickles=1)


def test_lengths_beyond_the_file_are_not_read() -> None:
    for code, form in ((b"X", 4), (b"B", 4), (b"T", 4), (b"\x8b", 4), (b"\x8d", 8), (b"\x8e", 8), (b"\x96", 8)):
        for length in (b"\xff" * (form - 1) + b"\x7f", b"\xff" * form):
            found = scan_bytes(b"\x80\x04" + code + length + b"abc")
            assert "cut short" in found.damage
