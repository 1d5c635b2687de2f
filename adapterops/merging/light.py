"""Merges of factors that need no more than numpy: PEFT's linear, and cat.

Importing torch takes longer than these do.  Sums are in float32 and rounded once, as on the other path, from which they may
differ by that rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterops.merging.matrices import MatrixPlan, report, stacked_factors, strengths
from adapterops.merging.registry import Kind, Space
from adapterops.merging.settings import ModuleReport
from adapterops.proof import check_finite
from adapterops.storage import dtypes
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]

_TYPES = ("F32", "F16", "BF16")


def serves(p: MatrixPlan, dtype: str) -> bool:
    """Whether the plan is one of these."""
    method = p.choice.method
    sums = method.name == "linear" and p.choice.space is Space.FACTORS
    if not (sums or method.kind is Kind.STACKED) or p.rank is None or dtype not in _TYPES:
        return False
    plain = all(term.plain and term.pieces is None for term in p.terms)
    return plain and all(term.update.tensors[role].dtype in _TYPES for term in p.terms for role in "AB")


def compute(p: MatrixPlan, dtype: str) -> tuple[dict[str, bytes], ModuleReport]:
    """The bytes of the merged factors by role, and what became of the module.

    Raises `BrokenAdapter` for an input that holds NaN or infinity, `OverflowError` naming the role where `dtype` cannot
    hold what was made.
    """
    stacked = p.choice.method.kind is Kind.STACKED
    out: dict[str, bytes] = {}
    for role, weights in zip("AB", strengths(p), strict=True):
        if stacked:
            out[role] = _stacked_rows(p, dtype) if role == "A" else _stacked_columns(p, dtype)
        else:
            out[role] = _encoded(_sum([term.update.tensors[role] for term in p.terms], weights), dtype)
        if dtypes.has_non_finite(dtype, out[role]):
            check_finite(term.update for term in p.terms)
            raise OverflowError(role)
    return out, report(p)


def _sum(tensors: list[LazyTensor], weights: list[float]) -> Array:
    """Σ wₖ·xₖ, flat, float32."""
    import numpy as np

    total = _decoded(tensors[0])
    total *= np.float32(weights[0])
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        values = _decoded(tensor)
        values *= np.float32(weight)
        total += values
    return total


def _decoded(tensor: LazyTensor) -> Array:
    """The values, flat, float32, in room of their own."""
    import numpy as np

    data: Any = np.empty(tensor.nbytes, dtype=np.uint8)
    tensor.source.readinto(tensor.start, memoryview(data))
    if tensor.dtype == "BF16":
        wide = data.view("<u2").astype("<u4")
        wide <<= 16
        out: Array = wide.view("<f4")
    else:
        out = data.view("<f4") if tensor.dtype == "F32" else data.view("<f2").astype("<f4")
    return out


def _encoded(values: Array, dtype: str) -> bytes:
    """The bytes of float32 values in `dtype`, rounded to nearest even."""
    import numpy as np

    if dtype == "F32":
        return values.tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype("<f2").tobytes()
    bits = values.view("<u4")
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    odd += bits
    odd >>= 16
    rounded = odd.astype("<u2")
    if not np.isfinite(values).all():
        rounded[~np.isfinite(values)] = 0x7FC0  # The addition may have carried it over.
    return rounded.tobytes()


def _stacked_rows(p: MatrixPlan, dtype: str) -> bytes:
    """The A's one under the other; the strengths in them where they differ."""
    factors = stacked_factors(p)
    tensors = [term.update.tensors["A"] for term in p.terms]
    return b"".join(bytes(t.mapped(dtype, f).read()) for t, f in zip(tensors, factors, strict=True))


def _stacked_columns(p: MatrixPlan, dtype: str) -> bytes:
    """The B's side by side."""
    import numpy as np

    width = dtypes.BITS[dtype] // 8
    parts = []
    for term in p.terms:
        data = term.update.tensors["B"].mapped(dtype).read()
        parts.append(np.frombuffer(data, dtype=f"<u{width}").reshape(p.shape.rows, -1))
    return np.concatenate(parts, axis=1).tobytes()
