"""W ≈ Q + L·R: a quantised weight and the low-rank matrix that gives back the most of what quantising took.

One iteration takes L·R as the best approximation of W − Q(W); more alternate, Q = Q(W − L·R) and L·R the best approximation of
W − Q.  Source: LoftQ, https://arxiv.org/abs/2310.08659, algorithm 1; peft `utils/loftq_utils.py` (`loftq_init`).
"""

from __future__ import annotations

from math import isfinite, sqrt
from typing import TYPE_CHECKING, NamedTuple

from adapterops.linalg.dense import truncated
from adapterops.linalg.quant import Quantiser
from adapterops.linalg.random import Draw

if TYPE_CHECKING:
    import torch

_TOLERANCE = 1.2e-4
"""How much more than the best L·R leaves is allowed, as a share of it, by `truncated`'s estimate: a residual of quantisation is
white, no direction in it stands out, and by measurement about half as much is."""
_ROWS = 512
"""Rows of a difference that are held at a time."""


class Split(NamedTuple):
    """W ≈ Q + left·right.

    `left` (out_features, rank) and `right` (rank, in_features) each hold the root of the singular values; `residual` is W − Q;
    `before` is ‖W − Q(W)‖; `base` the dequantised weight in the base's own type, where one is to be written.
    """

    left: torch.Tensor
    right: torch.Tensor
    residual: torch.Tensor
    before: float
    base: torch.Tensor | None


def split(
    weight: torch.Tensor,
    rank: int,
    quant: Quantiser,
    iterations: int = 1,
    base: torch.dtype | None = None,
    purpose: tuple[str, ...] = ("loftq",),
) -> Split:
    """LoftQ of one weight (out_features, in_features), float32; works on its device and leaves it as it is.

    Holds besides it one matrix of its size, what decomposing that takes, and the new base's.  `base` is the type in which the
    dequantised weight is to be stored: Q is then what bitsandbytes makes of the stored one, and not of the unrounded.
    A rank above the weight's is filled up with zeros.  `before` is infinite or NaN where quantising overflows.
    """
    import torch

    rest, new, before = torch.empty_like(weight), None, 0.0
    left, right = weight.new_zeros(weight.shape[0], rank), weight.new_zeros(rank, weight.shape[1])
    for step in range(iterations):
        source = torch.addmm(weight, left, right, alpha=-1, out=rest) if step else weight
        last = base is not None and step == iterations - 1
        if last:
            quant.apply_(rest.copy_(source))
        else:
            energy = quant.left_over(source, weight, rest)
        if not step:
            before = difference_norm(weight, rest) if last else sqrt(energy) if energy >= 0 else energy
            if not isfinite(before):
                break
        if last:
            new = rest.to(base, copy=True)
            quant.left_over(rest.copy_(new), weight, rest)
        start = right.T if step else None
        found = truncated(rest, rank, tolerance=_TOLERANCE, start=start, draw=Draw(0, *purpose))[0]
        roots, many = found.s.sqrt(), len(found.s)
        left[:, :many], right[:many] = found.u * roots, roots[:, None] * found.vh
    return Split(left, right, rest, before, new)


def difference_norm(one: torch.Tensor, two: torch.Tensor, three: torch.Tensor | None = None) -> float:
    """‖one − two‖, or ‖one − two·three‖, without the difference."""
    total = 0.0
    for start in range(0, one.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        part = one[rows] - (two[rows] if three is None else two[rows] @ three)
        total += float(part.norm()) ** 2
    return sqrt(total) if isfinite(total) else total
