"""Whether one tensor is another, rounded once."""

from __future__ import annotations

from adapterops.storage import dtypes
from adapterops.storage.tensor import LazyTensor

_SUBNORMAL = {"F64": 2.0**-1074, "F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}
"""The spacing of the numbers around 0."""
_ELEMENTS = 1 << 16
"""Compared at a time, in float64: half a MiB an array."""


def beyond_rounding(source: LazyTensor, written: LazyTensor, factor: float) -> int | None:
    """The first element of `written` that is not `factor` times that of `source`, rounded to `written`'s type.

    None where there is none.  Both hold as many elements, of types that numpy can decode.
    """
    import numpy as np

    half = dtypes.EPSILON[written.dtype] / 2
    for start in range(0, source.numel, _ELEMENTS):
        count = min(_ELEMENTS, source.numel - start)
        expected = _part(source, start, count).numpy().astype(np.float64) * factor
        found = _part(written, start, count).numpy().astype(np.float64)
        # Rounding to nearest is off by half a spacing; a little more for the product, which float64 rounded before.
        allowed = np.abs(expected) * (half + 2.0**-51) + _SUBNORMAL[written.dtype] / 2
        wrong = ~(np.abs(found - expected) <= allowed)
        if wrong.any():
            return start + int(np.argmax(wrong))
    return None


def _part(tensor: LazyTensor, start: int, count: int) -> LazyTensor:
    width = dtypes.BITS[tensor.dtype] // 8
    return LazyTensor(tensor.key, tensor.dtype, (count,), tensor.source, tensor.start + start * width)
