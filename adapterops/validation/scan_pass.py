"""The search of tensors' bytes for the largest numbers, piece by piece.

Floating-point numbers are compared as the integers that their bits are: without the sign, a larger number is a larger
integer, and infinities and NaN are the largest of all.  So a tensor is only searched for two maxima, by numpy's vector
loops: as integers with a sign, positive floats come last; as integers without one, negative floats do, in the order of
their magnitudes.  The maxima of all tensors of a dtype stand in one array, so that what is made of them afterwards is made
of all at once: done for each of some thousand tensors, it would take as long as the search.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import nan, prod
from typing import TYPE_CHECKING, Any, Final

from adapterops.storage import LazyTensor
from adapterops.storage.dtypes import BITS, to_numpy

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]

_CODES: Final = {1: "B", 2: "H", 4: "I", 8: "Q"}
"""How `struct` calls integers of a width."""
_WIDE = 1 << 12
"""Elements of several short rows that are compared at a time, since numpy is slow with short ones."""
_MOST_RANKS = 4096
"""The longest axis of which each index is looked at for itself."""
_HEAD = 64
"""Bytes at the beginning of a row (and of a tensor) that are kept to tell it from others."""

_FLOATS: Final[dict[str, tuple[int, int, int]]] = {
    "F64": (8, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0001),
    "F32": (4, 0x7F80_0000, 0x7F80_0001),
    "C64": (4, 0x7F80_0000, 0x7F80_0001),
    "F16": (2, 0x7C00, 0x7C01),
    "BF16": (2, 0x7F80, 0x7F81),
    "F8_E5M2": (1, 0x7C, 0x7D),
    "F8_E4M3": (1, 0x7F, 0x7F),
    "F8_E5M2FNUZ": (1, 0x80, 0x80),
    "F8_E4M3FNUZ": (1, 0x80, 0x80),
}
"""Of each floating type the width, and the bits of infinity and of the first NaN above it.

The FNUZ types' one NaN is the byte that would be minus zero: no maximum shows it.
"""
_INTEGERS: Final = {"BOOL": "u1", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2"} | {
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
}


@dataclass(frozen=True, slots=True)
class Kind:
    """What of a dtype the search needs to know."""

    dtype: str
    """The type of one number: a complex one is two."""
    width: int
    """Bytes of a number; 1 where numbers cannot be read, being narrower."""
    readable: bool
    floating: bool
    infinite: int
    first_nan: int
    unsigned: Any
    """The numpy dtype of integers of that width without a sign."""
    signed: Any
    """The same with a sign; of integers, their own type."""
    mask: Any
    """All bits but the sign."""

    @property
    def hides(self) -> bool:
        """Whether NaN must be looked for in any case."""
        return self.infinite == 0x80


@cache
def kind(dtype: str) -> Kind:
    """What of a dtype (a name of `dtypes.BITS`) the search needs to know."""
    import numpy as np

    floating, integer = _FLOATS.get(dtype), _INTEGERS.get(dtype, "u1")
    readable = floating is not None or dtype in _INTEGERS or dtype == "F8_E8M0"
    width, infinite, first_nan = floating or (BITS[dtype] // 8 if readable else 1, 0, 0)
    unsigned = np.dtype(f"<u{width}")
    return Kind(
        "F32" if dtype == "C64" else dtype,
        width,
        readable,
        floating is not None,
        infinite,
        first_nan,
        unsigned,
        np.dtype(f"<i{width}" if floating else integer),
        unsigned.type((1 << (8 * width - 1)) - 1),
    )


class Maxima:
    """What is found of all tensors of one dtype: a number for each of them, or for each index of the axes looked at."""

    __slots__ = ("_searches", "kind", "negative", "np", "positive", "size")

    def __init__(self, dtype: str) -> None:
        import numpy as np

        self.np, self.kind, self.size = np, kind(dtype), 0

    def reserve(self, count: int) -> int:
        """Places for the maxima of a tensor: the first of them."""
        self.size += count
        return self.size - count

    def start(self) -> None:
        """All places are reserved."""
        np, kind = self.np, self.kind
        # The least of integers; of floats, the greatest of those with the sign's bit.
        lower, lower_type = (np.maximum, kind.unsigned) if kind.floating else (np.minimum, kind.signed)
        self.positive, self.negative = np.zeros(self.size, kind.signed), np.zeros(self.size, lower_type)
        self._searches = ((np.maximum, kind.signed, self.positive), (lower, lower_type, self.negative))

    def put(self, place: int, values: Array, axis: int, count: int, *, whole: bool) -> None:
        """Take the maxima of a matrix along an axis: `count`, each the maximum of every `count`-th of those.

        `whole`: there are no others that belong to the same places.
        """
        for function, dtype, places in self._searches:
            found = function.reduce(values.view(dtype), axis)
            part = places[place : place + count]
            if len(found) != count:
                found = function.reduce(found.reshape(-1, count), 0)
            if whole:
                part[:] = found
            else:
                function(part, found, out=part)

    def put_few(self, place: int, data: memoryview, by_row: int, by_column: int) -> None:
        """Take a few floats, all of a tensor, and the maxima along both axes as `Pass` counts them: numpy is slow with few."""
        count, mask = len(data) // self.kind.width, int(self.kind.mask)
        values = [value & mask for value in struct.unpack(f"<{count}{_CODES[self.kind.width]}", data)]
        row = count // by_row if by_row else by_column
        found = [max(values[at : at + row]) for at in range(0, by_row * row, row)] if by_row else []
        found += [max(values[at::row]) for at in range(by_column)]
        self.positive[place : place + (len(found) or 1)] = found or max(values)

    def magnitudes(self) -> Array:
        """The largest |value| of each place, as bits without a sign."""
        np, kind = self.np, self.kind
        found: Array = self.positive
        if kind.floating:
            found = np.maximum(found, (self.negative & kind.mask).view(kind.signed)).view(kind.unsigned)
        elif kind.signed.kind == "i":
            # Two's complement: minus the least number fits into the unsigned type of the same width.
            negative = np.subtract(0, np.minimum(self.negative, 0).view(kind.unsigned), dtype=kind.unsigned)
            found = np.maximum(np.maximum(found, 0).view(kind.unsigned), negative)
        return found

    def numbers(self, magnitudes: Array) -> list[float]:
        """The numbers whose bits, without a sign, these are."""
        if self.kind.dtype == "F8_E8M0":  # 2^(x − 127), 0xFF being NaN; it has no zero
            return [nan if x == 0xFF else 2.0 ** (x - 127) for x in magnitudes.tolist()]
        if not self.kind.floating:
            return list(map(float, magnitudes.tolist()))
        with self.np.errstate(invalid="ignore"):  # told by numpy of some NaN
            found: list[float] = to_numpy(self.kind.dtype, magnitudes.data, magnitudes.shape).astype("f8").tolist()
        return found


class Pass:
    """One tensor being read."""

    __slots__ = (
        "by_column", "by_row", "first", "head", "heads", "infinities", "maxima", "nans", "nbytes", "place", "row", "start",
        "tensor", "width",
    )  # fmt: skip

    def __init__(self, tensor: LazyTensor, maxima: Maxima) -> None:
        self.tensor, self.start, self.nbytes = tensor, tensor.start, tensor.nbytes
        self.maxima, self.width = maxima, maxima.kind.width
        shape = tensor.shape
        size = self.nbytes // self.width
        count = shape[0] if shape else 1
        self.row = size // count if size else 0
        """The numbers under an index of the first axis."""
        matrix = len(shape) > 1 and size > 0 and maxima.kind.readable
        self.by_row = count if matrix and count <= min(self.row, _MOST_RANKS) else 0
        """How many indices the first axis has, if each is looked at for itself."""
        second = shape[1] if matrix and prod(shape[2:]) == 1 and tensor.dtype != "C64" else 0
        self.by_column = second if second <= min(count, _MOST_RANKS) else 0
        """The same of the second axis."""
        self.place = maxima.reserve(self.by_row + self.by_column or 1)
        self.nans = self.infinities = 0
        self.first = -1
        self.head = self.heads = b""

    def pieces(self, most: int) -> Iterator[tuple[int, int]]:
        """Ranges of bytes: whole rows, or parts of one, where rows are looked at."""
        end, row = self.nbytes, self.row * self.width
        if not (self.by_row or self.by_column):
            whole, step = end, most - most % self.width
        elif row <= most:
            whole, step = end, most - most % row
        else:
            whole, step = row, most - most % self.width
        for first in range(0, end, whole or 1):
            for start in range(first, first + whole, step):
                yield start, min(step, first + whole - start)

    def take(self, start: int, data: memoryview) -> None:
        """Look at a piece, the next one, which begins at byte `start`."""
        whole = len(data) == self.nbytes
        if not start:
            self.head = bytes(data[:_HEAD])
        if whole and len(data) <= _HEAD and self.maxima.kind.floating:
            self.maxima.put_few(self.place, data, self.by_row, self.by_column)
            self.heads = self.head if self.by_row else b""
        else:
            self._search(start, data, whole)
        if self.maxima.kind.hides:
            self.count(start, data)

    def _search(self, start: int, data: memoryview, whole: bool) -> None:
        maxima, place = self.maxima, self.place
        values = maxima.np.frombuffer(data, maxima.kind.unsigned)
        if self.by_row:
            matrix = values.reshape(-1, min(self.row, len(values)))
            index, inside = divmod(start // self.width, self.row)
            if not inside:
                self.heads += matrix[:, : _HEAD // self.width].tobytes()
            maxima.put(place + index, matrix, 1, len(matrix), whole=whole)
            place += self.by_row
        if self.by_column:
            several = max(1, _WIDE // self.row) * self.row
            end = len(values) - len(values) % several
            whole = whole and end in (0, len(values))
            if end:
                maxima.put(place, values[:end].reshape(-1, several), 0, self.row, whole=whole)
            if end < len(values):
                maxima.put(place, values[end:].reshape(-1, self.row), 0, self.row, whole=whole)
        elif not self.by_row:
            maxima.put(place, values.reshape(1, -1), 1, 1, whole=whole)

    def count(self, start: int, data: memoryview) -> None:
        """Count the NaN and infinities of a piece."""
        np, kind = self.maxima.np, self.maxima.kind
        values = np.frombuffer(data, kind.unsigned)
        if kind.hides:
            nans, infinities = values == 0x80, np.zeros(1, bool)
        else:
            plain = values & kind.mask
            nans, infinities = plain >= kind.first_nan, (plain >= kind.infinite) & (plain < kind.first_nan)
        self.nans += int(np.count_nonzero(nans))
        self.infinities += int(np.count_nonzero(infinities))
        if self.first < 0 and (self.nans or self.infinities):
            at = start // self.width + int(np.argmax(nans | infinities))
            self.first = at // (2 if self.tensor.dtype == "C64" else 1)
