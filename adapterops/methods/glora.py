"""GLoRA, as peft has it: a weight and a bias, each multiplied and added to.

W' = W + W∘A + B,  b' = b + b∘D + E + W·C (∘ element by element; the bias where the module has one).  Each letter's
tensors say in which of its forms it is:

- A, B: `A.Xd` (out, r) · `A.Xu` (r, in); `A.X` (out, 1), one number an output; or (1,), one for all
- C: `C.Xd` (in, r) · `C.Xu` (r, 1); or `C.X` (in, 1)
- D, E: `D.X` (out,) or (1,)
- `A.zeros` (out, in), `C.zeros` (in, 1), `D.zeros` (out,): nothing is learned there; peft saves the zeros themselves

LyCORIS' GLoRA is another method of the same name.

Sources: https://arxiv.org/abs/2306.07967; peft `tuners/glora/layer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import Change, Own, need, tensor_error, worst
from adapterops.methods.lora import product_error
from adapterops.methods.orthogonal import OfTheWeight
from adapterops.storage.tensor import LazyTensor, is_zero

if TYPE_CHECKING:
    import torch

LETTERS = "ABCDE"


def sizes(update: Update) -> tuple[int | None, int | None]:
    """The outputs and the inputs of the module, where the tensors say them."""
    out: int | None = None
    inputs: int | None = None
    for letter in "AB":
        found = _shape(update, letter) or (None, None)
        out = out or (found[0] if len(found) == 2 else None)
        inputs = inputs or (found[1] if len(found) == 2 and found[1] != 1 else None)
    for letter in "DE":
        found = _shape(update, letter) or (1,)
        out = out or (found[0] if found[0] != 1 else None)
    c = _shape(update, "C")
    return out, inputs or (c[0] if c else None)


class Glora(OfTheWeight):
    """peft's GLoRA.  peft has it for Linear alone."""

    name = "glora"
    title = "GLoRA (generalized LoRA)"
    formula = "ΔW = W∘A + B, Δb = b∘D + E + W·C"
    source = "https://arxiv.org/abs/2306.07967"

    def check(self, update: Update) -> None:
        if not update.tensors:
            raise BrokenAdapter(f"{update.name}: GLoRA without any tensor", fault="missing-half")
        unknown = [role for role in update.tensors if role.partition(".")[0] not in LETTERS]
        if unknown:
            raise BrokenAdapter(f"{update.tensors[unknown[0]].where}: GLoRA has the letters A to E alone")
        for letter in LETTERS:
            self._check(update, letter)
        out, inputs = sizes(update)
        for letter in LETTERS:
            found = _shape(update, letter)
            wanted = {"A": (out, inputs), "B": (out, inputs), "C": (inputs, 1)}.get(letter, (out,))
            if found is None or all(a in (b, 1, None) or b is None for a, b in zip(found, wanted, strict=False)):
                continue
            tensor = next(t for role, t in update.tensors.items() if role.startswith(f"{letter}."))
            raise BrokenAdapter(
                f"{tensor.where}: shape {list(tensor.shape)}; the module's weight is {[out, inputs]} by the other tensors"
            )

    def _check(self, update: Update, letter: str) -> None:
        """Raise unless the letter is in one of its forms."""
        roles = {role for role in update.tensors if role.startswith(f"{letter}.")}
        if not roles:
            return
        if roles & {f"{letter}.Xd", f"{letter}.Xu"} and letter in "ABC":
            need(update, f"{letter}.Xd", f"{letter}.Xu")
            one, two = update.tensors[f"{letter}.Xd"], update.tensors[f"{letter}.Xu"]
            if len(one.shape) != 2 or len(two.shape) != 2 or one.shape[1] != two.shape[0] or 0 in one.shape + two.shape:
                raise BrokenAdapter(
                    f"{one.where}: shape {list(one.shape)}; its counterpart {two.key!r} is {list(two.shape)}, and they "
                    "cannot be multiplied"
                )
            sound = letter != "C" or two.shape[1] == 1
        else:
            tensor = update.tensors[min(roles)]
            dims = {"A": (1, 2), "B": (1, 2), "C": (2,)}.get(letter, (1,))
            sound = len(tensor.shape) in dims and tensor.numel > 0
            if min(roles) == f"{letter}.X" and letter in "AB":
                sound = sound and (tensor.shape == (1,) or tensor.shape[1:] == (1,))
            roles -= {f"{letter}.X", f"{letter}.zeros"}
            sound = sound and not roles
        if not sound:
            tensor = next(t for role, t in update.tensors.items() if role.startswith(f"{letter}."))
            raise BrokenAdapter(f"{tensor.where}: shape {list(tensor.shape)} is no form that GLoRA has for {letter}")

    def rank(self, update: Update) -> int | None:
        """r, where some letter is a product of factors."""
        return next((t.shape[1] for role, t in update.tensors.items() if role.endswith(".Xd")), None)

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        try:
            out, inputs = sizes(update)
        except IndexError:
            return True  # `check` says it better than a shape could
        return len(shape) == 2 and out in (shape[0], None) and inputs in (shape[1], None)

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        out, _ = sizes(update)

        def rowed(role: str, tensor: LazyTensor) -> bool:
            letter, _, rest = role.partition(".")
            return letter != "C" and rest != "Xu" and (tensor.numel > 1 or out == 1)

        return {role: t.rows(pieces) if rowed(role, t) else t for role, t in update.tensors.items()}

    def is_nothing(self, update: Update) -> bool:
        def nothing(letter: str) -> bool:
            tensors = {role: t for role, t in update.tensors.items() if role.startswith(f"{letter}.")}
            if f"{letter}.Xd" in tensors:
                return any(is_zero(t) for t in tensors.values())
            return all(is_zero(t) for t in tensors.values())

        return all(nothing(letter) for letter in LETTERS)

    def change(self, update: Update, own: Own | None = None) -> Change:
        own = self.own(update, own)
        a, b, c, d, e = (_value(update, letter) for letter in LETTERS)
        weight = own.weight.float()
        made = _sum(None if a is None else weight * a, None if b is None else b.expand_as(weight))
        if own.bias is None:
            if any(v is not None and v.count_nonzero() for v in (c, d, e)):
                first = next(t for role, t in update.tensors.items() if role[0] in "CDE")
                raise BrokenAdapter(
                    f"{first.where}: changes the bias of {update.name}, which has none in the base: another model"
                )
            return Change(made)
        bias = own.bias.float()
        moved = _sum(None if d is None else bias * d, None if e is None else e.expand_as(bias))
        return Change(made, _sum(moved, None if c is None else (weight @ c).reshape(-1)))

    def error(self, update: Update, other: Update) -> float:
        """The largest error of a letter's own value."""
        if update.tensors.keys() != other.tensors.keys():
            return float("inf")
        errors = []
        for role, tensor in update.tensors.items():
            if role.endswith(".Xd"):
                up = f"{role[:-1]}u"
                found = [u.tensors[at].numpy().astype("f8") for u in (update, other) for at in (role, up)]
                if (found[0].shape[0], found[1].shape[1]) != (found[2].shape[0], found[3].shape[1]):
                    return float("inf")
                errors.append(product_error(*found))
            elif not role.endswith(".Xu"):
                errors.append(tensor_error(tensor, other.tensors[role]))
        return worst(errors)


def _shape(update: Update, letter: str) -> tuple[int, ...] | None:
    """The shape of the letter's value; None where nothing is stored for it."""
    one, two = (update.tensors.get(f"{letter}.{end}") for end in ("Xd", "Xu"))
    if one is not None and two is not None:
        return one.shape[0], two.shape[1]
    for end in ("X", "zeros"):
        tensor = update.tensors.get(f"{letter}.{end}")
        if tensor is not None:
            return tensor.shape
    return None


def _value(update: Update, letter: str) -> torch.Tensor | None:
    """The letter's value in float32, to be broadcast; None for zeros."""
    one, two = (update.tensors.get(f"{letter}.{end}") for end in ("Xd", "Xu"))
    if one is not None and two is not None:
        return one.torch().float() @ two.torch().float()
    tensor = update.tensors.get(f"{letter}.X")
    return None if tensor is None else tensor.torch().float()


def _sum(one: torch.Tensor | None, two: torch.Tensor | None) -> torch.Tensor | None:
    """What is there of two terms, added."""
    return two if one is None else one if two is None else one + two
