"""Whether one tensor is another, rounded once."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from adapterops.storage import dtypes
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]

_SUBNORMAL = {"F64": 2.0**-1074, "F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
"""The spacing of the numbers around 0."""
_ELEMENTS = 1 << 16
"""Compared at a time, in float64: half a MiB an array."""
_SMALL = ("F16", "BF16")
"""Types of so few numbers that all of them can be looked at beforehand."""


def beyond_rounding(source: LazyTensor, written: LazyTensor, factor: float) -> int | None:
    """The first element of `written` that is not `factor` times that of `source`, rounded to `written`'s type.

    None where there is none.  Both hold as many elements, of types that numpy can decode.
    """
    import numpy as np

    for start in range(0, source.numel, _ELEMENTS):
        count = min(_ELEMENTS, source.numel - start)
        ours, theirs = _part(source, start, count).read(), _part(written, start, count).read()
        if source.dtype in _SMALL and _is_known(ours, source.dtype, theirs, written.dtype, factor):
            continue
        values = _wide(source.dtype, ours)
        wrong = ~_is_rounded(values, dtypes.to_numpy(written.dtype, theirs, (count,)), written.dtype, factor)
        if wrong.any():
            return start + int(np.argmax(wrong))
    return None


def _is_rounded(values: Array, found: Array, dtype: str, factor: float) -> Array:
    """Of each number of `found` whether it is that of `values`, times `factor`, rounded to `dtype`."""
    import numpy as np

    with np.errstate(invalid="ignore", over="ignore"):  # infinities are no rounding of anything
        expected = values * factor
        size = np.abs(expected)
        _, exponent = np.frexp(np.maximum(size, _SUBNORMAL[dtype]))
        spacing = np.maximum(np.ldexp(dtypes.EPSILON[dtype], exponent - 1), _SUBNORMAL[dtype])
        # Rounding to nearest is off by half a spacing; a little more for the product, which float64 rounded before.
        allowed = spacing / 2 + size * 2.0**-51
        near: Array = np.abs(found.astype(np.float64) - expected) <= allowed
    return near & np.isfinite(expected)


def _is_known(ours: bytearray, before: str, theirs: bytearray, after: str, factor: float) -> bool:
    """Whether every element is the usual rounding; where it is not, it may be the other one that is as near."""
    import numpy as np

    table = _roundings(before, after, factor)
    expected = np.take(table, np.frombuffer(ours, dtype="<u2"), mode="clip")
    same = np.array_equal(expected, np.frombuffer(theirs, dtype=table.dtype))
    return same and not dtypes.has_non_finite(after, theirs)


@lru_cache(maxsize=8)
def _roundings(before: str, after: str, factor: float) -> Array:
    """What each of the 65,536 elements of a 16-bit type becomes: only what has been found to be right, else a NaN."""
    import numpy as np

    values = _wide(before, np.arange(1 << 16, dtype="<u2").tobytes())
    with np.errstate(all="ignore"):
        made = bytearray(dtypes.from_numpy(after, values * factor))
    right = _is_rounded(values, dtypes.to_numpy(after, made, values.shape), after, factor)
    table = np.frombuffer(made, dtype=f"<u{dtypes.BITS[after] // 8}")
    table[~right] = np.iinfo(table.dtype).max  # all ones: a NaN of every type
    return table


def _wide(dtype: str, data: bytes | bytearray) -> Array:
    import numpy as np

    with np.errstate(invalid="ignore"):  # of NaNs that signal
        wide: Array = dtypes.to_numpy(dtype, data, (len(data) * 8 // dtypes.BITS[dtype],)).astype(np.float64)
    return wide


def _part(tensor: LazyTensor, start: int, count: int) -> LazyTensor:
    width = dtypes.BITS[tensor.dtype] // 8
    return LazyTensor(tensor.key, tensor.dtype, (count,), tensor.source, tensor.start + start * width)
