"""Element types: the names safetensors uses, their sizes, and decoding without torch.

Source: `safetensors/src/tensor.rs`, enum `Dtype` (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import struct
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import numpy
    import numpy.typing

BITS: Final[dict[str, int]] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per element of every dtype that a safetensors header may name."""

FLOATS: Final = ("F64", "F32", "F16", "BF16")
"""The types in which adapters are published and computed, widest first."""

EPSILON: Final[dict[str, float]] = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
"""Spacing of the numbers just above 1."""

_STRUCT: Final[dict[str, str]] = {
    "F64": "<d",
    "F32": "<f",
    "F16": "<e",
    "I64": "<q",
    "I32": "<i",
    "I16": "<h",
    "I8": "<b",
    "U8": "<B",
    "U16": "<H",
    "U32": "<I",
    "U64": "<Q",
}
_NUMPY: Final[dict[str, str]] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "U16": "<u2",
    "U32": "<u4",
    "U64": "<u8",
    "BOOL": "?",
}


# Mantissa bits, exponent bias, the bytes that are NaN, the bytes that are infinite (OCP 8-bit floats and their FNUZ
# kin; https://github.com/jax-ml/ml_dtypes lists all of them).
_SMALL: Final[dict[str, tuple[int, int, frozenset[int], frozenset[int]]]] = {
    "F8_E4M3": (3, 7, frozenset({0x7F, 0xFF}), frozenset()),
    "F8_E5M2": (2, 15, frozenset({0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF}), frozenset({0x7C, 0xFC})),
    "F8_E4M3FNUZ": (3, 8, frozenset({0x80}), frozenset()),
    "F8_E5M2FNUZ": (2, 16, frozenset({0x80}), frozenset()),
}
NUMBERS: Final = (*FLOATS, *_SMALL)
"""The floating types whose values can be computed with."""


@cache
def _small_values(dtype: str) -> tuple[float, ...]:
    """The number that each byte means in an 8-bit float type."""
    mantissa_bits, bias, nan, infinite = _SMALL[dtype]
    values = []
    for byte in range(256):
        exponent, mantissa = (byte & 0x7F) >> mantissa_bits, byte & ((1 << mantissa_bits) - 1)
        value = (mantissa + ((1 << mantissa_bits) if exponent else 0)) * 2.0 ** (
            max(exponent, 1) - bias - mantissa_bits
        )
        value = float("nan") if byte in nan else float("inf") if byte in infinite else value
        values.append(-value if byte & 0x80 else value)
    return tuple(values)


def decode_scalar(dtype: str, data: bytes) -> float:
    """The one number in `data`.  Raises `ValueError` for a dtype that holds no plain number."""
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if dtype in _SMALL and len(data) == 1:
        return _small_values(dtype)[data[0]]
    if dtype == "BOOL":
        return float(data[0] != 0)
    if dtype not in _STRUCT:
        raise ValueError(f"a number cannot be read from dtype {dtype}")
    return float(struct.unpack(_STRUCT[dtype], data)[0])


def encode_scalar(dtype: str, value: float) -> bytes | None:
    """`value` in `dtype`, or None where the type cannot hold it exactly."""
    try:
        if dtype == "BF16":
            single = struct.pack("<f", value)
            data = single[2:] if single[:2] == b"\0\0" else None
        elif dtype in _SMALL:
            values = _small_values(dtype)
            data = bytes([values.index(value)]) if value in values else None
        elif dtype == "BOOL" and value in (0, 1):
            data = bytes([int(value)])
        elif dtype in _STRUCT:
            data = struct.pack(_STRUCT[dtype], value if dtype in FLOATS else int(value))
        else:
            return None
    except (OverflowError, ValueError, struct.error):
        return None
    if data is None or decode_scalar(dtype, data) != value:
        return None
    return data


def to_numpy(dtype: str, data: bytes | bytearray | memoryview, shape: tuple[int, ...]) -> numpy.typing.NDArray[Any]:
    """Decode little-endian `data` to an array of `shape`; BF16 and 8-bit floats come out as float32.

    Raises `ValueError` for types narrower than a byte and others that numpy has not.
    """
    import numpy as np

    if dtype in _SMALL:
        table = np.array(_small_values(dtype), dtype=np.float32)
        small: numpy.typing.NDArray[Any] = table[np.frombuffer(data, dtype="u1")].reshape(shape)
        return small
    if dtype == "BF16":
        wide = np.frombuffer(data, dtype="<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    if dtype not in _NUMPY:
        raise ValueError(f"numpy cannot hold dtype {dtype}")
    return np.frombuffer(data, dtype=_NUMPY[dtype]).reshape(shape)


def from_numpy(dtype: str, array: numpy.typing.NDArray[Any]) -> bytes:
    """Encode `array` (float64) as a type of `FLOATS`, rounding once, to nearest even."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        if dtype != "BF16":
            return np.ascontiguousarray(array.astype(_NUMPY[dtype])).tobytes()
        single = np.ascontiguousarray(array.astype("<f4"))
    bits = single.view("<u4")
    # By way of float32 a number may be rounded onto the middle of two bfloat16 and then, wrongly, again from there.
    middle = (bits & 0xFFFF) == 0x8000
    if middle.any():
        magnitude, exact = np.abs(single, dtype=np.float64), np.abs(array, dtype=np.float64)
        bits = bits + (middle & (magnitude < exact)) - (middle & (magnitude > exact)).astype("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(array), np.uint32(0x7FC0), rounded)
    return rounded.astype("<u2").tobytes()


# The top bytes of elements that may be NaN or infinite.  True says that the byte alone decides.
_NON_FINITE: Final[dict[str, tuple[bytes, bool]]] = {
    "F16": (bytes([0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF]), True),
    "BF16": (b"\x7f\xff", False),
    "F32": (b"\x7f\xff", False),
    "F64": (b"\x7f\xff", False),
    **{name: (bytes(sorted(nan | infinite)), True) for name, (_, _, nan, infinite) in _SMALL.items()},
    "F8_E8M0": (b"\xff", True),
}


_INFINITE: Final = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F80_0000, "F64": 0x7FF0 << 48}
"""The bits of infinity: as whole numbers, NaN is above it and everything else below."""


def has_non_finite(dtype: str, data: bytes | bytearray | memoryview, size: int | None = None) -> bool:
    """Whether the first `size` bytes of `data` (whole little-endian elements of a float type) hold NaN or infinity.

    Looks each suspicious top byte up among those of all elements, so that a pure rename needs neither numpy nor
    torch; only where one is found and does not decide are the elements decoded.  (Measured: a search per byte value
    is faster than one `translate`; a memoryview copies a strided slice ten times slower than a bytearray.)  Where numpy
    has been loaded for other reasons it looks for the largest number, which is seven times faster.
    """
    size = len(data) if size is None else size
    if dtype == "C64":  # two F32, real and imaginary
        dtype = "F32"
    if dtype not in _NON_FINITE:
        return False
    if dtype in _INFINITE and "numpy" in sys.modules:
        return _reaches_infinity(dtype, data, size)
    suspicious, decided = _NON_FINITE[dtype]
    width = BITS[dtype] // 8
    tops = data[width - 1 : size : width]
    if not any(byte in tops for byte in suspicious):
        return False
    if decided:
        return True
    import numpy as np

    return not bool(np.isfinite(to_numpy(dtype, memoryview(data)[:size], (size // width,))).all())


def _reaches_infinity(dtype: str, data: bytes | bytearray | memoryview, size: int) -> bool:
    import numpy as np

    width, infinite = BITS[dtype] // 8, _INFINITE[dtype]
    bits = np.frombuffer(data, dtype=f"<u{width}", count=size // width)
    negative = infinite | 1 << (8 * width - 1)
    return bool(bits.size) and (int(bits.view(f"<i{width}").max()) >= infinite or int(bits.max()) >= negative)
