"""Numpy archives: what numpy reads of them, lazily, and a clear refusal for everything else."""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapterops.errors import AdapterOpsError, UnreadableFile, UnsafePickle, UnsupportedFormat
from adapterops.storage import open_source
from adapterops.storage.tensor import FileSource

X = np.arange(24, dtype="<f4").reshape(2, 3, 4)
ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "plain": X,
    "half": X.astype("<f2"),
    "double": X.astype("<f8"),
    "bytes": X.astype("u1"),
    "small": X.astype("i1"),
    "short": X.astype("<i2"),
    "unsigned": X.astype("<u8"),
    "truth": X > 3,
    "complex": (X + 1j * X).astype("<c8"),
    "scalar": np.float32(3.5) * np.ones(()),
    "empty": np.zeros((0, 3), "<f4"),
    "fortran": np.asfortranarray(X),
    "transposed": X[0].T,
    "big-endian": X.astype(">f4"),
    "big-endian fortran": np.asfortranarray(X.astype(">f8")),
    "big-endian complex": (X - 2j * X).astype(">c8"),
}


def npy(descr: object = "<f4", shape: object = (2,), fortran: object = False, data: bytes = bytes(8)) -> bytes:
    return versioned(1, repr({"descr": descr, "fortran_order": fortran, "shape": shape}), data)


def versioned(version: int, header: str, data: bytes) -> bytes:
    text = header.encode("utf-8" if version == 3 else "latin-1")
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + data


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def refuse(path: Path, content: bytes, kind: type[AdapterOpsError], *said: str) -> None:
    path.write_bytes(content)
    with pytest.raises(kind) as caught:
        open_source(path)
    assert type(caught.value) is kind
    for words in (str(path), *said):
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes(save: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    save(path, **ARRAYS)
    source = open_source(path)
    expected = np.load(path)
    assert list(source.tensors) == list(ARRAYS)
    for name, tensor in source.tensors.items():
        array = np.ascontiguousarray(expected[name].astype(expected[name].dtype.newbyteorder("<")))
        assert tensor.shape == expected[name].shape, name
        assert bytes(tensor.read()) == array.tobytes(), name
        # In pieces of any size it is the same, and nothing is kept afterwards.
        buffer = bytearray(7)
        assert b"".join(bytes(buffer[:n]) for n in tensor.chunks(buffer)) == array.tobytes(), name
        assert getattr(tensor.source, "_bytes", None) is None
    assert {t.dtype for t in source.tensors.values()} == {
        "F32", "F16", "F64", "U8", "I8", "I16", "U64", "BOOL", "C64",
    }  # fmt: skip


def test_rows_of_a_compressed_array(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", a=X.reshape(6, 4))
    tensor = open_source(tmp_path / "x.npz").tensors["a"].rows([(4, 6), (1, 2)])
    assert bytes(tensor.read()) == X.reshape(6, 4)[[4, 5, 1]].tobytes()


def test_stored_arrays_are_ranges_of_the_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=X, b=X + 1)
    tensors = open_source(tmp_path / "x.npz").tensors
    assert isinstance(tensors["a"].source, FileSource)
    assert tensors["a"].source is tensors["b"].source
    assert tensors["a"].start != tensors["b"].start


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_versions_of_the_array_format(version: tuple[int, int], tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, X, version=version)
    (tmp_path / "x.npz").write_bytes(zipped({"a.npy": buffer.getvalue()}))
    assert np.array_equal(open_source(tmp_path / "x.npz").tensors["a"].numpy(), X)


def test_bfloat16_as_mlx_writes_it(tmp_path: Path) -> None:
    for descr in ("<V2", "|V2"):
        (tmp_path / "x.npz").write_bytes(zipped({"a.npy": npy(descr, (2,), data=b"\x80\x3f\x00\xc0")}))
        source = open_source(tmp_path / "x.npz")
        assert source.tensors["a"].dtype == "BF16"
        assert source.tensors["a"].numpy().tolist() == [1.0, -2.0]
        assert "bfloat16" in source.notes[0]


def test_a_file_that_mlx_wrote(corpus: Path) -> None:
    path = corpus / "files" / "mlx-npz-hungpham" / "adapters.npz"
    source, expected = open_source(path), np.load(path)
    assert set(source.tensors) == set(expected.files)
    for name, tensor in source.tensors.items():
        assert np.array_equal(tensor.numpy(), expected[name])


def test_behind_other_bytes(tmp_path: Path) -> None:
    # Zip allows it (self-extracting archives); the offsets in the list are relative then.
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04" + bytes(96) + zipped({"a.npy": npy(data=X.tobytes()[:8])}))
    assert bytes(open_source(tmp_path / "x.npz").tensors["a"].read()) == X.tobytes()[:8]


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([{"x": 1}], dtype=object))
    refuse(tmp_path / "x.npz", buffer.getvalue(), UnsafePickle, "tensor 'a'", "pickled Python objects")


BAD_ARRAYS: dict[str, tuple[bytes, type[AdapterOpsError], str]] = {
    "a structure": (npy([("x", "<f4")]), UnsupportedFormat, "no plain number"),
    "text": (npy("<U2"), UnsupportedFormat, "no plain number"),
    "long double": (npy("<f16"), UnsupportedFormat, "'s type <f16"),
    "raw bytes": (npy("|V4"), UnsupportedFormat, "|V4"),
    "no order": (npy("|f4"), UnsupportedFormat, "order"),
    "the writer's order": (npy("=f4"), UnsupportedFormat, "order"),
    "no type": (npy(""), UnsupportedFormat, "no plain number"),
    "too short": (npy(shape=(3,)), UnreadableFile, "takes 12 bytes, but the entry has 8"),
    "too long": (npy(shape=(1,)), UnreadableFile, "takes 4 bytes, but the entry has 8"),
    "a negative size": (npy(shape=(-2,)), UnreadableFile, "no shape"),
    "a list as shape": (npy(shape=[2]), UnreadableFile, "no shape"),
    "a bool as size": (npy(shape=(True, 2)), UnreadableFile, "no shape"),
    "too many axes": (npy(shape=(1,) * 65), UnreadableFile, "no shape"),
    "an absurd size": (npy(shape=(2**40, 2**40)), UnreadableFile, "more elements"),
    "no order of axes": (npy(fortran=1), UnreadableFile, "fortran_order"),
    "another field": (versioned(1, "{'descr': '<f4', 'shape': (2,)}", bytes(8)), UnreadableFile, "exactly"),
    "code": (versioned(1, "__import__('os').system('x')", bytes(8)), UnreadableFile, "no Python dictionary"),
    "nested": (versioned(1, "(" * 9000, bytes(8)), UnreadableFile, "no Python dictionary"),
    "unhashable": (versioned(1, "{[]: 1}", bytes(8)), UnreadableFile, "no Python dictionary"),
    "not text": (b"\x93NUMPY\x03\0\x01\0\0\0\xff", UnreadableFile, "no Python dictionary"),
    "a long header": (versioned(2, " " * 10_001, bytes(8)), UnreadableFile, "not accepted"),
    "a cut header": (b"\x93NUMPY\x01\0\xff\0{", UnreadableFile, "inside its header"),
    "another version": (versioned(4, "{}", bytes(8)), UnreadableFile, "version 1, 2 or 3"),
    "no array": (b"hello", UnreadableFile, "is no .npy array"),
    "nothing": (b"", UnreadableFile, "is no .npy array"),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_cannot_be_used(case: str, method: int, tmp_path: Path) -> None:
    content, kind, said = BAD_ARRAYS[case]
    refuse(tmp_path / "x.npz", zipped({"k.npy": content}, method), kind, "tensor 'k'", said)


def test_entries_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    refuse(path, zipped({"readme.txt": b"x"}), UnreadableFile, "'readme.txt' is no .npy array")
    refuse(path, zipped({".npy": npy()}), UnreadableFile, "is no .npy array")
    refuse(path, zipped({"__metadata__.npy": npy()}), UnreadableFile, "reserves")
    refuse(path, zipped({"a.npy": npy()}, zipfile.ZIP_BZIP2), UnreadableFile, "method 12")
    twice = zipped({"a.npy": npy(), "b.npy": npy()}).replace(b"b.npy", b"a.npy")
    refuse(path, twice, UnreadableFile, "two arrays named 'a'")
    good = zipped({"a.npy": npy()})
    at = good.index(b"PK\x01\x02")
    refuse(path, good[: at + 8] + b"\x01\0" + good[at + 10 :], UnreadableFile, "encrypted")
    # A smaller size in the list than at the entry, and an entry of the list that points at nothing.
    refuse(path, good[: at + 20] + b"\x01\0\0\0" + good[at + 24 :], UnreadableFile, "but claims")
    refuse(path, good[: at + 42] + b"\x05\0\0\0" + good[at + 46 :], UnreadableFile, "not where the list")
    refuse(path, good[: at + 42] + b"\xff\xff\xff\x7f" + good[at + 46 :], UnreadableFile, "outside the file")


def test_bombs(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    zeros = npy(shape=(20_000_000,), data=bytes(80_000_000))
    packed = zipped({"a.npy": zeros}, zipfile.ZIP_DEFLATED)
    refuse(path, packed, UnreadableFile, "refused as a bomb")
    # Two entries of the list that share one entry's bytes.
    good = zipped({"a.npy": npy(), "b.npy": npy()})
    second = good.rindex(b"PK\x01\x02")
    refuse(path, good[: second + 42] + bytes(4) + good[second + 46 :], UnreadableFile, "refused as a bomb")
    # An entry that expands to more than it claims is cut there and found wrong.
    lying = bytearray(zipped({"a.npy": npy(data=bytes(4000), shape=(1000,))}, zipfile.ZIP_DEFLATED))
    at = lying.index(b"PK\x01\x02") + 24
    lying[at : at + 4] = struct.pack("<I", 1000)
    refuse(path, bytes(lying), UnreadableFile, "takes 4000 bytes")


def test_a_damaged_compressed_array(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).standard_normal(5000).astype("<f4")
    np.savez_compressed(tmp_path / "x.npz", a=noise)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[-2000] ^= 0xFF
    (tmp_path / "x.npz").write_bytes(content)
    tensor = open_source(tmp_path / "x.npz").tensors["a"]
    with pytest.raises(UnreadableFile, match="tensor 'a'"):
        tensor.read()


def test_damage_gives_a_named_error_or_tensors(tmp_path: Path) -> None:
    dice = random.Random(0)
    path = tmp_path / "x.npz"
    kinds = Counter[str]()
    for turn in range(400):
        buffer = io.BytesIO()
        (np.savez_compressed if turn % 2 else np.savez)(buffer, a=X, b=np.asfortranarray(X))
        content = bytearray(buffer.getvalue())
        if turn % 10 == 0:
            del content[dice.randrange(1, len(content)) :]
        else:
            for _ in range(3):
                content[dice.randrange(len(content))] = dice.randrange(256)
        path.write_bytes(content)
        try:
            for tensor in open_source(path).tensors.values():
                tensor.read()
            kinds["read"] += 1
        except AdapterOpsError as error:
            kinds[type(error).__name__ if str(path) in str(error) else "unnamed"] += 1
    assert kinds["UnreadableFile"] > 50
    assert kinds["read"] > 5
    assert not kinds["unnamed"]


def test_nothing_is_an_archive_without_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz")
    assert not open_source(tmp_path / "x.npz").tensors
    refuse(tmp_path / "y.npz", b"\x93NUMPY" + bytes(40), UnreadableFile, "not a numpy archive")


def test_in_a_folder(tmp_path: Path) -> None:
    np.savez(tmp_path / "adapters.npz", a=X)
    (tmp_path / "adapter_config.json").write_text('{"lora_layers": 4}')
    source = open_source(tmp_path)
    assert list(source.tensors) == ["a"]
    assert source.config == {"lora_layers": 4}
