"""TSV-Merge: the leading singular vectors of each delta, made orthogonal to those of the others.

Source: https://arxiv.org/abs/2412.00081 and github.com/AntoAndGar/task_singular_vectors, `src/utils/TSVM_utils.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterops.linalg.lowrank import Pair, Svd, decompose
from adapterops.merging.registry import Kind, merge_method

if TYPE_CHECKING:
    import torch

_ROUNDING = 1e-12
"""Singular values below this share of a delta's largest are rounding."""
_DEPENDENT = 1e-8
"""Singular values of the stacked (unit) vectors below this: the vectors are dependent, as those of equal adapters."""


@merge_method(
    "tsv",
    kind=Kind.FACTORS,
    summary="the leading singular vectors of each adapter, orthogonalised so that they do not interfere",
    source="https://arxiv.org/abs/2412.00081",
    sums=True,
)
def tsv(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Pair:
    """U⊥·Σ (m, R) and V⊥ᵀ (R, n), R ≤ `rank`: the polar factors of the stacked singular vectors.

    Each of the K adapters has `rank` // K components, the first ones one more where that leaves a remainder; what one
    cannot use (its rank is smaller, its weight 0) goes to the others.  Weights multiply the singular values.

    Where the stacked vectors are dependent, no single orthonormal matrix is nearest to them; the dependent directions are
    left out, so that K equal adapters give (the leading part of) one of them, and nothing arbitrary beside it.
    """
    import torch

    parts = [(decompose(b, a, exact=True), weight) for (b, a), weight in zip(pairs, weights, strict=True)]
    rows, columns = pairs[0][0].shape[0], pairs[0][1].shape[1]
    counts = share([_sound(part) if weight else 0 for part, weight in parts], min(rank, rows, columns))
    if not any(counts):
        return pairs[0][0].new_zeros(rows, 1).double(), pairs[0][1].new_zeros(1, columns).double()
    kept = [(part.truncated(count), weight) for (part, weight), count in zip(parts, counts, strict=True)]
    left = nearest_orthonormal(torch.cat([part.u for part, _ in kept], dim=1))
    right = nearest_orthonormal(torch.cat([part.vh for part, _ in kept], dim=0).T)
    return left * torch.cat([part.s * weight for part, weight in kept]), right.T


def share(wanted: Sequence[int], total: int) -> list[int]:
    """`total` dealt out one by one, in turn, to those who still want some."""
    out = [0] * len(wanted)
    while total and any(have < most for have, most in zip(out, wanted, strict=True)):
        for k, most in enumerate(wanted):
            if total and out[k] < most:
                out[k] += 1
                total -= 1
    return out


def nearest_orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """The polar factor of a tall matrix (rows, k): the nearest with orthonormal columns (the Procrustes problem).

    Directions in which the columns are dependent are left out: a partial isometry.
    """
    import torch

    q, r = torch.linalg.qr(matrix)
    p, d, qh = torch.linalg.svd(r, full_matrices=False)
    sound = d > _DEPENDENT
    polar: torch.Tensor = (q @ p[:, sound]) @ qh[sound]
    return polar


def _sound(part: Svd) -> int:
    return int((part.s > part.s.max() * _ROUNDING).sum())
