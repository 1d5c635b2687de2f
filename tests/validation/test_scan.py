"""The pass over the bytes: the same as numpy and torch say, whatever the type, the shape and the pieces; each byte once."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapterops.errors import UnreadableFile
from adapterops.storage import LazyTensor
from adapterops.storage.source import open_source
from adapterops.storage.tensor import TORCH_NAMES, MemorySource
from adapterops.validation.scan import scan, statistics

FLOATS = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]
INTEGERS = ["I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"]
SHAPES = [(), (1,), (7,), (3, 5), (4, 300), (300, 4), (16, 16), (2, 40, 3, 3), (40, 2, 1, 1), (1200, 3), (3, 20000)]


def _lazy(value: torch.Tensor, dtype: str) -> LazyTensor:
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return LazyTensor("t", dtype, tuple(value.shape), MemorySource(data), 0)


def _random(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    kind = getattr(torch, TORCH_NAMES[dtype])
    generator = torch.Generator().manual_seed(seed)
    if dtype in FLOATS:
        return torch.randn(shape, generator=generator).to(kind)
    low = 0 if dtype.startswith("U") else -100
    return torch.randint(low, 100, shape, generator=generator).to(kind)


def _tops(magnitudes: torch.Tensor, axis: int) -> tuple[float, ...]:
    return tuple(magnitudes.movedim(axis, 0).reshape(magnitudes.shape[axis], -1).amax(dim=1).tolist())


@pytest.mark.parametrize("size", [1 << 13, 1 << 20])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_maxima_are_those_of_the_values(dtype: str, shape: tuple[int, ...], size: int) -> None:
    value = _random(dtype, shape)
    found = statistics(_lazy(value, dtype), size)
    magnitudes = value.double().abs()
    assert found.largest == magnitudes.max().item()
    assert found.zero == (not value.double().any().item())
    assert (found.finite, found.nans, found.infinities) == (True, 0, 0)
    if found.rows is not None:
        assert found.rows == _tops(magnitudes, 0)
    if found.columns is not None:
        assert found.columns == _tops(magnitudes, 1)


@pytest.mark.parametrize(("shape", "looked_at"), [((4, 300), "rows"), ((300, 4), "columns"), ((16, 16, 1, 1), "both")])
def test_the_axis_that_can_be_a_rank_is_looked_at(shape: tuple[int, ...], looked_at: str) -> None:
    found = statistics(_lazy(_random("F16", shape), "F16"))
    assert (found.rows is not None) == (looked_at != "columns")
    assert (found.columns is not None) == (looked_at != "rows")


def test_dead_components_are_told() -> None:
    a, b = _random("BF16", (6, 900)), _random("BF16", (900, 6))
    a[2], b[:, 5] = 0, -0.0
    assert statistics(_lazy(a, "BF16")).dead_rows == (2,)
    assert statistics(_lazy(b, "BF16")).dead_columns == (5,)


def test_rows_that_begin_alike_are_told() -> None:
    a = _random("F32", (5, 400))
    a[3], a[4] = a[1], 0
    a[0, :100] = a[2, :100]
    assert statistics(_lazy(a, "F32")).like_rows == [[1, 3]]


_NONE = [("F64", "nan"), ("F64", "-inf"), ("F32", "nan"), ("F32", "inf"), ("F16", "nan"), ("F16", "-inf"), ("BF16", "nan"),
         ("BF16", "inf"), ("F8_E4M3", "nan"), ("F8_E5M2", "nan"), ("F8_E5M2", "-inf"), ("F8_E4M3FNUZ", "nan"),
         ("F8_E5M2FNUZ", "nan")]  # fmt: skip


@pytest.mark.parametrize("size", [1 << 13, 1 << 20])
@pytest.mark.parametrize("shape", [(50000,), (8, 9000), (9000, 8)])
@pytest.mark.parametrize(("dtype", "what"), _NONE)
def test_what_is_no_number_is_counted_and_placed(dtype: str, what: str, shape: tuple[int, ...], size: int) -> None:
    value = _random(dtype, shape).reshape(-1).float()
    places = [len(value) // 3, len(value) // 2, len(value) - 1]
    value[places] = float(what)
    value = value.to(getattr(torch, TORCH_NAMES[dtype])).reshape(shape)
    found = statistics(_lazy(value, dtype), size)
    assert (found.finite, found.zero, found.first) == (False, False, places[0])
    assert (found.nans, found.infinities) == ((3, 0) if what == "nan" else (0, 3))
    assert found.largest is not None
    assert not math.isfinite(found.largest)


def test_a_negative_nan_is_one() -> None:
    bits = torch.tensor([0x3C00, -1, 0x0001], dtype=torch.int16)
    found = statistics(_lazy(bits, "F16"))
    assert (found.nans, found.first) == (1, 1)


def test_the_ends_of_integers() -> None:
    value = torch.tensor([-(2**63), 2**63 - 1, 0])
    assert statistics(_lazy(value, "I64")).largest == 2.0**63
    assert statistics(_lazy(torch.tensor([-128, 127], dtype=torch.int8), "I8")).largest == 128
    assert statistics(_lazy(torch.tensor([True, False]), "BOOL")).largest == 1


def test_complex_numbers_and_scales() -> None:
    value = torch.tensor([1 + 2j, 3 - 4j, complex(0, math.inf)], dtype=torch.complex64)
    found = statistics(_lazy(value, "C64"))
    assert (found.first, found.infinities) == (2, 1)
    assert statistics(_lazy(value[:2], "C64")).largest == 4
    scales = LazyTensor("t", "F8_E8M0", (2,), MemorySource(bytes([127, 130])), 0)
    assert statistics(scales).largest == 8


def test_types_narrower_than_a_byte_are_zero_or_not() -> None:
    def four(data: bytes) -> LazyTensor:
        return LazyTensor("t", "F4", (2 * len(data),), MemorySource(data), 0)

    assert statistics(four(bytes(40))).zero
    found = statistics(four(bytes(40) + b"\x30"))
    assert (found.zero, found.largest, found.finite) == (False, None, True)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0)])
def test_tensors_without_numbers(shape: tuple[int, ...]) -> None:
    found = statistics(LazyTensor("t", "F16", shape, MemorySource(b""), 0))
    assert (found.zero, found.largest, found.finite) == (True, 0.0, True)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (4, 2), (2, 4), (2, 2), (1, 1), (1, 2, 2, 2)])
def test_few_numbers_are_looked_at_as_many_are(dtype: str, shape: tuple[int, ...]) -> None:
    few = _random(dtype, shape, 3)
    factor = 32 if shape[:1] == (4,) else 1
    many = torch.cat([few] * factor) if factor > 1 else few[..., None].expand(*shape, 64).contiguous()
    one, other = statistics(_lazy(few, dtype)), statistics(_lazy(many, dtype))
    magnitudes = few.double().abs()
    assert one.largest == other.largest == magnitudes.max().item()
    assert one.rows == (_tops(magnitudes, 0) if len(shape) > 1 and shape[0] <= few.numel() // shape[0] else None)
    assert one.columns == (_tops(magnitudes, 1) if len(shape) == 2 and shape[1] <= shape[0] else None)
    assert one.head == _lazy(few, dtype).read()
    assert one.heads == (one.head if one.rows is not None else b"")


def test_the_magnitudes_of_negative_numbers_alone() -> None:
    for dtype in (*FLOATS, "I8", "I16", "I32", "I64"):
        value = (-_random(dtype, (40, 40)).double().abs()).to(getattr(torch, TORCH_NAMES[dtype]))
        found = statistics(_lazy(value, dtype))
        assert found.rows == _tops(value.double().abs(), 0), dtype
        assert found.columns == _tops(value.double().abs(), 1), dtype


class Counting:
    """Zeros that remember which of them were read, and in how many parts."""

    path = "<counted>"

    def __init__(self, size: int) -> None:
        self.read = bytearray(size)
        self.parts = 0

    def readinto(self, start: int, buffer: memoryview) -> None:
        self.parts += 1
        buffer[:] = bytes(len(buffer))
        for at in range(start, start + len(buffer)):
            self.read[at] += 1


def test_each_byte_is_read_once_and_shared_bytes_too() -> None:
    source = Counting(100000)
    shapes: Iterable[tuple[str, tuple[int, ...], int]] = [
        ("a", (4, 3000), 0),
        ("b", (6000, 2), 24000),
        ("c", (26000,), 48000),
    ]
    tensors: dict[str, LazyTensor] = {k: LazyTensor(k, "F16", shape, source, start) for k, shape, start in shapes}
    tensors["d"] = LazyTensor("d", "F16", (4, 3000), source, 0)
    found = scan(tensors)
    assert list(found) == ["a", "b", "c", "d"]
    assert found["d"] is found["a"]
    assert set(source.read) == {1}
    assert source.parts == 1, "neighbours are read together"


def test_tensors_that_share_bytes_or_stand_apart() -> None:
    data = torch.arange(-300.0, 300.0).to(torch.float16).numpy().tobytes()
    source, other = MemorySource(data), MemorySource(data[::-1])
    tensors = {
        "last": LazyTensor("last", "F16", (4, 9), source, 1100),
        "odd": LazyTensor("odd", "F16", (200,), source, 33),
        "bytes": LazyTensor("bytes", "U8", (33,), source, 0),
        "wide": LazyTensor("wide", "F32", (10, 5), source, 0),
        "all": LazyTensor("all", "F16", (20, 30), source, 0),
        "again": LazyTensor("again", "F16", (20, 30), source, 0),
        "other": LazyTensor("other", "F16", (20, 30), other, 0),
        "none": LazyTensor("none", "F16", (0, 4), source, 33),
    }
    found = scan(tensors)
    assert list(found) == list(tensors)
    assert found["again"] is found["all"] is not found["other"]
    assert {key: str(s) for key, s in found.items()} == {key: str(statistics(t)) for key, t in tensors.items()}


class Passing:
    """Infinities that are there only once."""

    path = "<passing>"

    def __init__(self) -> None:
        self.times = 0

    def readinto(self, start: int, buffer: memoryview) -> None:
        buffer[:] = (b"\x00\x7c" if not self.times else bytes(2)) * (len(buffer) // 2)
        self.times += 1


def test_a_file_that_changes_between_two_looks() -> None:
    with pytest.raises(UnreadableFile, match="changed while being read"):
        statistics(LazyTensor("t", "F16", (100,), Passing(), 0))


def test_numpy_does_not_speak_of_nan(recwarn: pytest.WarningsRecorder) -> None:
    signalling = torch.tensor([0x7F80_0001] * 200, dtype=torch.int32)
    assert statistics(_lazy(signalling.reshape(4, 50), "F32")).nans == 200
    assert [str(warning.message) for warning in recwarn] == []


def test_what_ends_too_early_is_said() -> None:
    with pytest.raises(UnreadableFile):
        statistics(LazyTensor("t", "F32", (4,), MemorySource(bytes(8)), 0))


def test_memory_does_not_follow_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    save_file({"a": torch.zeros(64, 1 << 17), "b": torch.zeros(1 << 17, 64), "c": torch.zeros(1 << 23)}, path)
    source = open_source(path)
    scan(source.tensors)  # what numpy keeps for good
    tracemalloc.start()
    found: dict[str, Any] = scan(source.tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(s.zero for s in found.values())
    assert peak < 4 << 20
