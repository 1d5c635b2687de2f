"""DeLoRA on linear modules: low-rank factors of length one, times a learned bound and the norms of the base's columns.

ΔW = B · diag(lambda / (r · ‖A_t‖ · ‖B^t‖)) · A · diag(w_norm), A_t being the rows of A and B^t the columns of B, no norm
counted below 1e-4.  Shapes:

- `A` (r, in_features), `B` (out_features, r), `lambda` (1,)
- `w_norm` (in_features,): the norms of the base weight's columns when the adapter was made, which is saved with it

So ΔW is exactly of rank r and needs no base weight.  The lengths of B's columns go over all outputs: parts of a fused
projection cannot be cut out of the factors.

Sources: https://arxiv.org/abs/2503.18225; peft `tuners/delora/layer.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import Method, need
from adapterops.methods.lora import factor_norm, product_error
from adapterops.methods.products import Rows
from adapterops.storage.tensor import is_zero

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]

SHORTEST = 1e-4
"""The norm that shorter vectors are divided by, as in peft."""


class Delora(Method):
    """DeLoRA."""

    name = "delora"
    title = "DeLoRA (normalised factors)"
    formula = "ΔW = B·diag(λ/(r·‖A_i‖·‖B_i‖))·A·diag(w_norm)"
    form = "rank r"
    source = "https://arxiv.org/abs/2503.18225"

    def check(self, update: Update) -> None:
        need(update, "A", "B", "lambda", "w_norm")
        a, b, bound, norms = (update.tensors[role] for role in ("A", "B", "lambda", "w_norm"))
        for factor in (a, b):
            if len(factor.shape) != 2 or 0 in factor.shape:
                raise BrokenAdapter(f"{factor.where}: shape {list(factor.shape)} is no low-rank factor")
        if a.shape[0] != b.shape[1]:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} has rank {b.shape[1]}, but {a.key!r} {list(a.shape)} has rank "
                f"{a.shape[0]}; they are not halves of one update",
                fault="ranks",
            )
        if bound.numel != 1:
            raise BrokenAdapter(f"{bound.where}: shape {list(bound.shape)}; the bound of DeLoRA is one number")
        if norms.shape != (a.shape[1],):
            raise BrokenAdapter(
                f"{norms.where}: shape {list(norms.shape)}; the norms of the base weight's columns are one an input: "
                f"[{a.shape[1]}], as {a.key!r} {list(a.shape)} says"
            )

    def rank(self, update: Update) -> int:
        return update.tensors["B"].shape[1]

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        a, b = update.tensors.get("A"), update.tensors.get("B")
        if a is None or b is None or (len(a.shape), len(b.shape)) != (2, 2):
            return True  # `check` says it better than a shape could
        return self.weight_shape(update) == shape

    def is_nothing(self, update: Update) -> bool:
        return any(is_zero(update.tensors[role]) for role in ("B", "lambda"))

    def norm(self, update: Update) -> float:
        return factor_norm(*self._factors(update))

    def weight_shape(self, update: Update) -> tuple[int, int]:
        return update.tensors["B"].shape[0], update.tensors["A"].shape[1]

    def exact_rank(self, update: Update) -> int:
        return self.rank(update)

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
        """B with everything that belongs to a rank, A with the norms of the columns."""
        import torch

        b, a = self._factors(update)
        return torch.from_numpy(b), torch.from_numpy(a)

    def matrix(self, update: Update) -> Rows:
        b, a = self._factors(update)
        return Rows((len(b), a.shape[1]), lambda start, stop: b[start:stop] @ a)

    def error(self, update: Update, other: Update) -> float:
        if self.weight_shape(update) != self.weight_shape(other):
            return float("inf")
        return product_error(*self._factors(update), *self._factors(other))

    def _factors(self, update: Update) -> tuple[Array, Array]:
        """(out, r) and (r, in) in float64, whose product is ΔW."""
        import numpy as np

        a, b, bound, norms = (update.tensors[role].numpy().astype("f8") for role in ("A", "B", "lambda", "w_norm"))
        lengths = (np.maximum(np.linalg.norm(f, axis=axis), SHORTEST) for f, axis in ((a, 1), (b, 0)))
        for length in lengths:
            b = b / length
        return b * (bound.reshape(()) / len(a)), a * norms
