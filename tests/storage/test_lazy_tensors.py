"""Lazy tensors: read in pieces, under another shape, in another type."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import storage_files as files
import torch

from adapterops.errors import CannotRepresent, UnreadableFile
from adapterops.storage import LazyTensor, open_source, scalar
from adapterops.storage.tensor import CHUNK, TORCH_NAMES, ByteSource, FileSource, MemorySource, fill


def tensor(values: torch.Tensor, name: str) -> LazyTensor:
    kept = values.to(getattr(torch, TORCH_NAMES[name])).contiguous()
    data = kept.reshape(-1).view(torch.uint8).numpy().tobytes()
    return LazyTensor("a", name, tuple(values.shape), MemorySource(b"##" + data), 2)


VALUES = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("size", [1, 3, 100, 1000])
def test_chunks_are_the_bytes(size: int) -> None:
    lazy = tensor(VALUES, "F32")
    buffer = bytearray(size)
    parts = [bytes(buffer[:length]) for length in lazy.chunks(buffer)]
    assert b"".join(parts) == bytes(lazy.read()) == VALUES.numpy().tobytes()
    assert [len(p) for p in parts[:-1]] == [size] * (len(parts) - 1)


def test_empty_tensors_have_no_chunks() -> None:
    lazy = LazyTensor("a", "F32", (0, 3), MemorySource(b""), 0)
    assert list(lazy.chunks(bytearray(8))) == []
    assert lazy.read() == b""
    assert lazy.torch().shape == (0, 3)
    assert lazy.numpy().shape == (0, 3)


def test_reading_beyond_the_end_is_an_error() -> None:
    with pytest.raises(UnreadableFile, match="holds 2 bytes"):
        LazyTensor("a", "F32", (1,), MemorySource(b"ab"), 0).read()


def test_reshape_keeps_the_bytes() -> None:
    lazy = tensor(VALUES, "F16")
    assert lazy.reshape((7, 11)) is lazy
    assert torch.equal(lazy.reshape((11, 7, 1)).torch(), VALUES.half().reshape(11, 7, 1))
    assert torch.equal(lazy.mapped("F32").reshape((77,)).torch(), VALUES.half().float().reshape(77))
    with pytest.raises(ValueError, match="cannot become"):
        lazy.reshape((7, 10))


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_torch_sees_the_same_values(name: str) -> None:
    small = VALUES.abs()
    lazy = tensor(small, name)
    expected = small.to(getattr(torch, TORCH_NAMES[name]))
    assert lazy.torch().dtype == expected.dtype
    assert bytes(lazy.torch().reshape(-1).view(torch.uint8).numpy()) == bytes(
        expected.reshape(-1).view(torch.uint8).numpy()
    )


@pytest.mark.parametrize("factor", [1.0, 0.5, 1 / 3, -7.25])
@pytest.mark.parametrize("target", ["F64", "F32", "F16", "BF16", None])
@pytest.mark.parametrize("source", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
def test_mapped_values_are_rounded_once(source: str, target: str | None, factor: float) -> None:
    lazy = tensor(VALUES, source)
    if source == "F8_E4M3" and target is None:
        if factor == 1.0:
            assert lazy.mapped(None, factor) is lazy
        else:
            with pytest.raises(CannotRepresent, match="--dtype"):
                lazy.mapped(None, factor)
        return
    mapped = lazy.mapped(target, factor)
    exact = lazy.torch().double() * factor
    name = target or source
    if name == "BF16":  # torch rounds twice on the way from float64: compare with the nearest
        error = (mapped.torch().double() - exact).abs()
        assert (error <= exact.abs() * 2.0**-8).all()
    else:
        assert torch.equal(mapped.torch(), exact.to(getattr(torch, TORCH_NAMES[name])))
    assert mapped.nbytes == VALUES.numel() * mapped.torch().element_size()
    assert mapped.source.path == lazy.source.path


@pytest.mark.parametrize(("source", "target"), [("F32", "F16"), ("F16", "F64"), ("BF16", "F32"), ("F64", "BF16")])
def test_mapped_bytes_from_any_offset(source: str, target: str) -> None:
    mapped = tensor(VALUES, source).mapped(target, 0.3)
    whole = bytes(mapped.read())
    for start in range(0, len(whole), 5):
        for length in (1, 2, 3, 7, 16):
            buffer = bytearray(min(length, len(whole) - start))
            mapped.source.readinto(start, memoryview(buffer))
            assert bytes(buffer) == whole[start : start + length]
    pieces = bytearray(13)
    assert b"".join(bytes(pieces[:n]) for n in mapped.chunks(pieces)) == whole


def test_mapped_across_the_copys_chunks(tmp_path: Path) -> None:
    count = CHUNK // 4 + 1001
    values = torch.arange(count, dtype=torch.float32)
    path = files.write_raw(tmp_path / "x.safetensors", {"a": files.entry("F32", [count], 0)}, values.numpy().tobytes())
    mapped = open_source(path).tensors["a"].mapped("F64", 2.0)
    buffer = bytearray(CHUNK)
    data = b"".join(bytes(buffer[:n]) for n in mapped.chunks(buffer))
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.float64), values.double() * 2)


def test_what_is_no_float_stays_or_is_refused() -> None:
    whole = tensor(VALUES.abs(), "I32")
    assert whole.mapped("F16") is whole
    assert whole.mapped() is whole
    for name in ("I32", "F4", "BOOL"):
        with pytest.raises(CannotRepresent, match=f"dtype {name}"):
            LazyTensor("a", name, (2,), MemorySource(bytes(8)), 0).mapped("F16", 0.5)


def test_types_that_nothing_can_compute_with() -> None:
    lazy = LazyTensor("a", "F4", (2,), MemorySource(b"a"), 0)
    assert lazy.nbytes == 1
    with pytest.raises(CannotRepresent, match="tensor 'a'"):
        lazy.numpy()
    with pytest.raises(CannotRepresent, match="tensor 'a'"):
        lazy.torch()


def test_scalars() -> None:
    assert scalar("alpha", "BF16", 16.0).item() == 16.0
    assert scalar("alpha", "F16", 0.5, (1,)).shape == (1,)
    with pytest.raises(ValueError, match="no exact BF16"):
        scalar("alpha", "BF16", 0.1)
    with pytest.raises(ValueError, match="not one element"):
        tensor(VALUES, "F32").item()


def pieces_of(source: ByteSource, places: list[tuple[int, int]]) -> list[tuple[ByteSource, int, memoryview]]:
    return [(source, start, memoryview(bytearray(length))) for start, length in places]


def test_pieces_of_several_sources(tmp_path: Path) -> None:
    """Neighbours, gaps, steps back, more neighbours than one call takes, and two files in turn."""
    data = bytes(torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(1)).tolist())
    sources: list[ByteSource] = []
    for name, content in (("one", data), ("two", data[::-1])):
        (tmp_path / name).write_bytes(content)
        sources.append(FileSource(str(tmp_path / name)))
    one, two = sources
    pieces = pieces_of(one, [(0, 10), (10, 20), (40, 5), (0, 7), *((100 + n, 1) for n in range(1500)), (1600, 3400)])
    pieces[1:1] = pieces_of(MemorySource(data), [(3, 9)])
    pieces[3:3] = pieces_of(two, [(30, 11), (41, 12)])
    fill(pieces)
    for source, start, buffer in pieces:
        content = data[::-1] if source is two else data
        assert bytes(buffer) == content[start : start + len(buffer)]


def test_pieces_beyond_the_end(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 25)
    pieces = pieces_of(FileSource(str(tmp_path / "short")), [(0, 10), (10, 10), (20, 10)])
    with pytest.raises(UnreadableFile, match=r"short: ends at byte 25; it was cut short"):
        fill(pieces)
    assert [bytes(buffer) for _, _, buffer in pieces[:2]] == [b"x" * 10] * 2


def test_pieces_that_come_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give less than was asked for, and refuse many buffers at once."""
    data = bytes(range(100))
    (tmp_path / "file").write_bytes(data)
    source, read = FileSource(str(tmp_path / "file")), os.preadv

    def little(descriptor: int, buffers: list[memoryview], start: int) -> int:
        if len(buffers) > 3:
            raise OSError(22, "Invalid argument")
        return read(descriptor, [buffers[0][:7]], start)

    monkeypatch.setattr(os, "preadv", little)
    for count in (2, 5):
        pieces = pieces_of(source, [(10 * n, 10) for n in range(count)])
        fill(pieces)
        assert b"".join(bytes(buffer) for _, _, buffer in pieces) == data[: 10 * count]
