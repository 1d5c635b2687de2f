"""KnOTS: the deltas in one common basis, where an element-wise method merges them.

Source: https://arxiv.org/abs/2410.19735 and github.com/gstoica27/KnOTS, `task_merger.py` (`SVDMerger`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from adapterops.linalg.lowrank import Pair
from adapterops.linalg.random import Draw
from adapterops.merging.methods import pruning, ties  # noqa: F401  (enters the inner methods)
from adapterops.merging.parameters import DENSITY, MAJORITY_SIGN, SIGN_ELECTION
from adapterops.merging.registry import METHODS, Kind, Parameter, merge_method
from adapterops.merging.stack import Stack, TensorStack
from adapterops.merging.whole import FLOAT32, basis_of

if TYPE_CHECKING:
    import torch

INNER = Parameter(
    "inner",
    "the method that merges the aligned deltas",
    type=str,
    default="ties",
    choices=("ties", "dare_ties", "dare_linear", "magnitude_prune"),
)
_LARGE = 2048
"""Directions of a common basis of whole matrices, above which only one is found at a time."""
_ONE_LARGE = threading.Lock()
_ROWS = 64
"""Rows of whole aligned deltas that are merged at a time."""
_ROUNDING = 1e-12
"""Singular values below this share of the largest are rounding."""


def knots_of_matrices(
    stack: Stack,
    *,
    draws: Sequence[Draw],
    density: float,
    inner: str,
    majority_sign: str,
    sign_election: str,
) -> torch.Tensor:
    """KnOTS of whole matrices (m, n), float32, itself one: their common basis has up to min(m, K·n) directions.

    Large ones are taken one at a time, since all K are in memory together.
    """
    large = min(stack.shape[0], len(stack) * stack.shape[1]) > _LARGE
    with _ONE_LARGE if large else contextlib.nullcontext():
        return _aligned_and_merged(stack, draws, inner, {
            "density": density, "majority_sign": majority_sign, "sign_election": sign_election
        })  # fmt: skip


def _aligned_and_merged(stack: Stack, draws: Sequence[Draw], inner: str, given: Mapping[str, object]) -> torch.Tensor:
    import torch

    basis = basis_of(stack, FLOAT32)
    if not basis.shape[1]:
        return stack.empty().zero_()
    # A device that has no float64 left it on the CPU.
    basis = (basis * _signs(basis)).float().to(stack.whole(0).device)
    aligned = [basis.T @ stack.whole(k) for k in range(len(stack))]
    merged = _inner(inner, TensorStack(aligned, stack.weights, draws, _ROWS), given)
    return torch.mm(basis, merged, out=stack.empty())


@merge_method(
    "knots",
    kind=Kind.FACTORS,
    summary="TIES or DARE in a basis that the adapters share (one SVD of their deltas side by side)",
    source="https://arxiv.org/abs/2410.19735",
    parameters=(DENSITY, INNER, MAJORITY_SIGN, SIGN_ELECTION),
    of_matrices=knots_of_matrices,
)
def knots(
    pairs: Sequence[Pair],
    weights: Sequence[float],
    rank: int,
    *,
    draws: Sequence[Draw],
    density: float,
    inner: str,
    majority_sign: str,
    sign_election: str,
) -> Pair:
    """U (m, R) and the merged Σ·Vₖ (R, n), where [Δ₁ … Δ_K] = U·Σ·[V₁ … V_K] and R is the rank of that.

    What is merged is Σ·Vₖ, as in the authors' code: its entries carry the weight of their direction.  Weights act in the
    inner method, in place of the authors' one scaling coefficient.  Trimming is by module; theirs is over the whole model.
    """
    basis, aligned = align(pairs)
    if not basis.shape[1]:
        return pairs[0][0].new_zeros(basis.shape[0], 1), pairs[0][1].new_zeros(1, pairs[0][1].shape[1])
    given = {"density": density, "majority_sign": majority_sign, "sign_election": sign_election}
    return basis, _inner(inner, TensorStack(aligned, weights, draws), given).double()


def _inner(name: str, stack: Stack, given: Mapping[str, object]) -> torch.Tensor:
    """What the inner method makes of the aligned deltas."""
    method = METHODS[name]
    takes = {parameter.name for parameter in method.parameters}
    merged: torch.Tensor = method.function(stack, **{name: value for name, value in given.items() if name in takes})
    return merged


def align(pairs: Sequence[Pair]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """U (m, R) and the Uᵀ·Δₖ = Σ·Vₖ (R, n), float64; R ≤ Σr, and 0 where all deltas are zero.

    [Δ₁ … Δ_K] is [B₁ … B_K] times the block diagonal of the Aₖ: with a QR of each, what is left to decompose has the size
    of the ranks.  Each column of U has its largest entry positive: where as many signs are + as -, the election would
    otherwise depend on the sign that the SVD happened to choose.
    """
    import torch

    lefts = [b.double() for b, _ in pairs]
    rights = [a.double() for _, a in pairs]
    q, r = torch.linalg.qr(torch.cat(lefts, dim=1))
    columns = r.split([b.shape[1] for b in lefts], dim=1)
    core = torch.cat(
        [part @ torch.linalg.qr(a.T, mode="r").R.T for part, a in zip(columns, rights, strict=True)], dim=1
    )
    u, s, _ = torch.linalg.svd(core, full_matrices=False)
    u = u[:, s > s.max() * _ROUNDING]
    basis = q @ u
    signs = _signs(basis)
    return basis * signs, [((u * signs).T @ part) @ a for part, a in zip(columns, rights, strict=True)]


def _signs(basis: torch.Tensor) -> torch.Tensor:
    """Those by which each column's largest entry becomes positive."""
    largest = basis.abs().argmax(dim=0, keepdim=True)
    return basis.gather(0, largest).sign()[0]
