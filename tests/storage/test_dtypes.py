"""Element types against torch: finite or not, cast, one number at a time."""

from __future__ import annotations

import random
import struct
from fractions import Fraction
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapterops.storage import dtypes
from adapterops.storage.tensor import TORCH_NAMES

FLOATING = [
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "C64",
]  # fmt: skip


def as_torch(dtype: str, data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=getattr(torch, TORCH_NAMES[dtype]))


def finite(dtype: str, data: bytes) -> bool:
    tensor = as_torch(dtype, data)
    return bool(torch.isfinite(tensor if dtype in ("F64", "C64") else tensor.float()).all())


def interesting(dtype: str) -> list[bytes]:
    """Elements at the edges: zeros, subnormals, largest, infinities, NaN of all kinds, of both signs."""
    if dtype == "C64":
        return [a + b for a, b in product(interesting("F32"), repeat=2)]
    width = dtypes.BITS[dtype] // 8
    if width == 1:
        return [bytes([n]) for n in range(256)]
    bits = width * 8
    mantissa = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}[dtype]
    ones = ((1 << (bits - 1 - mantissa)) - 1) << mantissa
    numbers = {0, 1, (1 << mantissa) - 1, 1 << mantissa, ones - 1, ones, ones + 1, ones | 1 << (mantissa - 1)}
    numbers |= {ones | (1 << mantissa) - 1, ones - (1 << mantissa), 0x3F << (bits - 8), 0x7B << (bits - 8)}
    return [(n | sign << (bits - 1)).to_bytes(width, "little") for n in numbers for sign in (0, 1)]


@pytest.fixture(params=["with numpy", "without"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks for such elements where numpy is loaded already, and where it is not."""
    if request.param == "without":
        monkeypatch.setattr(dtypes, "sys", SimpleNamespace(modules={}))


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("dtype", FLOATING)
def test_non_finite_elements_of_every_kind(dtype: str) -> None:
    for element in interesting(dtype):
        assert dtypes.has_non_finite(dtype, element) != finite(dtype, element), element.hex()


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_16_bit_pattern(dtype: str) -> None:
    wrong = [
        n
        for n in range(1 << 16)
        if dtypes.has_non_finite(dtype, n.to_bytes(2, "little"))
        != ((n & {"F16": 0x7C00, "BF16": 0x7F80}[dtype]) == {"F16": 0x7C00, "BF16": 0x7F80}[dtype])
    ]
    assert not wrong


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "F8_E4M3"])
def test_a_non_finite_element_anywhere(dtype: str) -> None:
    width = dtypes.BITS[dtype] // 8
    good, bad = bytes(width), b"\xff" * width  # all ones: NaN in each of these types
    largest = next(e for e in interesting(dtype) if finite(dtype, e) and e[-1] in (0x7F, 0x7B, 0x7E))
    for position in range(20):
        elements = [largest if n % 3 else good for n in range(20)]
        assert not dtypes.has_non_finite(dtype, b"".join(elements))
        elements[position] = bad
        data = bytearray(b"".join(elements))
        assert dtypes.has_non_finite(dtype, data)
        assert dtypes.has_non_finite(dtype, data, (position + 1) * width)
        assert not dtypes.has_non_finite(dtype, data, position * width)  # what lies behind is not part of it


def test_types_without_such_values() -> None:
    for dtype in ("I8", "U8", "I16", "I32", "I64", "U64", "BOOL", "F4", "F6_E2M3", "F6_E3M2"):
        assert not dtypes.has_non_finite(dtype, b"\xff" * 24)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"])
def test_every_8_bit_float_has_torchs_value(dtype: str) -> None:
    data = bytes(range(256))
    ours = torch.from_numpy(dtypes.to_numpy(dtype, data, (256,)))
    assert torch.equal(ours.nan_to_num(12345.0), as_torch(dtype, data).float().nan_to_num(12345.0))
    for n in range(256):
        value = dtypes.decode_scalar(dtype, data[n : n + 1])
        assert value == ours[n].item() or value != value
        back = dtypes.encode_scalar(dtype, value)
        assert back is None if value != value else back is not None and dtypes.decode_scalar(dtype, back) == value


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_scalars_agree_with_torch(dtype: str) -> None:
    kind = getattr(torch, TORCH_NAMES[dtype])
    values = [0.0, -0.0, 1.0, -2.5, 16.0, 0.1, 1 / 3, 65504.0, 65520.0, 1e-8, 3.0e38, 1e39, 1e-46, 7.999]
    for value in [*values, float("inf"), float("nan")]:
        cast = torch.tensor(value, dtype=torch.float64).to(kind)
        data = dtypes.encode_scalar(dtype, value)
        exact = cast.double().item() == value
        if not exact:
            assert data is None
            continue
        assert data == cast.reshape(1).view(torch.uint8).numpy().tobytes()
        assert dtypes.decode_scalar(dtype, data) == value


def test_scalars_of_other_types() -> None:
    assert dtypes.encode_scalar("I64", 8.0) == struct.pack("<q", 8)
    assert dtypes.encode_scalar("I64", 8.5) is None
    assert dtypes.encode_scalar("U8", 300.0) is None
    assert dtypes.encode_scalar("I32", float("inf")) is None
    assert dtypes.encode_scalar("F4", 1.0) is None
    assert dtypes.encode_scalar("BOOL", 1.0) == b"\1"
    assert dtypes.encode_scalar("BOOL", 0.5) is None
    assert dtypes.decode_scalar("I16", b"\xfe\xff") == -2
    for dtype in ("C64", "F8_E8M0", "F4"):
        with pytest.raises(ValueError, match=dtype):
            dtypes.decode_scalar(dtype, b"\0")


def patterns(dtype: str) -> bytes:
    dice = random.Random(0)
    return b"".join(interesting(dtype)) + dice.randbytes(4000 * dtypes.BITS[dtype] // 8)


@pytest.mark.parametrize("target", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("source", ["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_casts_are_torchs(source: str, target: str) -> None:
    data = patterns(source)
    with np.errstate(invalid="ignore"):  # signalling NaN among the patterns
        wide = dtypes.to_numpy(source, data, (len(data) * 8 // dtypes.BITS[source],)).astype(np.float64)
    ours = as_torch(target, dtypes.from_numpy(target, wide)).double()
    theirs = as_torch(source, data).to(getattr(torch, TORCH_NAMES[target])).double()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(0.0), theirs.nan_to_num(0.0))


@given(
    st.floats(allow_nan=False, allow_infinity=False, min_value=-3e38, max_value=3e38)
    | st.builds(  # near the middle of two bfloat16, where rounding by way of float32 goes wrong
        lambda high, low, exponent: (high + 0.5 + low) * 2.0**exponent,
        st.integers(128, 255),
        st.sampled_from([0.0, 2.0**-40, -(2.0**-40), 2.0**-26, -(2.0**-30)]),
        st.integers(-130, 110),
    )
)
def test_bfloat16_is_rounded_once_to_the_nearest(value: float) -> None:
    got = dtypes.from_numpy("BF16", np.array([value]))
    bits = int.from_bytes(got, "little")
    exact = Fraction(value)

    def distance(pattern: int) -> Fraction:
        number = struct.unpack("<f", struct.pack("<I", pattern << 16))[0]
        return abs(Fraction(number) - exact) if np.isfinite(number) else Fraction(2) ** 200

    below, above = (bits - 1 if bits & 0x7FFF else bits), bits + 1
    assert distance(bits) <= min(distance(below), distance(above))
    if distance(bits) in (distance(above), distance(below) if below != bits else -1):
        assert bits % 2 == 0  # a tie goes to the even one
