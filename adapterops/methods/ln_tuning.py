"""LN tuning: the parameters of a norm, replaced.

The roles are the norm's own parameters (and buffers): `weight`, `bias` (dim,) …; W' = weight, b' = bias.  peft copies the
whole module, whatever it is, so any module can have been chosen.

Source: https://arxiv.org/abs/2312.11420; peft `tuners/ln_tuning/layer.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need_own

if TYPE_CHECKING:
    import torch


class LnTuning(Method):
    """Norms replaced, as peft keeps them."""

    name = "ln_tuning"
    title = "LN tuning (norms replaced)"
    source = "https://arxiv.org/abs/2312.11420"
    formula = "W' = weight, b' = bias"
    form = "none: a norm has no matrix"
    needs_weight = True
    rows = frozenset({"weight", "bias"})

    def check(self, update: Update) -> None:
        if not update.tensors:
            raise BrokenAdapter(f"{update.name}: LN tuning without any tensor", fault="missing-half")
        weight, bias = update.tensors.get("weight"), update.tensors.get("bias")
        for tensor in (weight, bias):
            if tensor is not None and not tensor.numel:
                raise BrokenAdapter(
                    f"{tensor.where}: shape {list(tensor.shape)} holds no parameter (an unsharded export?)"
                )
        if weight is not None and bias is not None and bias.shape != weight.shape[:1]:
            raise BrokenAdapter(
                f"{bias.where}: shape {list(bias.shape)}, but {weight.key!r} {list(weight.shape)} has one row for each of "
                f"{weight.shape[0] if weight.shape else 1} outputs"
            )

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        weight, bias = update.tensors.get("weight"), update.tensors.get("bias")
        return (weight is None or weight.shape == shape) and (bias is None or bias.shape == shape[:1])

    def is_nothing(self, update: Update) -> bool:
        return False

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(
            f"{update.name}: LN tuning replaces the norm's parameters, so their differences need the base's "
            "(--base-weights)"
        )

    def change(self, update: Update, own: Own | None = None) -> Change:
        """The new parameters minus the base's.

        Raises `CannotRepresent` for a buffer (a batch norm's statistics), which is no weight and no bias.
        """
        own = need_own(update, own)
        others = sorted(update.tensors.keys() - {"weight", "bias"})
        if others:
            raise CannotRepresent(
                f"{update.name}: it also replaces {', '.join(others)}, which is neither the weight nor the bias of the module"
            )
        return Change(self._minus(update, "weight", own.weight), self._minus(update, "bias", own.bias))

    @staticmethod
    def _minus(update: Update, role: str, own: torch.Tensor | None) -> torch.Tensor | None:
        tensor = update.tensors.get(role)
        if tensor is None:
            return None
        if own is None or tensor.shape != tuple(own.shape):
            found = "no" if own is None else f"a {role} of shape {list(own.shape)} and no such"
            raise BrokenAdapter(
                f"{tensor.where}: shape {list(tensor.shape)}; {update.name} has {found} {role} in these base weights; they are "
                "another model's"
            )
        return (tensor.torch().double() - own.double()).float()
