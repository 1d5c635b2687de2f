"""One pass over the bytes of tensors: what rules about values need.

Floating-point numbers are compared as the integers that their bits are: without the sign, a larger number is a larger
integer, and infinities and NaN are the largest of all.  So a tensor is only searched for its maxima, by numpy's vector
loops, and nothing is decoded but those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan, prod
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from adapterops.storage import LazyTensor
from adapterops.storage.dtypes import BITS, to_numpy
from adapterops.storage.tensor import FileSource

if TYPE_CHECKING:
    from concurrent.futures import Future

    import numpy.typing

    Array = numpy.typing.NDArray[Any]

_CHUNK = 1 << 20
"""Bytes read at a time; they stay in the processor's cache while they are searched."""
_WIDE = 1 << 12
"""Elements of several short rows that are compared at a time, since numpy is slow with short ones."""
_MOST_RANKS = 4096
"""The longest axis of which each index is looked at for itself."""
_MUCH, _LARGE = 1 << 24, 3 << 18
"""Bytes in all, and in the usual piece, from which on a thread that reads ahead is worth its start."""
_HEAD = 64
"""Bytes at the beginning of a row (and of a tensor) that are kept to tell it from others."""


class _Bits(NamedTuple):
    """A floating type: the integers of its width, and the bits of infinity and of the first NaN above it."""

    width: int
    infinite: int
    first_nan: int


_BITS: Final[dict[str, _Bits]] = {
    "F64": _Bits(8, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0001),
    "F32": _Bits(4, 0x7F80_0000, 0x7F80_0001),
    "C64": _Bits(4, 0x7F80_0000, 0x7F80_0001),
    "F16": _Bits(2, 0x7C00, 0x7C01),
    "BF16": _Bits(2, 0x7F80, 0x7F81),
    "F8_E5M2": _Bits(1, 0x7C, 0x7D),
    "F8_E4M3": _Bits(1, 0x7F, 0x7F),
    "F8_E5M2FNUZ": _Bits(1, 0x80, 0x80),
    "F8_E4M3FNUZ": _Bits(1, 0x80, 0x80),
}
"""The FNUZ types' one NaN is the byte that would be minus zero; see `_Pass`."""
_INTEGERS: Final = {"BOOL": "u1", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2"} | {
    "U32": "<u4",
    "I32": "<i4",
    "U64": "<u8",
    "I64": "<i8",
}


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the values of one tensor are like.

    `largest` is the largest |value|: None where the type's numbers cannot be read (those narrower than a byte), infinite or
    NaN where the tensor holds such.  `rows` and `columns` are the same for each index of the first and of the second axis,
    where that axis can be the rank of a low-rank factor; None elsewhere.  `heads` are the first bytes of each of `rows`,
    one after the other, `head` those of the whole.
    """

    zero: bool
    """Whether every number is zero (also where there are none)."""
    largest: float | None
    nans: int = 0
    infinities: int = 0
    first: int = -1
    """The position of the first NaN or infinity, counted row by row."""
    rows: tuple[float, ...] | None = None
    columns: tuple[float, ...] | None = None
    heads: bytes = b""
    head: bytes = b""

    @property
    def finite(self) -> bool:
        """Whether it holds neither NaN nor infinity."""
        return self.first < 0

    @property
    def like_rows(self) -> list[list[int]]:
        """Groups of rows that begin alike and have the same largest |value|, which is not zero: perhaps equal ones."""
        if not self.rows:
            return []
        size = len(self.heads) // len(self.rows)
        heads = [self.heads[at : at + size] for at in range(0, len(self.heads), size)]
        if len(set(heads)) == len(heads):
            return []
        groups: dict[tuple[float, bytes], list[int]] = {}
        for at, key in enumerate(zip(self.rows, heads, strict=True)):
            groups.setdefault(key, []).append(at)
        return [group for (value, _), group in groups.items() if value and len(group) > 1]

    @property
    def dead_rows(self) -> tuple[int, ...]:
        """The indices of the first axis under which there are only zeros."""
        return _zeros(self.rows)

    @property
    def dead_columns(self) -> tuple[int, ...]:
        """The indices of the second axis under which there are only zeros."""
        return _zeros(self.columns)


def _zeros(values: tuple[float, ...] | None) -> tuple[int, ...]:
    if values is None or 0.0 not in values:
        return ()
    return tuple(at for at, value in enumerate(values) if value == 0)


def scan(tensors: Mapping[str, LazyTensor]) -> dict[str, Statistics]:
    """The statistics of every tensor, by key.

    Each byte is read once, in the order of the file, and a MiB or two are held; keys of one tensor share its statistics.

    Raises `UnreadableFile` where the bytes are not there.
    """
    same = {key: (id(t.source), t.start, t.dtype, t.shape) for key, t in tensors.items()}
    ordered = sorted(tensors.items(), key=lambda item: (item[1].source.path, item[1].start))
    passes = {same[key]: _Pass(tensor) for key, tensor in ordered}
    _run(list(passes.values()))
    found = {at: one.result() for at, one in passes.items()}
    return {key: found[at] for key, at in same.items()}


def statistics(tensor: LazyTensor, size: int = _CHUNK) -> Statistics:
    """The statistics of one tensor, read `size` bytes at a time.  Raises `UnreadableFile` where its bytes are not there."""
    one = _Pass(tensor)
    _run([one], size)
    return one.result()


def _run(passes: Sequence[_Pass], size: int = _CHUNK) -> None:
    """Read the tensors, one after the other."""
    pieces = [(one, start, length) for one in passes for start, length in one.pieces(size)]
    total = sum(length for _, _, length in pieces)
    ahead = total >= _MUCH and total >= _LARGE * len(pieces)
    if not ahead or not all(isinstance(one.tensor.source, FileSource) for one in passes):
        view = memoryview(bytearray(min(size, max((length for _, _, length in pieces), default=0))))
        for one, start, length in pieces:
            one.tensor.source.readinto(one.tensor.start + start, view[:length])
            one.take(start, view[:length])
        return
    from concurrent.futures import ThreadPoolExecutor

    # While one piece is searched, a thread reads the next: neither needs the interpreter for that.
    views = [memoryview(bytearray(size)) for _ in range(2)]
    with ThreadPoolExecutor(1) as thread:

        def read(at: int) -> Future[None]:
            one, start, length = pieces[at]
            return thread.submit(one.tensor.source.readinto, one.tensor.start + start, views[at % 2][:length])

        coming = read(0)
        for at, (one, start, length) in enumerate(pieces):
            coming.result()
            if at + 1 < len(pieces):
                coming = read(at + 1)
            one.take(start, views[at % 2][:length])


class _Pass:
    """One tensor being read."""

    def __init__(self, tensor: LazyTensor) -> None:
        import numpy as np

        self.np = np
        self.tensor, self.bits = tensor, _BITS.get(tensor.dtype)
        self.readable = self.bits is not None or tensor.dtype in _INTEGERS or tensor.dtype == "F8_E8M0"
        width = self.bits.width if self.bits else BITS[tensor.dtype] // 8 if self.readable else 1
        self.width = width
        self.unsigned = np.dtype(f"<u{width}")
        self.signed = np.dtype(f"<i{width}" if self.bits else _INTEGERS.get(tensor.dtype, "u1"))
        self.mask = self.unsigned.type((1 << (8 * width - 1)) - 1) if self.bits else None
        shape = tensor.shape
        size = tensor.nbytes // width
        count = shape[0] if shape else 1
        self.row = size // count if size else 0
        matrix = len(shape) > 1 and size > 0 and self.readable
        self.by_row = matrix and count <= min(self.row, _MOST_RANKS)
        second = shape[1] if matrix and prod(shape[2:]) == 1 and tensor.dtype != "C64" else 0
        self.by_column = 0 < second <= min(count, _MOST_RANKS)
        self.nans = self.infinities = 0
        self.first = -1
        self.largest: Any = 0
        self.rows = np.zeros(count, self.unsigned) if self.by_row else None
        self.columns = np.zeros(second, self.unsigned) if self.by_column else None
        self.heads: list[bytes] = []
        self.head = b""

    def pieces(self, most: int) -> Iterator[tuple[int, int]]:
        """Ranges of bytes: whole rows, or parts of one, where rows are looked at."""
        end, row = self.tensor.nbytes, self.row * self.width
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
        """Look at a piece, the next one."""
        if not start:
            self.head = bytes(data[:_HEAD])
        if not self.readable:
            self.largest = max(self.largest, int(any(data)))
            return
        values = self.np.frombuffer(data, self.unsigned)
        at = start // self.width
        top = self._search(values, at)
        self.largest = max(self.largest, top)
        if self.bits and (top >= self.bits.infinite or self.tensor.dtype.endswith("FNUZ")):
            self._not_finite(values, at)

    def _search(self, values: Array, at: int) -> int:
        """The largest magnitude among the values, which begin at element `at`; those of rows and columns are kept."""
        np = self.np
        if self.rows is not None:
            if len(values) < self.row:
                index, tops = at // self.row, self._magnitudes(values.reshape(1, -1), 1)
                if at % self.row == 0:
                    self.heads.append(values[: min(self.row, _HEAD // self.width)].tobytes())
            else:
                matrix = values.reshape(-1, self.row)
                index, tops = at // self.row, self._magnitudes(matrix, 1)
                self.heads.append(matrix[:, : _HEAD // self.width].tobytes())
            part = self.rows[index : index + len(tops)]
            np.maximum(part, tops, out=part)
            top = int(tops.max())
            if self.columns is None:
                return top
        if self.columns is not None:
            width = len(self.columns)
            several = max(1, _WIDE // width)
            height = len(values) // width
            whole = height - height % several
            for matrix in (
                values[: whole * width].reshape(-1, several * width),
                values[whole * width :].reshape(-1, width),
            ):
                if len(matrix):
                    found = self._magnitudes(matrix, 0).reshape(-1, width)
                    found = np.maximum.reduce(found, axis=0)
                    np.maximum(self.columns, found, out=self.columns)
            return int(self.columns.max())
        return int(self._magnitudes(values.reshape(1, -1), 1)[0])

    def _magnitudes(self, values: Array, axis: int) -> Array:
        """The largest magnitude along an axis: that of the largest positive number, or of the most negative one.

        As integers with a sign, positive floats come last; as integers without one, negative floats do, in the order of
        their magnitudes.
        """
        np = self.np
        positive: Array = np.maximum.reduce(values.view(self.signed), axis=axis)
        if self.signed.kind == "u":
            return positive
        np.maximum(positive, 0, out=positive)
        if self.bits is None:
            negative: Array = np.minimum.reduce(values.view(self.signed), axis=axis)
            np.minimum(negative, 0, out=negative)
            # Two's complement: minus the least number fits into the unsigned type of the same width.
            negative = np.subtract(0, negative.view(self.unsigned), dtype=self.unsigned)
        else:
            negative = np.maximum.reduce(values, axis=axis)
            np.bitwise_and(negative, self.mask, out=negative)
        np.maximum(positive.view(self.unsigned), negative, out=negative)
        return negative

    def _not_finite(self, values: Array, at: int) -> None:
        """Count the NaN and infinities of a piece that has some, or may have."""
        np, bits = self.np, self.bits
        assert bits is not None
        if self.tensor.dtype.endswith("FNUZ"):
            nans, infinities = values == 0x80, np.zeros(1, bool)
        else:
            plain = values & self.mask
            nans, infinities = plain >= bits.first_nan, (plain >= bits.infinite) & (plain < bits.first_nan)
        self.nans += int(np.count_nonzero(nans))
        self.infinities += int(np.count_nonzero(infinities))
        if self.first < 0 and (self.nans or self.infinities):
            self.first = (at + int(np.argmax(nans | infinities))) // (2 if self.tensor.dtype == "C64" else 1)

    def result(self) -> Statistics:
        """What the pieces told."""
        if not self.readable or not self.tensor.numel:
            return Statistics(not self.largest, None if self.largest else 0.0, head=self.head)
        largest = nan if self.nans else inf if self.infinities else self._number(self.largest)
        zero = largest == 0
        return Statistics(
            zero,
            largest,
            self.nans,
            self.infinities,
            self.first,
            self._numbers(self.rows),
            self._numbers(self.columns),
            b"".join(self.heads),
            self.head,
        )

    def _number(self, magnitude: int) -> float:
        """The number whose bits, without a sign, these are."""
        numbers = self._numbers(self.np.array([magnitude], self.unsigned))
        assert numbers is not None
        return numbers[0]

    def _numbers(self, magnitudes: Array | None) -> tuple[float, ...] | None:
        """The numbers whose bits, without a sign, these are."""
        if magnitudes is None:
            return None
        dtype = "F32" if self.tensor.dtype == "C64" else self.tensor.dtype
        if dtype == "F8_E8M0":  # 2^(x − 127), 0xFF being NaN; it has no zero
            return tuple(nan if x == 0xFF else 2.0 ** (x - 127) for x in magnitudes.tolist())
        if not self.bits:
            return tuple(map(float, magnitudes.tolist()))
        return tuple(to_numpy(dtype, magnitudes.tobytes(), magnitudes.shape).astype("f8").tolist())
