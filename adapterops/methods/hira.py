"""HiRA on linear, convolution and embedding modules: a low-rank matrix that multiplies the weight number by number.

ΔW = W ∘ (B·A), r being the rank:

- linear: A (r, in_features), B (out_features, r)
- convolution: A (r, in_channels, *kernel), B (out_channels, r, 1, …); not for groups
- embedding (`options["kind"]` is "embedding"): A (r, num_embeddings), B (embedding_dim, r); ΔW = W ∘ (B·A)ᵀ

There is no scale.  ΔW has the base's rank, whatever r is.  A row of ΔW needs that row of B alone, so parts of a fused
projection can be cut out and joined.

peft 0.21.2 cannot compute B·A where the first two sizes of a Conv3d's kernel are 1 (its forward stops at the shapes).

Sources: https://openreview.net/forum?id=TwJrTz9cRS; peft `tuners/hira/layer.py`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need
from adapterops.methods.lora import product_error
from adapterops.methods.own import fitting

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class Hira(Method):
    """HiRA."""

    name = "hira"
    title = "HiRA (Hadamard product with the weight)"
    formula = "ΔW = W ∘ (B·A)"
    source = "https://openreview.net/forum?id=TwJrTz9cRS"
    needs_weight = True
    rows = frozenset({"B"})
    pairs = (("B", "A"),)

    def check(self, update: Update) -> None:
        need(update, "A", "B")
        a, b = update.tensors["A"], update.tensors["B"]
        for factor in (a, b):
            if len(factor.shape) < 2 or 0 in factor.shape:
                raise BrokenAdapter(f"{factor.where}: shape {list(factor.shape)} is no low-rank factor")
        if a.shape[0] != b.shape[1]:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} has rank {b.shape[1]}, but {a.key!r} {list(a.shape)} has rank "
                f"{a.shape[0]}; they are not halves of one update",
                fault="ranks",
            )
        if prod(b.shape[2:]) != 1:
            raise BrokenAdapter(f"{b.where}: shape {list(b.shape)}; the second factor must have a 1×1 kernel")

    def rank(self, update: Update) -> int:
        return update.tensors["B"].shape[1]

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        a, b = update.tensors.get("A"), update.tensors.get("B")
        if a is None or b is None or len(a.shape) < 2 or len(b.shape) < 2:
            return True  # `check` says it better than a shape could
        made = (a.shape[1], b.shape[0]) if _embeds(update) else (b.shape[0], *a.shape[1:])
        return made == shape

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(
            f"{update.name}: HiRA multiplies the module's weight, so its delta needs the base weight (--base-weights)"
        )

    def change(self, update: Update, own: Own | None = None) -> Change:
        import torch

        weight = fitting(self, update, own).weight
        left, right = (torch.from_numpy(factor) for factor in self._factors(update))
        product = left @ right
        product = product.T if _embeds(update) else product.reshape(weight.shape)
        return Change((weight.double() * product).float())

    def error(self, update: Update, other: Update) -> float:
        (b, a), (b2, a2) = self._factors(update), self._factors(other)
        if (len(b), a.shape[1], _embeds(update)) != (len(b2), a2.shape[1], _embeds(other)):
            return float("inf")
        return product_error(b, a, b2, a2)

    def _factors(self, update: Update) -> tuple[Array, Array]:
        """B (out, r) and A (r, in · kernel) in float64."""
        b, a = (update.tensors[role].numpy().astype("f8") for role in "BA")
        return b.reshape(len(b), -1), a.reshape(len(a), -1)


def _embeds(update: Update) -> bool:
    return update.options.get("kind") == "embedding"
