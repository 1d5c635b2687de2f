"""Parameters that an adapter carries whole: heads, resized embeddings, biases, and rows of an embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Method, need

if TYPE_CHECKING:
    import torch


class Saved(Method):
    """A module's own parameters and buffers, replaced: roles are their names (`weight`, `bias`, `running_mean` …).

    peft writes them for `modules_to_save`, for embeddings (`save_embedding_layers`) and for `bias="all"`.
    """

    name = "saved"
    title = "saved parameters (modules_to_save, biases, embeddings)"
    source = "peft utils/save_and_load.py, utils/other.py: ModulesToSaveWrapper"
    rows = frozenset({"weight", "bias"})

    def check(self, update: Update) -> None:
        if not update.tensors:
            raise BrokenAdapter(f"{update.name}: saved, but without any tensor")

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        # A saved head or embedding is allowed to differ from the base: it may have other classes, more tokens.
        return True

    def is_nothing(self, update: Update) -> bool:
        return False

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(f"{update.name}: a saved parameter replaces the base's; it has no delta of its own")


class TrainableTokens(Method):
    """Rows of an embedding, replaced: `delta` (tokens, embedding_dim), with `options["indices"]` naming the rows.

    The indices are not among the tensors; they come from the config (`trainable_token_indices`).
    """

    name = "trainable_tokens"
    title = "trainable tokens"
    source = "peft tuners/trainable_tokens/layer.py"

    def check(self, update: Update) -> None:
        need(update, "delta")
        delta, indices = update.tensors["delta"], update.options.get("indices")
        if len(delta.shape) != 2:
            raise BrokenAdapter(f"{delta.where}: shape {list(delta.shape)} is not (tokens, embedding_dim)")
        if indices is not None and len(indices) != delta.shape[0]:
            raise BrokenAdapter(
                f"{delta.where}: {delta.shape[0]} rows, but trainable_token_indices lists {len(indices)} tokens"
            )

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(f"{update.name}: trained token rows replace the base's; the delta needs the base weight")

    def error(self, update: Update, other: Update) -> float:
        if update.options.get("indices") != other.options.get("indices"):
            return float("inf")
        return super().error(update, other)
