"""(IA)³: a learned factor on each input or output of a module.

`vector` (n,), (n, 1), (1, n) or (1, n, 1, …), with the factor m = vector + (1 − options["initial"]):

- `options["on_input"]`: x' = m ∘ x, so W' = W · m along the inputs; else y' = m ∘ y, so W' = m · W along the outputs
- `options["initial"]`: what the vector holds before training, where m = 1: 0 in LyCORIS, 1 in peft

On outputs, peft multiplies the module's bias too; LyCORIS multiplies the weight alone (save in its bypass mode).  So with
a bias, a vector of one does not do what the same vector does in the other, and `initial` says whose it is.  On the
inputs of a grouped convolution, each group of rows takes its own part of the vector (peft's merge and forward alike).

Sources: https://arxiv.org/abs/2205.05638; LyCORIS `lycoris/modules/ia3.py`; peft `tuners/ia3/layer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import Change, Own, array_error, need
from adapterops.methods.orthogonal import OfTheWeight
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]


class Ia3(OfTheWeight):
    """(IA)³."""

    name = "ia3"
    flags = ("on_input",)
    compared = frozenset({"initial"})
    title = "(IA)³"
    formula = "W' = W · diag(m) on inputs; diag(m) · W on outputs, and b' = m ∘ b (peft)"
    source = "https://arxiv.org/abs/2205.05638"

    def check(self, update: Update) -> None:
        if not update.tensors:
            raise BrokenAdapter(
                f"{update.name}: (IA)³ without its vector (only on_input is there)", fault="missing-half"
            )
        need(update, "vector")
        vector = update.tensors["vector"]
        if update.options.get("on_input") is None:
            raise BrokenAdapter(
                f"{vector.where}: the flag on_input of {update.name} is missing from the file; without it nothing says "
                "whether (IA)³ multiplies the module's inputs or its outputs",
                fault="missing-half",
            )
        if not vector.numel or sum(n != 1 for n in vector.shape) > 1:
            raise BrokenAdapter(
                f"{vector.where}: shape {list(vector.shape)} is no vector; (IA)³ has one number a channel"
            )

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        vector, on_input = update.tensors.get("vector"), _on_input(update)
        if vector is None:
            return True  # `check` says it better than a shape could
        if on_input is None:
            return vector.numel in shape[:2]
        axis = 1 if on_input else 0
        if len(shape) <= axis:
            return False
        return vector.numel == shape[axis] or (on_input and _groups(vector.numel, shape) > 1)

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        vector = update.tensors["vector"]
        if update.options["on_input"]:
            return dict(update.tensors)  # every row is multiplied alike
        taken = vector.reshape((vector.numel,)).rows(pieces)
        return {"vector": taken.reshape(tuple(taken.numel if n == vector.numel else n for n in vector.shape))}

    def is_nothing(self, update: Update) -> bool:
        return not self._change(update).any()

    def change(self, update: Update, own: Own | None = None) -> Change:
        import torch

        own = self.own(update, own)
        factors, weight = torch.from_numpy(self._change(update)).float(), own.weight.float()
        ones = (1,) * (weight.dim() - 2)
        if update.options["on_input"]:
            groups = _groups(len(factors), tuple(weight.shape))
            rows = factors.reshape(groups, 1, -1).expand(-1, len(weight) // groups, -1)
            return Change(weight * rows.reshape(len(weight), -1, *ones))
        made = weight * factors.reshape(-1, 1, *ones) if weight.dim() > 1 else weight * factors
        return Change(made, own.bias.float() * factors if own.bias is not None and update.options["initial"] else None)

    def error(self, update: Update, other: Update) -> float:
        """How far the factors minus one, which are the effect, are from each other."""
        if bool(update.options["on_input"]) != bool(other.options["on_input"]):
            return float("inf")
        one, two = self._change(update), self._change(other)
        return array_error(one, two) if one.size == two.size else float("inf")

    def _change(self, update: Update) -> Array:
        """m − 1 (n,) in float64."""
        values: Array = update.tensors["vector"].numpy().astype("f8").reshape(-1) - update.options["initial"]
        return values


def _on_input(update: Update) -> bool | None:
    """Whether the inputs are multiplied; None where nothing says so yet.  A file's flag is a tensor until it is read."""
    flag = update.tensors.get("on_input")
    if flag is not None and flag.numel == 1:
        return any(flag.read())  # of any type: what is not all zero bits is true
    stated: bool | None = update.options.get("on_input")
    return stated


def _groups(size: int, shape: tuple[int, ...]) -> int:
    """The groups of a convolution (out, in / groups, *kernel) whose inputs a vector of `size` multiplies; 0 for none."""
    if len(shape) < 2 or not shape[1]:
        return 0
    groups, over = divmod(size, shape[1])
    return 0 if over or (groups > 1 and (len(shape) == 2 or shape[0] % groups)) else groups
