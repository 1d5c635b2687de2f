"""GLoRA as LyCORIS has it: a LoRA, and another one whose outputs are the module's inputs.

ΔW = γ · (W · a1 · a2 + b1 · b2), γ = alpha / r; W is (out, in, *kernel), and a1 · a2 acts on its inputs at every place of a
kernel.

- `a1` (in, r), `a2` (r, in): ones behind them where the module is a convolution
- `b1` (out, r), `b2` (r, in, *kernel)

Before LyCORIS 3.0 the four were called the other way round: `a1` (r, in), `a2` (in, r), `b1` (r, in), `b2` (out, r),
ΔW = W · a2 · a1 + b2 · b1.  ComfyUI tells them by their shapes, too, and multiplies by γ; LyCORIS itself did so twice while it
trained them.

rsLoRA's γ = alpha / √r leaves no trace in the tensors, and no reader applies it, LyCORIS included.

peft's GLoRA is another method of the same name.  LyCORIS' code would write a Tucker core `bm` for kernels above one only, and
asks for kernels of one, so that no file has any.

Sources: https://arxiv.org/abs/2306.07967; KohakuBlueleaf/LyCORIS 4.1.3 and 1.9.0 `lycoris/modules/glora.py`;
Comfy-Org/ComfyUI `comfy/weight_adapter/glora.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Own, need, worst
from adapterops.methods.lora import product_error
from adapterops.methods.orthogonal import OfTheWeight, columns, values
from adapterops.methods.products import alpha_over_rank
from adapterops.storage.tensor import LazyTensor, is_zero

if TYPE_CHECKING:
    import torch

_ROLES = ("a1", "a2", "b1", "b2")
_EARLIER = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
"""What the tensors were called before LyCORIS 3.0."""


class LycorisGlora(OfTheWeight):
    """LyCORIS' GLoRA.  It has it for Linear and convolutions."""

    name = "lycoris_glora"
    title = "GLoRA of LyCORIS"
    formula = "ΔW = α/r · (W·a1·a2 + b1·b2)"
    form = "with the base's weight: rank 2r, but for kernels above one"
    source = "KohakuBlueleaf/LyCORIS lycoris/modules/glora.py"
    scaled = True
    rows = frozenset({"b1"})

    def today(self, update: Update) -> tuple[Update, str]:
        if not _is_earlier(update.tensors):
            return update, ""
        tensors = {role: update.tensors[old] for role, old in _EARLIER.items()}
        return (
            replace(update, tensors=tensors),
            "their GLoRA is of LyCORIS before 3.0, which called its factors the other way round and applied alpha / rank twice "
            "where it trained; they are taken as ComfyUI takes them, with alpha / rank once",
        )

    def check(self, update: Update) -> None:
        need(update, *_ROLES)
        update, _ = self.today(update)
        stray = next((t for role, t in update.tensors.items() if role not in _ROLES), None)
        if stray is not None:
            raise BrokenAdapter(f"{stray.where}: is no part of LyCORIS' GLoRA ({update.name})")
        a1, a2, b1, b2 = (update.tensors[role] for role in _ROLES)
        for tensor in (a1, a2, b1, b2):
            if (
                len(tensor.shape) < 2
                or 0 in tensor.shape
                or (tensor is not b2 and any(n != 1 for n in tensor.shape[2:]))
            ):
                raise BrokenAdapter(f"{tensor.where}: shape {list(tensor.shape)} is no factor of GLoRA")
        rank = a2.shape[0]
        for tensor, found, wanted in (
            (a1, a1.shape[:2], (a2.shape[1], rank)),
            (b1, b1.shape[1:2], (rank,)),
            (b2, b2.shape[:2], (rank, a2.shape[1])),
        ):
            if found != wanted:
                raise BrokenAdapter(
                    f"{tensor.where}: shape {list(tensor.shape)}, but {a2.key!r} is {list(a2.shape)}; they are not parts of one "
                    "update",
                    fault="ranks",
                )

    def rank(self, update: Update) -> int:
        return update.tensors["a2"].shape[0]

    def scale(self, update: Update) -> float | None:
        return alpha_over_rank(update, self.rank(update))

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        update, _ = self.today(update)
        a2, b1, b2 = (update.tensors.get(role) for role in ("a2", "b1", "b2"))
        if a2 is None or b1 is None or b2 is None or min(len(t.shape) for t in (a2, b1, b2)) < 2:
            return True  # `check` says it better than a shape could
        return len(shape) >= 2 and (b1.shape[0], a2.shape[1]) == shape[:2] and columns(b2.shape) == columns(shape)

    def is_nothing(self, update: Update) -> bool:
        return all(any(is_zero(update.tensors[role]) for role in pair) for pair in (("a1", "a2"), ("b1", "b2")))

    def change(self, update: Update, own: Own | None = None) -> Change:
        import torch

        own, scale = self.own(update, own), self._scale(update)
        a1, a2, b1, b2 = (_matrix(update.tensors[role]) for role in _ROLES)
        shape = tuple(own.weight.shape)
        weight = own.weight.float().reshape(*shape[:2], -1)
        made = (
            torch.einsum("oip,ij->ojp", weight, a1.float() @ a2.float())
            if shape[2:]
            else weight[..., 0] @ a1.float() @ a2.float()
        )
        return Change(((made.reshape(shape[0], -1) + b1.float() @ b2.float()) * scale).reshape(shape))

    def low_rank_of(self, update: Update, own: Own) -> tuple[torch.Tensor, torch.Tensor] | None:
        import torch

        own, scale = self.own(update, own), self._scale(update)
        if columns(tuple(own.weight.shape)) != own.weight.shape[1]:
            return None
        a1, a2, b1, b2 = (_matrix(update.tensors[role]) for role in _ROLES)
        left = own.weight.double().reshape(own.weight.shape[0], -1) @ a1
        return torch.cat([left, b1], dim=1) * scale, torch.cat([a2, b2])

    def _scale(self, update: Update) -> float:
        scale = self.scale(update)
        if scale is None:
            raise CannotRepresent(f"{update.name}: its scale is unknown, so its delta is too (give --alpha)")
        return scale

    def error(self, update: Update, other: Update) -> float:
        """The larger error of the two products."""
        errors = []
        for pair in (("a1", "a2"), ("b1", "b2")):
            found = [_matrix(u.tensors[role]).numpy() for u in (update, other) for role in pair]
            if (found[0].shape[0], found[1].shape[1]) != (found[2].shape[0], found[3].shape[1]):
                return float("inf")
            errors.append(product_error(*found))
        return worst(errors)


def _is_earlier(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the shapes are those of the names of before LyCORIS 3.0.

    Those of a module with as many outputs as inputs could be of either: nobody gives a module a rank above its size.
    """
    if any(role not in tensors or len(tensors[role].shape) < 2 for role in _ROLES):
        return False
    a1, a2, b1, b2 = (tensors[role].shape[:2] for role in _ROLES)
    earlier = a1[0] == a2[1] == b1[0] == b2[1] and a1[1] == a2[0] == b1[1]
    today = a2[0] == a1[1] == b1[1] == b2[0] and a2[1] == a1[0] == b2[1]
    return earlier and (not today or a1[0] < a1[1])


def _matrix(tensor: LazyTensor) -> torch.Tensor:
    """The numbers in float64, as a matrix."""
    return values(tensor).reshape(tensor.shape[0], -1)
