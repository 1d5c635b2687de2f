"""Deltas that have no low-rank factors, for methods that are defined on singular vectors.

`MergeMethod.of_matrices` of such a method is `f(stack, rank, best) -> Reduced`, where the leading directions of whole matrices
are enough for a result of `rank`; or `f(stack, draws=…, **parameters) -> Tensor`, the merged delta itself, which the engine
factorises as it does that of an element-wise method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from adapterops.merging.stack import Stack, insist_on_float32, wide

if TYPE_CHECKING:
    import torch

    from adapterops.linalg.lowrank import Pair, Svd

Best = Callable[["torch.Tensor", int], "Svd"]
"""The leading part of the decomposition of a matrix, of that many singular values."""

FLOAT32 = 1e-6
"""Singular values of a float32 matrix below this share of the largest are rounding."""
_COLUMNS = 1024
"""Columns of which a Gram matrix is summed up at a time."""


class Reduced(NamedTuple):
    """What a method makes of whole matrices at a rank, and how much that is of what it makes of them at full rank.

    `kept` and `error` as in a `ModuleReport`; `error` None where full rank would have to be computed to know it, and `kept` is
    the share of the adapters' own energy.  `full` is the rank of what it makes at full rank and `energy` its ‖·‖², where that
    is known.
    """

    pair: Pair
    kept: float
    error: float | None = None
    full: int | None = None
    energy: float = 0.0


def weighted_sum(stack: Stack, coefficients: Sequence[float]) -> torch.Tensor:
    """Σ cₖ·Δₖ (m, n), float32, with a few rows of each in memory at a time."""
    insist_on_float32(coefficients)
    out = stack.empty()
    for start, stop, values in stack.blocks():
        part = out[start:stop].zero_()
        for value, coefficient in zip(values, coefficients, strict=True):
            part.add_(value, alpha=coefficient)
    return out


def singular_values(matrix: torch.Tensor) -> torch.Tensor:
    """All singular values of a matrix (m, n), float64, on the CPU, ascending; those below 1e-8 of the largest are rounding."""
    import torch

    square = _gram(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)
    values: torch.Tensor = torch.linalg.eigvalsh(square)
    return values.clamp_min(0).sqrt().cpu()


def basis_of(stack: Stack, rounding: float) -> torch.Tensor:
    """U (m, R), float64, orthonormal: the left singular vectors of [Δ₁ … Δ_K], without those whose values are below that share
    of the largest; R ≤ min(m, K·n), strongest first."""
    import torch

    m, n = stack.shape
    if m <= len(stack) * n:
        square = sum((_gram(stack.whole(k)) for k in range(1, len(stack))), _gram(stack.whole(0)))
        return _vectors(square, rounding)
    # Tall even side by side: the small side is decomposed, in the basis that a QR gives.
    q, r = torch.linalg.qr(torch.cat([wide(stack.whole(k)) for k in range(len(stack))], dim=1))
    basis: torch.Tensor = q @ _vectors(r @ r.T, rounding)
    return basis


def _vectors(square: torch.Tensor, rounding: float) -> torch.Tensor:
    import torch

    values, vectors = torch.linalg.eigh(square)
    kept: torch.Tensor = vectors.flip(1)[:, values.flip(0) > values.max().clamp_min(0) * rounding**2]
    return kept


def _gram(matrix: torch.Tensor) -> torch.Tensor:
    """M·Mᵀ in float64."""
    out = wide(matrix.new_zeros(matrix.shape[0], matrix.shape[0]))
    for part in _parts(matrix):
        out.addmm_(part, part.T)
    return out


def _parts(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    for start in range(0, matrix.shape[1], _COLUMNS):
        yield wide(matrix[:, start : start + _COLUMNS])
