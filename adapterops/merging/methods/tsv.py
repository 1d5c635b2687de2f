"""TSV-Merge: the leading singular vectors of each delta, made orthogonal to those of the others.

Source: https://arxiv.org/abs/2412.00081 and github.com/AntoAndGar/task_singular_vectors, `src/utils/TSVM_utils.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterops.linalg.lowrank import Pair, Svd, decompose
from adapterops.merging.registry import Kind, merge_method
from adapterops.merging.stack import Stack
from adapterops.merging.whole import FLOAT32, Best, Reduced

if TYPE_CHECKING:
    import torch

_ROUNDING = 1e-12
"""Singular values below this share of a delta's largest are rounding."""
_DEPENDENT = 1e-8
"""Singular values of the stacked (unit) vectors below this: the vectors are dependent, as those of equal adapters."""


def tsv_of_matrices(stack: Stack, rank: int, best: Best) -> Reduced:
    """TSV of whole matrices, of which the leading `rank` components are all that it can use.

    How near that is to what all components would give is not known without all of them: what is told is the share of the
    weighted deltas' energy that the components taken have.
    """
    weighted = list(zip(_leading(stack, rank, best), stack.weights, strict=True))
    energy = sum(weight * weight * part.energy for part, weight in weighted)
    taken = sum(weight * weight * float(part.s.double().square().sum()) for part, weight in weighted)
    return Reduced(_orthogonalised(weighted), min(1.0, taken / energy) if energy else 1.0)


def _leading(stack: Stack, rank: int, best: Best) -> list[Svd]:
    """Each delta's share of `rank` components; what one lacks goes to the others, which are then decomposed again."""
    found: dict[int, Svd] = {}
    limits = [rank] * len(stack)
    while True:
        counts = share(limits, rank)
        for k, count in enumerate(counts):
            if k not in found or len(found[k].s) < count:
                found[k] = best(stack.whole(k), max(1, count))
        sound = [_sound(found[k], FLOAT32) for k in range(len(stack))]
        if all(have >= count for have, count in zip(sound, counts, strict=True)):
            return [found[k].truncated(count) for k, count in enumerate(counts)]
        limits = [min(most, have) if have < n else most for most, have, n in zip(limits, sound, counts, strict=True)]


@merge_method(
    "tsv",
    kind=Kind.FACTORS,
    summary="the leading singular vectors of each adapter, orthogonalised so that they do not interfere",
    source="https://arxiv.org/abs/2412.00081",
    sums=True,
    of_matrices=tsv_of_matrices,
    by_rank=True,
)
def tsv(pairs: Sequence[Pair], weights: Sequence[float], rank: int) -> Pair:
    """U⊥·Σ (m, R) and V⊥ᵀ (R, n), R ≤ `rank`: the polar factors of the stacked singular vectors.

    Each of the K adapters has `rank` // K components, the first ones one more where that leaves a remainder; what one
    cannot use (its rank is smaller, its weight 0) goes to the others.  Weights multiply the singular values.

    Where the stacked vectors are dependent, no single orthonormal matrix is nearest to them; the dependent directions are
    left out, so that K equal adapters give (the leading part of) one of them, and nothing arbitrary beside it.
    """
    parts = [(decompose(b, a, exact=True), weight) for (b, a), weight in zip(pairs, weights, strict=True)]
    rows, columns = pairs[0][0].shape[0], pairs[0][1].shape[1]
    counts = share([_sound(part) if weight else 0 for part, weight in parts], min(rank, rows, columns))
    if not any(counts):
        return pairs[0][0].new_zeros(rows, 1).double(), pairs[0][1].new_zeros(1, columns).double()
    return _orthogonalised([(part.truncated(n), weight) for (part, weight), n in zip(parts, counts, strict=True)])


def _orthogonalised(parts: Sequence[tuple[Svd, float]]) -> Pair:
    """U⊥·Σ and V⊥ᵀ of the components, each adapter's with its weight, in float64."""
    import torch

    left = nearest_orthonormal(torch.cat([part.u.double() for part, _ in parts], dim=1))
    right = nearest_orthonormal(torch.cat([part.vh.double() for part, _ in parts], dim=0).T)
    return left * torch.cat([part.s.double() * weight for part, weight in parts]), right.T


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


def _sound(part: Svd, rounding: float = _ROUNDING) -> int:
    return int((part.s > part.s.max() * rounding).sum())
