"""C3A on linear modules: a weight delta made of circulant blocks, each one vector long.

`kernel` (out_features / b, in_features / b, b), b being the block size: the block of ΔW in row m and column n of blocks
is circulant, ΔW[m·b + p, n·b + s] = kernel[m, n, (s − p) mod b] / in_features.

peft computes the same through the FFT (y = FFT(FFT⁻¹(x) · FFT(kernel)), a circular correlation); no rank is low: a
circulant block has as many non-zero singular values as its kernel's spectrum.  Where several C3A adapters are active at
once, peft feeds each one the output of the one before; that is no change of weights and is not followed.

Sources: https://arxiv.org/abs/2407.19342; peft `tuners/c3a/layer.py`, `tuners/c3a/utils.py`.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import Method, need, tensor_error
from adapterops.methods.products import Rows
from adapterops.storage.tensor import is_zero

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class C3a(Method):
    """C3A."""

    name = "c3a"
    title = "C3A (circulant blocks)"
    formula = "ΔW = circulant blocks of the kernels / in_features"
    source = "https://arxiv.org/abs/2407.19342"

    def check(self, update: Update) -> None:
        need(update, "kernel")
        kernel = update.tensors["kernel"]
        if len(kernel.shape) != 3 or 0 in kernel.shape:
            raise BrokenAdapter(
                f"{kernel.where}: shape {list(kernel.shape)} is no kernel of C3A: (out_features / block_size, "
                "in_features / block_size, block_size)"
            )

    def block_size(self, update: Update) -> int:
        """b."""
        return update.tensors["kernel"].shape[2]

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        kernel = update.tensors.get("kernel")
        if kernel is None or len(kernel.shape) != 3:
            return True  # `check` says it better than a shape could
        return self.weight_shape(update) == shape

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["kernel"])

    def norm(self, update: Update) -> float:
        """Every number of a kernel stands in b places."""
        import numpy as np

        size = float(np.linalg.norm(self._kernel(update).reshape(-1)))
        return sqrt(self.block_size(update)) * size / self.weight_shape(update)[1]

    def weight_shape(self, update: Update) -> tuple[int, int]:
        rows, columns, size = update.tensors["kernel"].shape
        return rows * size, columns * size

    def delta(self, update: Update) -> torch.Tensor:
        return self.matrix(update).dense()

    def matrix(self, update: Update) -> Rows:
        import numpy as np

        shape = self.weight_shape(update)
        kernel, size = self._kernel(update) / shape[1], self.block_size(update)

        def at(start: int, stop: int) -> Array:
            block, row = np.divmod(np.arange(start, stop), size)
            places = (np.arange(size) - row[:, None]) % size
            made: Array = np.take_along_axis(kernel[block], places[:, None, :], axis=2)
            return made.reshape(stop - start, -1)

        return Rows(shape, at)

    def error(self, update: Update, other: Update) -> float:
        one, two = update.tensors["kernel"], other.tensors["kernel"]
        # With one block size the delta is the kernel's own numbers, all of them as often.
        return tensor_error(one, two) if one.shape == two.shape else self.matrix(update).error(self.matrix(other))

    def _kernel(self, update: Update) -> Array:
        """The kernel in float64."""
        values: Array = update.tensors["kernel"].numpy().astype("f8")
        return values
