"""FourierFT: a few coefficients of ΔW's spectrum.

ΔW = scaling · Re(F⁻¹(D)), F⁻¹ being the two-dimensional inverse Fourier transform (divided by out · in) and D (out, in)
zero but for `spectrum` (n,).  Where its numbers stand is drawn from `options["random_loc_seed"]` (`shared.positions`),
for `options["shape"]`.  Neither this seed nor `options["scaling"]` is in the tensors, and with a wrong one a file still
loads; so they have to be said.

A coefficient at (k, l) gives cos(k·m + l·n) = cos·cos − sin·sin: rank two.  Where n is small beside the module, ΔW
has exact factors of rank 2n.

Sources: https://arxiv.org/abs/2405.03003; peft `tuners/fourierft/layer.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.methods.base import Method, need, need_shape, setting
from adapterops.methods.shared import check_vector, numbers, positions
from adapterops.storage.tensor import is_zero

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class Spectral(Method):
    """A method whose only tensor is `spectrum` (n,): coefficients at random places."""

    needs_shape = True
    compared = frozenset({"shape"})

    def check(self, update: Update) -> None:
        need(update, "spectrum")
        check_vector(update.tensors["spectrum"])

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        spectrum = update.tensors.get("spectrum")
        return len(shape) == 2 and (spectrum is None or spectrum.numel <= shape[0] * shape[1])

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["spectrum"])

    def weight_shape(self, update: Update) -> tuple[int, ...] | None:
        shape = update.options.get("shape")
        return None if shape is None else tuple(shape)


class FourierFt(Spectral):
    """FourierFT on linear modules."""

    name = "fourierft"
    title = "FourierFT (sparse spectrum)"
    formula = "ΔW = scaling·Re(F⁻¹(D)), D the coefficients at random places"
    form = "rank 2·n_frequency, where that is at most half of the smaller side; else by singular values"
    source = "https://arxiv.org/abs/2405.03003"

    def exact_rank(self, update: Update) -> int | None:
        """2n, where that is low; None where the shape is unknown, too."""
        shape, rank = self.weight_shape(update), 2 * update.tensors["spectrum"].numel
        return rank if shape is not None and 2 * rank <= min(shape) else None

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor] | None:
        import numpy as np
        import torch

        if self.exact_rank(update) is None:
            return None
        out, inputs = need_shape(update)[:2]
        coefficients = numbers(update.tensors["spectrum"]) * (float(setting(update, "scaling")) / (out * inputs))
        rows, columns = positions(update, len(coefficients))
        left = np.outer(np.arange(out), rows) % out * (2 * np.pi / out)
        right = np.outer(columns, np.arange(inputs)) % inputs * (2 * np.pi / inputs)
        b = np.hstack([np.cos(left) * coefficients, -np.sin(left) * coefficients])
        return torch.from_numpy(b), torch.from_numpy(np.vstack([np.cos(right), np.sin(right)]))

    def delta(self, update: Update) -> torch.Tensor:
        import numpy as np
        import torch

        coefficients = numbers(update.tensors["spectrum"])
        scaling = float(setting(update, "scaling"))
        dense = np.zeros(need_shape(update)[:2])
        dense[positions(update, len(coefficients))] = coefficients
        return torch.from_numpy(np.ascontiguousarray(np.fft.ifft2(dense).real * scaling)).float()
