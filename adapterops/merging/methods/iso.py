"""Iso-C: the weighted sum with all its singular values equal.

Source: https://arxiv.org/abs/2502.04959 and github.com/danielm1405/iso-merging, `src/utils/iso.py` (`iso_c`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from adapterops.linalg.lowrank import Pair, decompose, stacked
from adapterops.merging.registry import Kind, merge_method
from adapterops.merging.stack import Stack
from adapterops.merging.whole import Best, Reduced, singular_values, weighted_sum

_ROUNDING = 1e-5
"""Singular values below this share of the largest are rounding, and to lift them would be to add noise: a copy of an adapter
in bfloat16 adds directions of about 1e-6 (the rounding of B times that of A)."""


def iso_c_of_matrices(stack: Stack, rank: int, best: Best) -> Reduced:
    """Iso-C of a sum that is a whole matrix: only the leading `rank` directions of it are needed.

    What all of them would give has the mean of all singular values as each of its N: how far from that the output is follows
    from the values alone.
    """
    total = weighted_sum(stack, stack.weights)
    values = singular_values(total)
    values = values[values > values.max() * _ROUNDING]
    found = best(total, rank)
    found = found.truncated(len(values))
    u, s, vh = found.u.double(), found.s.double(), found.vh.double()
    if not len(s):
        return Reduced((u.new_zeros(u.shape[0], 1), vh.new_zeros(1, vh.shape[1])), 1.0, 0.0, 0)
    ratio, part = float(s.mean() / values.mean()), len(s) / len(values)
    error = sqrt(part * (ratio - 1) ** 2 + (1 - part))
    energy = len(values) * float(values.mean()) ** 2
    return Reduced((u * s.mean(), vh), part, error, len(values), energy)


@merge_method(
    "iso_c",
    kind=Kind.FACTORS,
    summary="the weighted sum with its singular values replaced by their mean, so that no adapter's directions dominate",
    source="https://arxiv.org/abs/2502.04959",
    sums=True,
    of_matrices=iso_c_of_matrices,
    by_rank=True,
)
def iso_c(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Pair:
    """σ̄·U (m, R) and Vᵀ (R, n) of the best approximation of Σ wₖ·Δₖ at rank R ≤ `rank`; σ̄ is the mean of its R values.

    The paper's deltas have full rank, and its mean goes over all singular values.  Here a sum has as many directions as
    the adapters gave it: values that are zero (or rounding) have no direction of their own and count for nothing.  Where
    `rank` is smaller than that, the mean is of the values that are kept: the result has the nuclear norm of the best
    approximation at that rank, neither blown up by nor diluted with directions that are not there.  So `iso_c` at a rank
    is Iso-C of what `svd` gives at that rank.
    """
    b, a = stacked(pairs, weights)
    found = decompose(b, a, exact=True)
    kept = found.truncated(min(rank, int((found.s > found.s.max() * _ROUNDING).sum())))
    if not len(kept.s):
        return b.new_zeros(b.shape[0], 1), a.new_zeros(1, a.shape[1])
    return kept.u * kept.s.mean(), kept.vh
