"""Element types: the names safetensors uses, their sizes, and decoding without torch.

Source: `safetensors/src/tensor.rs`, enum `Dtype` (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import struct
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


def decode_scalar(dtype: str, data: bytes) -> float:
    """The one number in `data`.  Raises `ValueError` for a dtype that holds no plain number."""
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if dtype not in _STRUCT:
        raise ValueError(f"a number cannot be read from dtype {dtype}")
    return float(struct.unpack(_STRUCT[dtype], data)[0])


def encode_scalar(dtype: str, value: float) -> bytes | None:
    """`value` in `dtype` (a float type), or None where the type cannot hold it exactly."""
    try:
        if dtype == "BF16":
            single = struct.pack("<f", value)
            data = single[2:] if single[:2] == b"\0\0" else None
        else:
            data = struct.pack(_STRUCT[dtype], value if dtype in FLOATS else int(value))
    except (OverflowError, ValueError, struct.error):
        return None
    if data is None or decode_scalar(dtype, data) != value:
        return None
    return data


def to_numpy(dtype: str, data: bytes | memoryview, shape: tuple[int, ...]) -> numpy.typing.NDArray[Any]:
    """Decode little-endian `data` to an array of `shape`; BF16 comes out as float32, the rest in its own type.

    Raises `ValueError` for 8-bit floats and other types that numpy has not.
    """
    import numpy as np

    if dtype == "BF16":
        wide = np.frombuffer(data, dtype="<u2").astype("<u4") << 16
        return wide.view("<f4").reshape(shape)
    if dtype not in _NUMPY:
        raise ValueError(f"numpy cannot hold dtype {dtype}")
    return np.frombuffer(data, dtype=_NUMPY[dtype]).reshape(shape)


def from_numpy(dtype: str, array: numpy.typing.NDArray[Any]) -> bytes:
    """Encode `array` as `dtype`, rounding to nearest even; the inverse of `to_numpy` for float types."""
    import numpy as np

    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array.astype(_NUMPY[dtype])).tobytes()
    bits = np.ascontiguousarray(array.astype("<f4")).view("<u4")
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(array), np.uint32(0x7FC0), rounded)
    return rounded.astype("<u2").tobytes()


_EXPONENT_ALL_ONES: Final = bytes(1 if (b & 0x7C) == 0x7C else 0 for b in range(256))
_EXPONENT_TOP_ONES: Final = bytes(1 if (b & 0x7F) == 0x7F else 0 for b in range(256))


def has_non_finite(dtype: str, data: bytes | memoryview) -> bool:
    """Whether float `data` (whole little-endian elements) holds a NaN or an infinity.

    Looks at each element's top byte with two C-speed passes, so that a pure rename needs neither numpy nor
    torch; only where that byte is suspicious are the elements decoded.
    """
    if dtype == "F16":
        return b"\x01" in bytes(data[1::2]).translate(_EXPONENT_ALL_ONES)
    width = BITS.get(dtype, 0) // 8
    if dtype not in FLOATS:
        return False
    if b"\x01" not in bytes(data[width - 1 :: width]).translate(_EXPONENT_TOP_ONES):
        return False
    import numpy as np

    return not bool(np.isfinite(to_numpy(dtype, data, (len(data) // width,))).all())
