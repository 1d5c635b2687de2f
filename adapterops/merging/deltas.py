"""A stack of weight deltas, of which never more than one is whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from adapterops.linalg.random import Draw
from adapterops.merging.stack import random_block
from adapterops.merging.stack import wide as wide
from adapterops.merging.terms import Term

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 17
"""Numbers of one adapter's block: half a MiB of float32, so that the blocks of a few adapters stay in the cache."""

_WIDE = 64
"""Factors of a higher rank cost more to multiply than a Kronecker or Hadamard product's rows cost to make."""

Fill = Callable[[int, int, "torch.Tensor"], None]
"""Writes rows [start, stop) of a delta into a tensor of that many rows."""


class DeltaStack:
    """The deltas of several adapters on one module, float32, as `Stack` describes."""

    def __init__(self, terms: Sequence[Term], draws: Sequence[Draw], device: torch.device, absent: int = 0) -> None:
        shape = terms[0].shape
        self.weights = tuple(term.weight for term in terms)
        self.absent = absent
        self.shape = (shape.rows, shape.columns)
        self._draws, self._device = draws, device
        self._fills = [filler(term, device) for term in terms]
        self._whole: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self._fills)

    def whole(self, k: int) -> torch.Tensor:
        # The room of the result serves before there is one.
        if self._whole is None:
            self._whole = self._room(self.shape[0])
        for start, stop in self._steps():
            # By the same steps as `blocks`: a sum of products may round otherwise in a larger one.
            self._fills[k](start, stop, self._whole[start:stop])
        return self._whole

    def blocks(self) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        room = [self._room(next(self._steps())[1]) for _ in self._fills]
        for start, stop in self._steps():
            values = [part[: stop - start] for part in room]
            for fill, part in zip(self._fills, values, strict=True):
                fill(start, stop, part)
            yield start, stop, values

    def _steps(self) -> Iterator[tuple[int, int]]:
        rows, columns = self.shape
        step = block_rows(columns, self._device)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)

    def uniform(self, k: int, start: int, stop: int) -> torch.Tensor:
        return random_block(self._draws[k].uniform, start, stop, self.shape[1], self._device)

    def keep(self, k: int, start: int, stop: int, density: float) -> torch.Tensor:
        draw = self._draws[k]
        return random_block(lambda i, j: draw.keep(i, j, density), start, stop, self.shape[1], self._device)

    def empty(self) -> torch.Tensor:
        taken, self._whole = self._whole, None
        return taken if taken is not None else self._room(self.shape[0])

    def _room(self, rows: int) -> torch.Tensor:
        import torch

        return torch.empty((rows, self.shape[1]), dtype=torch.float32, device=self._device)


def block_rows(columns: int, device: torch.device) -> int:
    """The rows of a block on a device."""
    # A GPU has no such cache, and a launch costs more than a block of this size.
    return max(1, (BLOCK if device.type == "cpu" else BLOCK << 6) // columns)


def filler(term: Term, device: torch.device) -> Fill:
    """What writes the rows of a term's delta, the scale included and the weight aside."""
    import torch

    pair = term.pair() if term.plain or (term.exact_rank or _WIDE + 1) <= _WIDE else None
    if pair is not None:
        b = to_device((pair[0].double() * term.scale).float(), device)
        a = to_device(pair[1], device).float()

        def multiply(start: int, stop: int, out: torch.Tensor) -> None:
            torch.mm(b[start:stop], a, out=out)

        return multiply
    matrix = term.matrix()

    def copy(start: int, stop: int, out: torch.Tensor) -> None:
        step = max(1, BLOCK // matrix.shape[1])
        for low in range(start, stop, step):
            high = min(low + step, stop)
            out[low - start : high - start].copy_(torch.from_numpy(matrix.at(low, high)))

    return copy


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device, by way of pinned memory where that lets the copy overlap other work."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
