"""WaveFT: a few wavelet coefficients of ΔW.

With `options["use_idwt"]`, ΔW = scaling · (one step of the inverse wavelet transform of D); without, ΔW = scaling · D.
D is zero but for `spectrum` (n,), at places drawn from `options["random_loc_seed"]` (`shared.positions`) for
`options["shape"]`.  For the transform D is made larger by the length of the filters (`options["wavelet_family"]`) less
two, and to even numbers of rows and columns, with (out, in) in its middle; its quarters are the four bands
(`wavelets.inverse`), and the middle of the result is ΔW.  None of these options is in the tensors, and with wrong ones a
file still loads; so they have to be said.

A coefficient alone gives a matrix of rank one.  Where n is small beside the module, ΔW has exact factors of rank n.

Sources: peft `tuners/waveft/layer.py`; https://arxiv.org/abs/2505.12532.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from adapterops.adapter import Update
from adapterops.errors import CannotRepresent
from adapterops.methods.base import need_shape, setting
from adapterops.methods.fourierft import Spectral
from adapterops.methods.shared import numbers, positions
from adapterops.methods.wavelets import families, low_pass, synthesise

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class WaveFt(Spectral):
    """WaveFT on linear modules."""

    name = "waveft"
    title = "WaveFT (sparse wavelet coefficients)"
    formula = "ΔW = scaling·(an inverse wavelet step of D), D the coefficients at random places"
    form = "rank n_frequency, where that is at most half of the smaller side; else by singular values"
    source = "https://arxiv.org/abs/2505.12532"

    def exact_rank(self, update: Update) -> int | None:
        """n, where that is low; None where the shape is unknown, too."""
        shape, rank = self.weight_shape(update), update.tensors["spectrum"].numel
        return rank if shape is not None and 2 * rank <= min(shape) else None

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor] | None:
        import numpy as np
        import torch

        if self.exact_rank(update) is None:
            return None
        out, inputs = need_shape(update)[:2]
        placed = self._placed(update)
        ends = ((out, placed.size[0], placed.rows), (inputs, placed.size[1], placed.columns))
        left, right = (placed.signals(_one_hot(size, at), count) for count, size, at in ends)
        b = left * placed.coefficients
        return torch.from_numpy(b), torch.from_numpy(np.ascontiguousarray(right.T))

    def delta(self, update: Update) -> torch.Tensor:
        import numpy as np
        import torch

        out, inputs = need_shape(update)[:2]
        placed = self._placed(update)
        dense = np.zeros(placed.size)
        dense[placed.rows, placed.columns] = placed.coefficients
        made = placed.signals(placed.signals(dense, out).T, inputs).T
        return torch.from_numpy(np.ascontiguousarray(made)).float()

    def _placed(self, update: Update) -> _Placed:
        """D, with the bands at top right and bottom left exchanged: peft passes what stands there to the filters that
        are high along the rows and along the columns, not the other way round."""
        coefficients = numbers(update.tensors["spectrum"]) * float(setting(update, "scaling"))
        rows, columns = positions(update, len(coefficients))
        out, inputs = need_shape(update)[:2]
        if not setting(update, "use_idwt"):
            return _Placed(coefficients, rows, columns, (out, inputs), None)
        family = str(setting(update, "wavelet_family"))
        low = low_pass(family)
        if low is None:
            raise CannotRepresent(
                f"{update.name}: peft has no filter of the wavelet {family!r} that its layers could use, so this adapter has "
                f"no delta there either; those with one are {', '.join(families())} (--set wavelet_family=NAME)"
            )
        height, width = (size + len(low) - 2 + size % 2 for size in (out, inputs))
        rows, columns = rows + (height - out) // 2, columns + (width - inputs) // 2
        low_rows, low_columns = rows < height // 2, columns < width // 2
        crossed = (low_columns.astype(int) - low_rows.astype(int)) * (low_rows != low_columns)
        return _Placed(
            coefficients, rows - crossed * (height // 2), columns + crossed * (width // 2), (height, width), low
        )


class _Placed(NamedTuple):
    """Coefficients at their places in a matrix of `size`, which the filter `low` (None: nothing) makes ΔW of."""

    coefficients: Array
    rows: Array
    columns: Array
    size: tuple[int, int]
    low: tuple[float, ...] | None

    def signals(self, coefficients: Array, count: int) -> Array:
        """The middle `count` rows of what the columns are the coefficients of."""
        if self.low is None:
            return coefficients
        made = synthesise(coefficients, self.low)
        start = (len(made) - count) // 2
        return made[start : start + count]


def _one_hot(size: int, at: Array) -> Array:
    """(size, n), one at the place of each column."""
    import numpy as np

    out = np.zeros((size, len(at)))
    out[at, np.arange(len(at))] = 1.0
    return out
