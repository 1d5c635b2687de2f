"""Parameters that an adapter carries whole: heads, resized embeddings, biases, and rows of an embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need, need_own

if TYPE_CHECKING:
    import torch


class Saved(Method):
    """A module's own parameters and buffers, replaced: roles are their names (`weight`, `bias`, `running_mean` …).

    peft writes them for `modules_to_save`, for embeddings (`save_embedding_layers`) and for `bias="all"`.
    """

    name = "saved"
    title = "saved parameters (modules_to_save, biases, embeddings)"
    formula = "W' = weight, b' = bias …"
    source = "peft utils/save_and_load.py, utils/other.py: ModulesToSaveWrapper"
    rows = frozenset({"weight", "bias"})

    def check(self, update: Update) -> None:
        if not update.tensors:
            raise BrokenAdapter(f"{update.name}: saved, but without any tensor", fault="missing-half")

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        # A saved head or embedding is allowed to differ from the base: it may have other classes, more tokens.
        return True

    def is_nothing(self, update: Update) -> bool:
        return False

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(f"{update.name}: a saved parameter replaces the base's; it has no delta of its own")


class TrainableTokens(Method):
    """Rows of an embedding, replaced: `delta` (tokens, embedding_dim), with `options["indices"]` naming the rows.

    The indices are not among the tensors; they come from the config (`trainable_token_indices`, or `token_indices` where
    trainable tokens are the whole adapter).  An output projection that shares the embedding's weight is given the same rows.
    """

    name = "trainable_tokens"
    title = "trainable tokens"
    formula = "rows of the embedding replaced"
    form = "none: the rows stand beside a LoRA"
    source = "peft tuners/trainable_tokens/layer.py"
    needs_weight = True

    def check(self, update: Update) -> None:
        need(update, "delta")
        delta, indices = update.tensors["delta"], update.options.get("indices")
        if len(delta.shape) != 2:
            raise BrokenAdapter(f"{delta.where}: shape {list(delta.shape)} is not (tokens, embedding_dim)")
        if indices is None:
            return
        if len(indices) != delta.shape[0]:
            raise BrokenAdapter(
                f"{delta.where}: {delta.shape[0]} rows, but trainable_token_indices lists {len(indices)} tokens"
            )
        if len(set(indices)) != len(indices) or min(indices, default=0) < 0:
            raise BrokenAdapter(
                f"{delta.where}: trainable_token_indices lists a token twice, or a negative one; each row replaces one token's"
            )

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(f"{update.name}: trained token rows replace the base's; the delta needs the base weight")

    def change(self, update: Update, own: Own | None = None) -> Change:
        """The new rows minus the base's, zeros elsewhere: (num_embeddings, embedding_dim).

        Raises `CannotRepresent` where nothing says which tokens the rows are, `BrokenAdapter` where the base has no such rows.
        """
        import torch

        own = need_own(update, own)
        indices = update.options.get("indices")
        if indices is None:
            raise CannotRepresent(
                f"{update.name}: which tokens its {update.tensors['delta'].shape[0]} rows replace is not in the tensors; say it "
                "with --set token_indices='[…]'"
            )
        delta, size = update.tensors["delta"], tuple(own.weight.shape)
        if len(size) != 2 or size[1] != delta.shape[1] or max(indices, default=-1) >= size[0]:
            raise BrokenAdapter(
                f"{delta.where}: shape {list(delta.shape)}, tokens up to {max(indices, default=-1)}; {update.name} is "
                f"{list(size)} in these base weights (another model's, or one whose embedding was not resized?)"
            )
        made, at = torch.zeros(size), torch.tensor(indices, dtype=torch.long)
        made[at] = (delta.torch().double() - own.weight[at].double()).float()
        return Change(made)

    def error(self, update: Update, other: Update) -> float:
        if update.options.get("indices") != other.options.get("indices"):
            return float("inf")
        return super().error(update, other)
