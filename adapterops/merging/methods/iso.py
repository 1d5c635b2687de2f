"""Iso-C: the weighted sum with all its singular values equal.

Source: https://arxiv.org/abs/2502.04959 and github.com/danielm1405/iso-merging, `src/utils/iso.py` (`iso_c`).
"""

from __future__ import annotations

from collections.abc import Sequence

from adapterops.linalg.lowrank import Pair, decompose, stacked
from adapterops.merging.registry import Kind, merge_method

_ROUNDING = 1e-5
"""Singular values below this share of the largest are rounding, and to lift them would be to add noise: a copy of an adapter
in bfloat16 adds directions of about 1e-6 (the rounding of B times that of A)."""


@merge_method(
    "iso_c",
    kind=Kind.FACTORS,
    summary="the weighted sum with its singular values replaced by their mean, so that no adapter's directions dominate",
    source="https://arxiv.org/abs/2502.04959",
    sums=True,
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
