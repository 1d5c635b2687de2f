"""VB-LoRA: LoRA factors that are put together out of one bank of vectors.

Each piece of `length` numbers of A's rows and B's columns is a mixture of K vectors of the bank: those with the K
largest logits, weighted by their softmax.  ΔW = B·A, exactly of rank r.  Roles:

- `bank` (vectors, length): of the whole model, the same tensor for every update
- `logits_A` (r, in / length, vectors), `logits_B` (out / length, r, vectors); K is `options["topk"]`, which is in no
  tensor
- or, from `save_only_topk_weights`, for both: `logits_A_topk_indices` (r, in / length, K), integers, and
  `logits_A_topk_weights` (r, in / length, K − 1): the last weight is what is left to one

Sources: https://arxiv.org/abs/2405.15179; peft `tuners/vblora/layer.py`, `tuners/vblora/model.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import need, setting
from adapterops.methods.shared import Factored, check_dimensions, check_integers, numbers
from adapterops.storage.tensor import is_zero

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]

INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


class Vblora(Factored):
    """VB-LoRA on linear modules."""

    name = "vblora"
    title = "VB-LoRA (a shared bank of vectors)"
    formula = "ΔW = B·A, their pieces mixtures of the K likeliest vectors of a shared bank"
    form = "rank r"
    source = "https://arxiv.org/abs/2405.15179"

    def check(self, update: Update) -> None:
        need(update, "bank")
        bank = update.tensors["bank"]
        check_dimensions(bank, 2)
        for factor in ("logits_A", "logits_B"):
            if factor + INDICES in update.tensors or factor + WEIGHTS in update.tensors:
                self._check_topk(update, factor)
            else:
                need(update, factor)
                logits = update.tensors[factor]
                check_dimensions(logits, 3)
                if logits.shape[2] != bank.shape[0]:
                    raise BrokenAdapter(
                        f"{logits.where}: shape {list(logits.shape)} has logits for {logits.shape[2]} vectors, but the bank "
                        f"({bank.key!r}) holds {bank.shape[0]}"
                    )
        a, b = self._tiles(update, "logits_A"), self._tiles(update, "logits_B")
        if a[0] != b[1]:
            raise BrokenAdapter(
                f"{self._first(update, 'logits_B').where}: rank {b[1]}, but {self._first(update, 'logits_A').key!r} has rank "
                f"{a[0]}; they are not halves of one update",
                fault="ranks",
            )
        topk = update.options.get("topk")
        if topk is not None and not 0 < topk <= bank.shape[0]:
            raise BrokenAdapter(f"{bank.where}: {bank.shape[0]} vectors, of which topk={topk} cannot be mixed")

    def _check_topk(self, update: Update, factor: str) -> None:
        need(update, factor + INDICES, factor + WEIGHTS)
        indices, weights = (update.tensors[factor + end] for end in (INDICES, WEIGHTS))
        check_dimensions(indices, 3)
        check_integers(indices)
        if weights.shape != (*indices.shape[:2], indices.shape[2] - 1):
            raise BrokenAdapter(
                f"{weights.where}: shape {list(weights.shape)}, but {indices.key!r} {list(indices.shape)} names "
                f"{indices.shape[2]} vectors a piece, which have one weight less"
            )

    def _first(self, update: Update, factor: str) -> Any:
        return update.tensors.get(factor) or update.tensors[factor + INDICES]

    def _tiles(self, update: Update, factor: str) -> tuple[int, ...]:
        """The first two axes of a factor."""
        tiles: tuple[int, ...] = self._first(update, factor).shape[:2]
        return tiles

    def rank(self, update: Update) -> int:
        return self._tiles(update, "logits_A")[0]

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        try:
            self.check(update)
        except BrokenAdapter:
            return True  # which says it better than a shape could
        return shape == self.weight_shape(update)

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["bank"])

    def weight_shape(self, update: Update) -> tuple[int, ...]:
        length = update.tensors["bank"].shape[1]
        return self._tiles(update, "logits_B")[0] * length, self._tiles(update, "logits_A")[1] * length

    def factors(self, update: Update) -> tuple[Array, Array]:
        """Raises `CannotRepresent` where topk is needed and unknown."""
        a, b = self._mixed(update, "logits_A"), self._mixed(update, "logits_B")
        return b.transpose(0, 2, 1).reshape(-1, b.shape[1]), a.reshape(len(a), -1)

    def _mixed(self, update: Update, factor: str) -> Array:
        """A factor in pieces (·, ·, length)."""
        import numpy as np

        bank = numbers(update.tensors["bank"])
        if factor + INDICES in update.tensors:
            indices = update.tensors[factor + INDICES].numpy().astype(np.int64)
            weights = numbers(update.tensors[factor + WEIGHTS])
            weights = np.concatenate([weights, np.maximum(1 - weights.sum(-1, keepdims=True), 0)], axis=-1)
            if indices.min() < 0 or indices.max() >= len(bank):
                raise BrokenAdapter(
                    f"{update.tensors[factor + INDICES].where}: positions outside of the {len(bank)} vectors of the bank "
                    f"({update.tensors['bank'].key!r})"
                )
        else:
            logits = numbers(update.tensors[factor])
            indices = np.argsort(-logits, axis=-1, kind="stable")[..., : self.topk(update)]
            chosen = np.take_along_axis(logits, indices, axis=-1)
            weights = np.exp(chosen - chosen[..., :1])
        weights = weights / weights.sum(-1, keepdims=True)
        mixed: Array = np.einsum("ijk,ijkl->ijl", weights, bank[indices])
        return mixed

    def topk(self, update: Update) -> int:
        """K: from the shape of saved indices, or from the config.

        Raises `CannotRepresent` where none of these has it.
        """
        indices = update.tensors.get("logits_A" + INDICES)
        if indices is not None:
            return indices.shape[2]
        return int(setting(update, "topk"))
