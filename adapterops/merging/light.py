"""Merges of factors that need no more than numpy: PEFT's linear, and cat.

Importing torch takes longer than these do.  Sums are in float32 and rounded once, as on the other path, from which they may
differ by that rounding.  Everything goes through blocks that stay in a core's cache, and from there to its place, so that
memory does not grow with the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
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

Write = Callable[[str, int, memoryview], None]
"""Takes a role, where in its bytes a part begins, and the part, which is used again afterwards."""

BLOCK = 1 << 16
"""Numbers at a time: three blocks of float32 are well inside a core's second cache."""
ROUNDS_TO_INFINITY = {"F32": inf, "F16": 65520.0, "BF16": 2.0**128 - 2.0**119}
"""The least number that is infinite in each type; these types are served."""


class Desk:
    """Room for blocks of so many numbers (`BLOCK` for 0), used for one module after another, and sums of them."""

    def __init__(self, numbers: int = 0) -> None:
        import numpy as np

        numbers = numbers or BLOCK
        self.read = memoryview(bytearray(4 * numbers))
        self.made: Array = np.empty(4 * numbers, dtype=np.uint8)
        self.total: Array = np.empty(numbers, dtype="<f4")
        self.part: Array = np.empty(numbers, dtype="<f4")

    def sum(self, tensors: Sequence[LazyTensor], weights: Sequence[float], start: int, dtype: str) -> memoryview:
        """The bytes in `dtype` of Σ wₖ·xₖ, of as many numbers as there is room for, from number `start` on.

        Raises `OverflowError` where `dtype` cannot hold one.
        """
        import numpy as np

        count = min(len(self.total), tensors[0].numel - start)
        total, part = self.total[:count], self.part[:count]
        for k, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
            values = part if k else total
            decode(tensor.dtype, self._bytes(tensor, start, count), values)
            np.multiply(values, np.float32(weight), out=values)
            if k:
                np.add(total, part, out=total)
        limit = ROUNDS_TO_INFINITY[dtype]
        if not (-limit < total.min() and total.max() < limit):  # NaN is neither
            raise OverflowError
        made = self.made[: count * dtypes.BITS[dtype] // 8]
        encode(total, dtype, made, part)
        return made.data

    def _bytes(self, tensor: LazyTensor, start: int, count: int) -> memoryview:
        width = dtypes.BITS[tensor.dtype] // 8
        data = self.read[: count * width]
        tensor.source.readinto(tensor.start + start * width, data)
        return data


def serves(p: MatrixPlan, dtype: str) -> bool:
    """Whether the plan is one of these."""
    method = p.choice.method
    sums = method.name == "linear" and p.choice.space is Space.FACTORS
    if not (sums or method.kind is Kind.STACKED) or p.rank is None or dtype not in ROUNDS_TO_INFINITY:
        return False
    plain = all(term.plain and term.pieces is None for term in p.terms)
    return plain and all(term.update.tensors[role].dtype in ROUNDS_TO_INFINITY for term in p.terms for role in "AB")


def compute(p: MatrixPlan, dtype: str, desk: Desk, write: Write) -> ModuleReport:
    """Write the bytes of the merged factors, and say what became of the module.

    Raises `BrokenAdapter` for an input that holds NaN or infinity, `OverflowError` naming the role where `dtype` cannot
    hold what was made.
    """
    import numpy as np

    stacked = p.choice.method.kind is Kind.STACKED
    for role, weights in zip("AB", strengths(p), strict=True):
        tensors = [term.update.tensors[role] for term in p.terms]
        try:
            # What is too large is told by name, below.
            with np.errstate(over="ignore", invalid="ignore"):
                if not stacked:
                    width = dtypes.BITS[dtype] // 8
                    for start in range(0, tensors[0].numel, len(desk.total)):
                        write(role, start * width, desk.sum(tensors, weights, start, dtype))
                elif role == "A":
                    _stack_rows(tensors, stacked_factors(p), dtype, desk, write)
                else:
                    _stack_columns(tensors, p.shape.rows, dtype, desk, write)
        except OverflowError as error:
            check_finite(term.update for term in p.terms)
            raise OverflowError(role) from error
    return report(p)


def decode(dtype: str, data: memoryview, out: Array) -> None:
    """The numbers in `data` as float32."""
    import numpy as np

    if dtype == "BF16":
        bits = out.view("<u4")
        bits[:] = np.frombuffer(data, dtype="<u2")
        np.left_shift(bits, 16, out=bits)
    else:
        out[:] = np.frombuffer(data, dtype="<f4" if dtype == "F32" else "<f2")


def encode(values: Array, dtype: str, out: Array, spare: Array) -> None:
    """Float32 values in `dtype`, which can hold them, rounded to nearest even; `spare` is as large, and used up."""
    import numpy as np

    if dtype == "BF16":
        bits, rounded = values.view("<u4"), spare.view("<u4")
        np.right_shift(bits, 16, out=rounded)
        np.bitwise_and(rounded, 1, out=rounded)
        np.add(rounded, 0x7FFF, out=rounded)
        np.add(rounded, bits, out=rounded)
        np.right_shift(rounded, 16, out=rounded)
        out.view("<u2")[:] = rounded
    else:
        out.view("<f4" if dtype == "F32" else "<f2")[:] = values


def _stack_rows(tensors: Sequence[LazyTensor], factors: Sequence[float], dtype: str, desk: Desk, write: Write) -> None:
    """The A's one under the other; the strengths in them where they differ."""
    at = 0
    for tensor, factor in zip(tensors, factors, strict=True):
        made = tensor.mapped(dtype, factor)
        for start in range(0, made.nbytes, len(desk.read)):
            data = desk.read[: made.nbytes - start]
            made.source.readinto(made.start + start, data)
            _insist_held(dtype, data)
            write("A", at, data)
            at += len(data)


def _stack_columns(tensors: Sequence[LazyTensor], rows: int, dtype: str, desk: Desk, write: Write) -> None:
    """The B's side by side."""
    import numpy as np

    word = f"<u{dtypes.BITS[dtype] // 8}"
    made = [tensor.mapped(dtype) for tensor in tensors]
    widths = [tensor.nbytes // rows for tensor in made]
    whole = sum(widths)
    if whole > len(desk.made):
        desk = Desk(whole)
    step = len(desk.made) // whole
    for start in range(0, rows, step):
        count = min(step, rows - start)
        out = desk.made[: count * whole]
        table, at = out.view(word).reshape(count, -1), 0
        for tensor, width in zip(made, widths, strict=True):
            data = desk.read[: count * width]
            tensor.source.readinto(tensor.start + start * width, data)
            values = np.frombuffer(data, dtype=word).reshape(count, -1)
            table[:, at : at + values.shape[1]] = values
            at += values.shape[1]
        _insist_held(dtype, out.data)
        write("B", start * whole, out.data)


def _insist_held(dtype: str, data: memoryview) -> None:
    if dtypes.has_non_finite(dtype, data):
        raise OverflowError
