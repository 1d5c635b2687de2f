"""Super-Tuning: a few numbers added to the weight's entries; Supra, which adds a LoRA to that.

- `values` (n,), `indices` (n,) integers: values[i] is added to entry indices[i] of the weight (out_features, in_features),
  read row by row.  Without `indices` (`save_precomputed_indices=False`) they are those of the n entries of the base's weight
  that are largest by magnitude, the largest first (`options["select_top"]` False: smallest)
- `lora_A` (r, in_features), `lora_B` (out_features, r), Supra's: s · lora_B·lora_A is added, s = `options["lora_alpha"]` / r

Entries of the same magnitude, of which a weight in 16 bits has many, are in the order that torch's `topk` gives them, which
peft relies on too.  A LoRA's factors say the module's shape; without them it comes with the base.

Source: https://arxiv.org/abs/2607.09287; peft `tuners/supertuning/layer.py`.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need, need_shape, setting
from adapterops.methods.own import fitting
from adapterops.storage.tensor import is_zero

if TYPE_CHECKING:
    import torch

_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})


class Supertuning(Method):
    """Super-Tuning and Supra, on linear modules.

    `needs_weight` is not set: only an update without `indices` needs the base's weight, and `delta` says so.
    """

    name = "supertuning"
    title = "Super-Tuning (sparse entries; Supra: with a LoRA)"
    source = "https://arxiv.org/abs/2607.09287"
    formula = "ΔW = values at indices (without these, at W's largest entries), Supra: + lora_alpha/r·lora_B·lora_A"
    needs_shape = True
    compared = frozenset({"shape", "sparsity", "select_top"})

    def check(self, update: Update) -> None:
        need(update, "values")
        values, indices = update.tensors["values"], update.tensors.get("indices")
        if len(values.shape) != 1 or not values.numel:
            raise BrokenAdapter(
                f"{values.where}: shape {list(values.shape)}; Super-Tuning's values are one row of numbers"
            )
        if indices is not None:
            if indices.dtype not in _INTEGERS:
                raise BrokenAdapter(
                    f"{indices.where}: dtype {indices.dtype}; positions are integers (a tool cast the whole file?)"
                )
            if indices.shape != values.shape:
                raise BrokenAdapter(
                    f"{indices.where}: {indices.numel} positions, but {values.key!r} has {values.numel} numbers"
                )
        if update.tensors.keys() & {"lora_A", "lora_B"}:
            need(update, "lora_A", "lora_B")
            a, b = update.tensors["lora_A"], update.tensors["lora_B"]
            for factor in (a, b):
                if len(factor.shape) != 2 or 0 in factor.shape:
                    raise BrokenAdapter(f"{factor.where}: shape {list(factor.shape)} is no low-rank factor")
            if a.shape[0] != b.shape[1]:
                raise BrokenAdapter(
                    f"{b.where}: shape {list(b.shape)} has rank {b.shape[1]}, but {a.key!r} {list(a.shape)} has rank "
                    f"{a.shape[0]}; they are not halves of one update",
                    fault="ranks",
                )

    def rank(self, update: Update) -> int | None:
        """The rank of Supra's LoRA."""
        factor = update.tensors.get("lora_A")
        return None if factor is None else factor.shape[0]

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        if len(shape) != 2:
            return False
        values, stated = update.tensors.get("values"), self._factors_shape(update)
        return (values is None or values.numel <= prod(shape)) and stated in (None, shape)

    def is_nothing(self, update: Update) -> bool:
        factor = update.tensors.get("lora_B")
        return is_zero(update.tensors["values"]) and (factor is None or is_zero(factor))

    def error(self, update: Update, other: Update) -> float:
        """As usual; `select_top` counts where it says which entries are meant, `sparsity` says what the tensors do."""
        one, two = (u.options.get("select_top") for u in (update, other))
        if "indices" not in update.tensors and one != two:
            return float("inf")
        return super().error(update, other)

    def weight_shape(self, update: Update) -> tuple[int, ...] | None:
        return self._factors_shape(update) or update.options.get("shape")

    def delta(self, update: Update) -> torch.Tensor:
        if "indices" not in update.tensors:
            raise CannotRepresent(
                f"{update.name}: the positions of its values are not in the file (save_precomputed_indices=False): they are "
                "where the base's weight is largest, so its delta needs the base weight (--base-weights)"
            )
        return self._made(
            update, self._factors_shape(update) or need_shape(update), update.tensors["indices"].torch().long()
        )

    def change(self, update: Update, own: Own | None = None) -> Change:
        if "indices" in update.tensors and own is None:
            return Change(self.delta(update))
        own = fitting(self, update, own)
        shape = tuple(own.weight.shape)
        if "indices" in update.tensors:
            return Change(self._made(update, shape, update.tensors["indices"].torch().long()))
        import torch

        largest = bool(setting(update, "select_top"))
        found = torch.topk(own.weight.abs().flatten(), update.tensors["values"].numel, largest=largest).indices
        return Change(self._made(update, shape, found))

    def _made(self, update: Update, shape: tuple[int, ...], at: torch.Tensor) -> torch.Tensor:
        """ΔW (out, in) in float32; numbers at one position add up, as in peft."""
        import torch

        if int(at.min()) < 0 or int(at.max()) >= prod(shape):
            raise BrokenAdapter(
                f"{update.tensors['indices'].where}: positions outside of the module's weight {list(shape)} ({update.name}); "
                "is this the base that it was trained on?"
            )
        made = torch.zeros(prod(shape), dtype=torch.float64)
        made = made.scatter_add(0, at, update.tensors["values"].torch().double()).reshape(shape)
        if "lora_A" in update.tensors:
            a, b = (update.tensors[role].torch().double() for role in ("lora_A", "lora_B"))
            made += setting(update, "lora_alpha") / a.shape[0] * (b @ a)
        return made.float()

    @staticmethod
    def _factors_shape(update: Update) -> tuple[int, ...] | None:
        """(out, in) by Supra's factors; None where there are none (or none that `check` lets through)."""
        a, b = update.tensors.get("lora_A"), update.tensors.get("lora_B")
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
            return None
        return (b.shape[0], a.shape[1])
