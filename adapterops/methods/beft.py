"""BEFT: a bias, added to a linear module's output.

`bias` (1, out_features): b' = b + bias.  The weight stays.  A module without a bias of its own gets one: peft's forward adds
it there too, where its merge refuses.

Source: https://arxiv.org/abs/2509.15974; peft `tuners/beft/layer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need
from adapterops.storage.tensor import LazyTensor, is_zero

if TYPE_CHECKING:
    import torch


class Beft(Method):
    """BEFT."""

    name = "beft"
    title = "BEFT (biases)"
    source = "https://arxiv.org/abs/2509.15974"
    formula = "b' = b + bias"
    form = "a LoRA bias, on factors of zeros"

    def check(self, update: Update) -> None:
        need(update, "bias")
        bias = update.tensors["bias"]
        if not bias.numel or sum(n != 1 for n in bias.shape) > 1:
            raise BrokenAdapter(f"{bias.where}: shape {list(bias.shape)} is no bias: one number an output")

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        bias = update.tensors.get("bias")
        return bias is None or shape[:1] == (bias.numel,)

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        bias = update.tensors["bias"]
        taken = bias.reshape((bias.numel,)).rows(pieces)
        return {"bias": taken.reshape((1,) * (len(bias.shape) - 1) + (taken.numel,))}

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["bias"])

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(f"{update.name}: only its bias changes; there is no weight delta")

    def change(self, update: Update, own: Own | None = None) -> Change:
        if own is not None and not self.fits(update, tuple(own.weight.shape)):
            bias = update.tensors["bias"]
            raise BrokenAdapter(
                f"{bias.where}: {bias.numel} numbers, but the weight of {update.name} in these base weights is "
                f"{list(own.weight.shape)}; they are another model's"
            )
        return Change(None, self.bias_delta(update))

    def bias_delta(self, update: Update) -> torch.Tensor:
        """Δb (out,) in float32."""
        return update.tensors["bias"].torch().float().reshape(-1)
