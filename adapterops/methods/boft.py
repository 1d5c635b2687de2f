"""BOFT: the inputs of a module turned by a product of block-diagonal rotations, its outputs multiplied.

W' = diag(s) · W · Rᵀ with R = R_N ⋯ R_1, R_i = P_i · diag(Q_i) · P_iᵀ; W is (out, n), n = in · kernel; the bias stays.

- `R` (N, D, b, b), D·b = n: Q_ij = (I − S)(I + S)⁻¹ of S = (M − Mᵀ)/2.  N is peft's `boft_n_butterfly_factor`
- `s` (out, 1) or (1, out): factors on the outputs
- P_i: of every b·2^(i−1) inputs in a row, the pieces of b/2 with even numbers come before those with odd ones; none
  where N is 1

peft builds N > 1 with a CUDA extension alone; without it, it makes layers of N = 1, which do not load such a file.

Sources: https://arxiv.org/abs/2311.06243; peft `tuners/boft/layer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import Change, Own, array_error, need, worst
from adapterops.methods.orthogonal import (
    OfTheWeight,
    blocks_error,
    cayley,
    columns,
    minus_eye,
    skew_part,
    turned,
    values,
)
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class Boft(OfTheWeight):
    """BOFT.  peft has it for Linear and Conv2d."""

    name = "boft"
    title = "BOFT (butterfly orthogonal finetuning)"
    formula = "W' = diag(s) · W · (R_N ⋯ R_1)ᵀ, R_i = P_i · diag(Q_i) · P_iᵀ"
    source = "https://arxiv.org/abs/2311.06243"

    def check(self, update: Update) -> None:
        need(update, "R", "s")
        r, s = update.tensors["R"], update.tensors["s"]
        if len(r.shape) != 4 or r.shape[2] != r.shape[3] or 0 in r.shape:
            raise BrokenAdapter(
                f"{r.where}: shape {list(r.shape)}; BOFT has square blocks [butterfly factors, blocks, size, size]"
            )
        factors, blocks, size, _ = r.shape
        if factors > 1 and (size % 2 or blocks % 2 ** (factors - 1)):
            raise BrokenAdapter(
                f"{r.where}: shape {list(r.shape)}; {factors} butterfly factors need blocks of even size, and "
                f"their number divisible by {2 ** (factors - 1)}"
            )
        if not s.numel or sum(n != 1 for n in s.shape) > 1:
            raise BrokenAdapter(f"{s.where}: shape {list(s.shape)}; BOFT has one factor an output [out, 1]")

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        r, s = update.tensors.get("R"), update.tensors.get("s")
        if r is None or s is None or len(r.shape) != 4:
            return True  # `check` says it better than a shape could
        return len(shape) > 1 and s.numel == shape[0] and r.shape[1] * r.shape[2] == columns(shape)

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        s = update.tensors["s"]
        taken = s.reshape((s.numel,)).rows(pieces)
        shape = (1, taken.numel) if s.shape[0] != s.numel else (taken.numel, *s.shape[1:])
        return {**update.tensors, "s": taken.reshape(shape)}

    def is_nothing(self, update: Update) -> bool:
        r, s = (update.tensors[role].numpy() for role in ("R", "s"))
        return bool((r == r.swapaxes(-1, -2)).all() and (s == 1).all())

    def change(self, update: Update, own: Own | None = None) -> Change:
        import torch

        own = self.own(update, own)
        r, s = values(update.tensors["R"]), values(update.tensors["s"]).reshape(-1, 1)
        first = own.weight.float().reshape(len(own.weight), -1)
        moved, total = first, torch.zeros_like(first)
        for at, blocks in enumerate(rotations(r)):
            order = butterfly(first.shape[1], r.shape[2], at) if len(r) > 1 else torch.arange(first.shape[1])
            step = turned(moved[:, torch.argsort(order)], minus_eye(blocks))[:, order]
            moved, total = moved + step, total + step
        changed = s.float() * total + (s - 1).float() * first
        return Change(changed.reshape(own.weight.shape))

    def error(self, update: Update, other: Update) -> float:
        """How far the rotations and the factors minus one are from each other."""
        if update.tensors.keys() != other.tensors.keys():
            return float("inf")
        one, two = (rotations(values(u.tensors["R"])) for u in (update, other))
        s, s2 = (u.tensors["s"].numpy().astype("f8").reshape(-1) - 1 for u in (update, other))
        if one.shape != two.shape or s.shape != s2.shape:
            return float("inf")
        return worst([*(blocks_error(a, b) for a, b in zip(one, two, strict=True)), array_error(s, s2)])


def rotations(blocks: torch.Tensor) -> torch.Tensor:
    """The rotations (…, b, b) of blocks whose skew-symmetric part is used."""
    return cayley(skew_part(blocks))


def butterfly(size: int, block: int, at: int) -> torch.Tensor:
    """P of the factor `at` (from 0), as the input that it puts at each place: (size,)."""
    import torch

    half = block // 2
    pieces = torch.arange(size).reshape(-1, block * 2**at // half, half)
    return torch.cat([pieces[:, 0::2], pieces[:, 1::2]], dim=1).reshape(-1)
