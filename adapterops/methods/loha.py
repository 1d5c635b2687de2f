"""LoHa: the elementwise product of two low-rank products, on linear and convolution modules, with DoRA magnitudes.

ΔW = s · (w1_a·w1_b) ∘ (w2_a·w2_b), s = alpha / r (alpha / √r where the update says rsLoRA).  Shapes, r being the rank:

- linear: w1_a, w2_a (out_features, r); w1_b, w2_b (r, in_features)
- convolution: w1_a, w2_a (out_channels, r); w1_b, w2_b (r, in_channels · kernel), usually flattened
- convolution with Tucker cores t1, t2 (r, r, *kernel): w1_a, w2_a (r, out_channels); w1_b, w2_b (r, in_channels); the
  first index of a core belongs to `_a`, the second to `_b`
- `magnitude` (n,): as in `lora`

lycoris-lora up to 1.9 computed with t1 where t2 should stand; nothing in a file tells, so cores are taken at their
names.  LyCORIS writes an rsLoRA scale into alpha itself (alpha · √r), and `use_scalar` into w1_a.  Its 4.1.3 merges
(`get_diff_weight`, `get_merged_weight`) apply the scale twice; the scale here is that of its forward, which trains.

Sources: https://arxiv.org/abs/2108.06098 (FedPara); LyCORIS `lycoris/modules/loha.py`, `lycoris/functional/loha.py`;
peft `tuners/loha/layer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Method, need, worst
from adapterops.methods.products import (
    Rows,
    Shape,
    alpha_over_rank,
    check_magnitude,
    known,
    magnitude_error,
    magnitude_rows,
    pair_factors,
    pair_shape,
)
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]

HALVES = (("w1_a", "w1_b", "t1"), ("w2_a", "w2_b", "t2"))
"""The roles of the two low-rank products."""


class Loha(Method):
    """LoHa, also called FedPara.  `pairs` hold where there are no Tucker cores."""

    name = "loha"
    title = "LoHa (Hadamard product)"
    formula = "ΔW = s·(w1_a·w1_b) ∘ (w2_a·w2_b)"
    form = "rank r², where that is at most half of the smaller side; else by singular values"
    source = "https://arxiv.org/abs/2108.06098"
    scaled = True
    rows = frozenset({"w1_a", "w2_a", "magnitude"})
    pairs = (("w1_a", "w1_b"), ("w2_a", "w2_b"))

    def check(self, update: Update) -> None:
        need(update, "w1_a", "w1_b", "w2_a", "w2_b")
        cores = update.tensors.keys() & {"t1", "t2"}
        if cores:
            need(update, "t1", "t2")
        one, two = (pair_shape(update, *half) for half in HALVES)
        a, b = update.tensors["w1_a"], update.tensors["w2_a"]
        if one.rank != two.rank:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} has rank {two.rank}, but {a.key!r} {list(a.shape)} has rank {one.rank}; "
                "alpha / rank would have two meanings",
                fault="ranks",
            )
        if (one.out, one.columns) != (two.out, two.columns):
            raise BrokenAdapter(
                f"{b.where}: makes a matrix {[two.out, two.columns]}, but {a.key!r} one of {[one.out, one.columns]}; they "
                "cannot be multiplied element by element"
            )
        check_magnitude(update, one.out, one.inputs)

    def rank(self, update: Update) -> int:
        return update.tensors["w1_b"].shape[0]

    def scale(self, update: Update) -> float | None:
        return alpha_over_rank(update, self.rank(update))

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        try:
            return self._shape(update).fits(shape)
        except BrokenAdapter:
            return True  # `check` says it better than a shape could

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        if "t1" in update.tensors:
            raise CannotRepresent(
                f"{update.name}: a LoHa with Tucker cores (tensor {update.tensors['t1'].key!r}) keeps its outputs in "
                "columns and is not split into the parts of a fused projection; a target that keeps the projection whole "
                "holds it (--to kohya, --to comfy)"
            )
        taken = {role: t.rows(pieces) if role in ("w1_a", "w2_a") else t for role, t in update.tensors.items()}
        return taken | magnitude_rows(update, pieces)

    def folded(self, update: Update, dtype: str | None) -> dict[str, LazyTensor]:
        scale = known(update, self.scale(update))
        return {role: t.mapped(dtype, scale if role == "w1_a" else 1.0) for role, t in update.tensors.items()}

    def delta(self, update: Update) -> torch.Tensor:
        """ΔW in float32 before any DoRA normalisation; (out, in · kernel) where the file holds the kernel flattened."""
        shape = self._shape(update)
        return self._matrix(update).dense().reshape(shape.out, shape.inputs, *shape.kernel)

    def norm(self, update: Update) -> float:
        return self._matrix(update).norm()

    def error(self, update: Update, other: Update) -> float:
        return worst([self._matrix(update).error(self._matrix(other)), magnitude_error(update, other)])

    def weight_shape(self, update: Update) -> tuple[int, ...]:
        shape = self._shape(update)
        return (shape.out, shape.inputs, *shape.kernel)

    def exact_rank(self, update: Update) -> int | None:
        """r², where that is still low."""
        shape = self._shape(update)
        return shape.rank**2 if 2 * shape.rank**2 <= min(shape.out, shape.columns) else None

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Every pair of a column of w1 and one of w2, multiplied."""
        import torch

        if self.exact_rank(update) is None:
            return None
        shape = self._shape(update)
        (a1, b1), (a2, b2) = (map(torch.from_numpy, pair_factors(update, *half)) for half in HALVES)
        left = torch.einsum("mi,mj->mij", a1, a2).reshape(shape.out, -1)
        right = torch.einsum("in,jn->ijn", b1, b2).reshape(-1, shape.columns)
        return left, right

    def matrix(self, update: Update) -> Rows:
        return self._matrix(update)

    def _shape(self, update: Update) -> Shape:
        return pair_shape(update, *HALVES[0])

    def _matrix(self, update: Update) -> Rows:
        (a1, b1), (a2, b2) = (pair_factors(update, *half) for half in HALVES)
        a1 = a1 * known(update, self.scale(update))

        def at(start: int, stop: int) -> Array:
            product: Array = a1[start:stop] @ b1
            product *= a2[start:stop] @ b2
            return product

        return Rows((len(a1), b1.shape[1]), at)
