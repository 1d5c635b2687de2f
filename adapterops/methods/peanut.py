"""PEANuT: a small network whose input is the base's weight, and whose output is added to it.

`A` (r, out_features), `B` (out_features, r), and for a depth above 0 `encoders.0` … and `decoders.0` …, (r, r) each, as many
of one as of the other.  With f the activation, row by row on (in_features, r):

    x₀ = f(Wᵀ·Aᵀ);  xᵢ₊₁ = f(xᵢ·Eᵢᵀ) for every encoder;  y₀ = the last x;  yⱼ₊₁ = f(yⱼ·Dⱼᵀ) + x, the encoders' *inputs* taken
    from the last to the first;  ΔW = s · (y·Bᵀ)ᵀ, of rank r at most

`options["act_fn"]` names f as transformers does (peft's default "relu"), `options["scaling"]` is s (default 1).  Neither shows
in the tensors, and both change the result.

Source: peft `tuners/peanut/layer.py`; the activations, transformers `activations.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Method, Own, need, need_own, setting
from adapterops.methods.own import fitting
from adapterops.storage.tensor import is_zero

if TYPE_CHECKING:
    import torch

    Activation = Callable[[torch.Tensor], torch.Tensor]


class Peanut(Method):
    """PEANuT, on linear modules."""

    name = "peanut"
    title = "PEANuT (a network of the base's weight)"
    source = "peft tuners/peanut/layer.py"
    formula = "ΔW = s·B·yᵀ, y what a network of A, encoders and decoders makes of Wᵀ"
    form = "with the base's weight: s·B and yᵀ, rank r"
    needs_weight = True

    def check(self, update: Update) -> None:
        need(update, "A", "B")
        a, b = update.tensors["A"], update.tensors["B"]
        if len(a.shape) != 2 or not a.numel or b.shape != a.shape[::-1]:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)}, {a.key!r} {list(a.shape)}; PEANuT's are (out_features, r) and "
                "(r, out_features)"
            )
        rank, depth = a.shape[0], self.depth(update)
        known = {"A", "B", *(f"{side}.{i}" for side in ("encoders", "decoders") for i in range(depth))}
        for role in sorted(update.tensors.keys() - known):
            raise BrokenAdapter(
                f"{update.tensors[role].where}: encoders and decoders of PEANuT come in pairs; the other half, or an earlier "
                f"one, is missing from the file ({update.name})",
                fault="missing-half",
            )
        for role in sorted(known - {"A", "B"}):
            tensor = update.tensors[role]
            if tensor.shape != (rank, rank):
                raise BrokenAdapter(
                    f"{tensor.where}: shape {list(tensor.shape)}; with {a.key!r} it must be {[rank, rank]}"
                )

    def rank(self, update: Update) -> int:
        return update.tensors["A"].shape[0]

    def depth(self, update: Update) -> int:
        """The number of encoders, which is that of the decoders."""
        count = 0
        while {f"encoders.{count}", f"decoders.{count}"} <= update.tensors.keys():
            count += 1
        return count

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        b = update.tensors.get("B")
        return b is None or (len(shape) == 2 and b.shape[:1] == shape[:1])

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["B"])

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(
            f"{update.name}: PEANuT computes its delta from the module's weight; it needs the base weight (--base-weights)"
        )

    def change(self, update: Update, own: Own | None = None) -> Change:
        b, a = self.low_rank_of(update, need_own(update, own))
        return Change((b @ a).float())

    def low_rank_of(self, update: Update, own: Own) -> tuple[torch.Tensor, torch.Tensor]:
        own = fitting(self, update, own)
        name, scale = setting(update, "act_fn"), float(setting(update, "scaling"))
        act = activations().get(name)
        if act is None:
            raise CannotRepresent(
                f"{update.name}: act_fn {name!r} is not computed here; it knows {', '.join(sorted(activations()))}"
            )
        t = {role: tensor.torch().double() for role, tensor in update.tensors.items()}
        depth = self.depth(update)
        state = act(own.weight.double().T @ t["A"].T)
        inputs = []
        for i in range(depth):
            inputs.append(state)
            state = act(state @ t[f"encoders.{i}"].T)
        for i in range(depth):
            state = act(state @ t[f"decoders.{i}"].T) + inputs[depth - 1 - i]
        return scale * t["B"], state.T


def activations() -> dict[str, Activation]:
    """The activations without parameters that transformers has, by its names."""
    import torch
    from torch.nn import functional as F

    def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x, approximate="tanh")

    return {
        "gelu": F.gelu,
        "gelu_python": F.gelu,
        "gelu_10": lambda x: F.gelu(x).clip(-10, 10),
        "gelu_new": tanh_gelu,
        "gelu_fast": tanh_gelu,
        "gelu_accurate": tanh_gelu,
        "gelu_pytorch_tanh": tanh_gelu,
        "gelu_python_tanh": tanh_gelu,
        "hardswish": F.hardswish,
        "leaky_relu": F.leaky_relu,
        "laplace": lambda x: 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * 2**0.5))),
        "linear": lambda x: x,
        "mish": F.mish,
        "prelu": lambda x: F.leaky_relu(x, 0.25),
        "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        "relu": F.relu,
        "relu2": lambda x: F.relu(x) ** 2,
        "relu6": F.relu6,
        "sigmoid": torch.sigmoid,
        "silu": F.silu,
        "swish": F.silu,
        "sqrtsoftplus": lambda x: torch.sqrt(F.softplus(x)),
        "tanh": torch.tanh,
    }
