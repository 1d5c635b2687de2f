"""The tensors that an element-wise merge method works on: K of one shape, perhaps too large to be held at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from adapterops.errors import UsageError
from adapterops.linalg.random import Draw

if TYPE_CHECKING:
    import torch


class Stack(Protocol):
    """K tensors (rows, columns) in float32, scales included, weights aside.

    Two ways to look at them, so that no more than one whole tensor is ever held: one after the other (`whole`), and
    all of them a few rows at a time (`blocks`).  `absent` is how many adapters beside these K are merged and have nothing
    here, or no weight: zeros, of which no method but one that compares adapters needs to know.
    """

    weights: tuple[float, ...]
    shape: tuple[int, int]
    absent: int

    def __len__(self) -> int:
        """K."""

    def whole(self, k: int) -> torch.Tensor:
        """Tensor `k`.  May be changed in place; is gone with the next call of `whole` or `blocks`."""

    def blocks(self) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        """(start, stop, those rows of each tensor), in order.  May be changed in place; gone with the next step."""

    def uniform(self, k: int, start: int, stop: int) -> torch.Tensor:
        """Random numbers in [0, 1), float32, for rows [start, stop) of tensor `k`.

        They depend on the seed, the module, the tensor's role and `k` alone: not on the device, nor on the blocks.
        """

    def keep(self, k: int, start: int, stop: int, density: float) -> torch.Tensor:
        """A random mask (bool) for rows [start, stop) of tensor `k`: true with probability `density`."""

    def empty(self) -> torch.Tensor:
        """A tensor (rows, columns), float32, for the result.  It outlives the stack."""


class TensorStack:
    """A stack of tensors that are small enough to be held: factors, vectors.

    `rows` is how many of them a block has.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        weights: Sequence[float],
        draws: Sequence[Draw],
        rows: int = 0,
        absent: int = 0,
    ) -> None:
        self._tensors = tensors
        self._draws = draws
        self._rows = rows or max(1, tensors[0].shape[0])
        self.weights = tuple(weights)
        self.absent = absent
        self.shape = (tensors[0].shape[0], tensors[0].shape[1])

    def __len__(self) -> int:
        return len(self._tensors)

    def whole(self, k: int) -> torch.Tensor:
        return _copy(self._tensors[k])

    def blocks(self) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        for start in range(0, self.shape[0], self._rows):
            stop = min(start + self._rows, self.shape[0])
            yield start, stop, [_copy(t[start:stop]) for t in self._tensors]

    def uniform(self, k: int, start: int, stop: int) -> torch.Tensor:
        return random_block(self._draws[k].uniform, start, stop, self.shape[1], self._tensors[k].device)

    def keep(self, k: int, start: int, stop: int, density: float) -> torch.Tensor:
        return random_block(
            lambda i, j: self._draws[k].keep(i, j, density), start, stop, self.shape[1], self._tensors[k].device
        )

    def empty(self) -> torch.Tensor:
        import torch

        return self._tensors[0].new_empty(self.shape, dtype=torch.float32)


LARGEST = 2.0**128 - 2.0**104
"""Of float32."""


def insist_on_float32(factors: Sequence[float]) -> None:
    """Raise `UsageError` for a factor that float32 tensors cannot be multiplied by."""
    for factor in factors:
        if not abs(factor) <= LARGEST:
            raise UsageError(
                f"a tensor would be multiplied by {factor:.3g} (weight and scale, and what makes up for dropped entries), "
                "more than float32 holds: give smaller weights, or a larger density"
            )


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float64; on the CPU where the device (MPS) has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.to(torch.float32, copy=True)


def random_block(
    draw: Callable[[int, int], Any], start: int, stop: int, width: int, device: torch.device
) -> torch.Tensor:
    """Numbers for rows [start, stop) of a matrix of that width, drawn on the CPU whatever the device."""
    import torch

    return torch.from_numpy(draw(start * width, stop * width)).reshape(stop - start, width).to(device)
