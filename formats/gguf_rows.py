"""Tensors in another arrangement, computed when they are read: rows in another order, axes of stacks exchanged.

Numbers are moved and never changed, so every arrangement is undone bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from adapterops.plugin import LazyTensor, errors

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]


@dataclass(slots=True)
class _Rearranged:
    """The bytes of a tensor, `view`ed as another shape, its axes in the order of `axes`, then its rows as in `order`."""

    tensor: LazyTensor
    view: tuple[int, ...]
    axes: tuple[int, ...]
    order: tuple[int, ...] | None = None
    _bytes: memoryview | None = field(default=None, repr=False)

    @property
    def path(self) -> str:
        """The file that the values come from."""
        return self.tensor.source.path

    def readinto(self, start: int, buffer: memoryview) -> None:
        data = self._bytes if self._bytes is not None else self._made()
        buffer[:] = data[start : start + len(buffer)]
        # Not kept once read through, so that memory follows the largest tensor.
        self._bytes = data if start + len(buffer) < len(data) else None

    def _made(self) -> memoryview:
        import numpy as np

        raw = self.tensor.read()
        values: Array = np.frombuffer(raw, dtype=f"V{max(1, len(raw) // max(1, self.tensor.numel))}")
        values = values.reshape(self.view).transpose(self.axes)
        if self.order is not None:
            values = values[np.asarray(self.order)]
        return memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


class _Unknown:
    """Rows whose order no source tells: whoever reads them is told what would."""

    def __init__(self, tensor: LazyTensor, sentence: str) -> None:
        self.path, self._sentence = tensor.source.path, sentence

    def readinto(self, start: int, buffer: memoryview) -> None:
        """Raise `UnknownFact`."""
        raise errors.UnknownFact(self._sentence)


@lru_cache(maxsize=64)
def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    out = [0] * len(order)
    for at, row in enumerate(order):
        out[row] = at
    return tuple(out)


def with_rows(tensor: LazyTensor, order: Sequence[int], back: bool = False) -> LazyTensor:
    """The matrix (rows, columns) with row `order[i]` at i; with `back`, the one of which this was made."""
    order = tuple(order)
    order = _inverse(order) if back else order
    shape = tensor.shape
    source = _Rearranged(tensor, shape, tuple(range(len(shape))), order)
    return LazyTensor(tensor.key, tensor.dtype, shape, source, 0)


def of_unknown_rows(tensor: LazyTensor, sentence: str) -> LazyTensor:
    """The tensor, to be looked at but not read: reading raises `UnknownFact` with `sentence`."""
    return LazyTensor(tensor.key, tensor.dtype, tensor.shape, _Unknown(tensor, sentence), 0)


def exchanged(tensor: LazyTensor, view: tuple[int, ...], axes: tuple[int, ...], shape: tuple[int, ...]) -> LazyTensor:
    """The tensor as `view`, its axes in the order of `axes`, as `shape`; all three have as many elements."""
    assert tensor.numel == prod(view) == prod(shape)
    return LazyTensor(tensor.key, tensor.dtype, shape, _Rearranged(tensor, view, axes), 0)
