"""Sums of low-rank matrices, decomposed without ever forming them.

M = Σ wₖ·Bₖ·Aₖ, with Bₖ (m, rₖ), Aₖ (rₖ, n) and Σr small, has the singular values of a core (Σr, Σr).  The core comes from
the Gram matrices of all B's and all A's in float64, which is fast; or from their QR decompositions, which keep twice the
digits where terms cancel (a Gram matrix squares the condition).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

Pair = tuple["torch.Tensor", "torch.Tensor"]
"""B (m, r) and A (r, n)."""

CANCELLING = 1e-3
"""‖Σ terms‖ / √Σ‖term‖², over the rank-one terms: below this they cancel."""
_DEPENDENT = 1e-15
"""Eigenvalues of a Gram matrix below this share of the largest are rounding."""


class Svd(NamedTuple):
    """M ≈ u · diag(s) · vh, u (m, k) and vh (k, n) orthonormal, s (k,) descending.

    `energy` is ‖M‖² (Frobenius), of all of M and not of the k singular values that are here.
    """

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor
    energy: float

    @property
    def kept(self) -> float:
        """The share of ‖M‖² that is here, between 0 and 1."""
        return min(1.0, float(self.s.double().square().sum()) / self.energy) if self.energy else 1.0

    @property
    def error(self) -> float:
        """‖M − u·diag(s)·vh‖ / ‖M‖."""
        return sqrt(max(0.0, 1.0 - self.kept))

    def truncated(self, rank: int) -> Svd:
        """The first `rank` singular values."""
        return Svd(self.u[:, :rank], self.s[:rank], self.vh[:rank], self.energy)


class Stacked:
    """K low-rank matrices of one size, side by side: everything about their weighted sums."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        import torch

        self.b = torch.cat([b.double() for b, _ in pairs], dim=1)
        """(m, Σr), float64."""
        self.a = torch.cat([a.double() for _, a in pairs], dim=0)
        """(Σr, n), float64."""
        self.ranks = [b.shape[1] for b, _ in pairs]

    @cached_property
    def _left(self) -> torch.Tensor:
        return self.b.T @ self.b

    @cached_property
    def _right(self) -> torch.Tensor:
        return self.a @ self.a.T

    @cached_property
    def inner(self) -> torch.Tensor:
        """⟨BᵢAᵢ, BⱼAⱼ⟩ (K, K), float64, on the CPU."""
        import torch

        products = (self._left * self._right).cpu()
        rows = [part.sum(dim=0) for part in torch.split(products, self.ranks)]
        return torch.stack([torch.stack([part.sum() for part in torch.split(row, self.ranks)]) for row in rows])

    def columns(self, weights: Sequence[float]) -> torch.Tensor:
        """The weight of each column of B, (Σr,)."""
        import torch

        spread = [weight for weight, rank in zip(weights, self.ranks, strict=True) for _ in range(rank)]
        return torch.tensor(spread, dtype=torch.float64, device=self.b.device)

    def decompose(self, weights: Sequence[float], rank: int | None = None) -> tuple[Svd, bool]:
        """The decomposition of Σ wₖ·Bₖ·Aₖ, its first `rank` values (all Σr for None), and whether its terms cancel.

        Where they do, QR is used.
        """
        import torch

        # Each rank-one term is split evenly between its column and its row: a Gram matrix keeps half the digits of a factor
        # whose columns differ much in size.
        w = self.columns(weights)
        left, right = (gram.diagonal().clamp_min(0).sqrt() for gram in (self._left, self._right))
        strength = w.abs() * left * right
        nothing = torch.zeros_like(left)
        d = torch.where(left > 0, strength.sqrt() / left, nothing)
        e = torch.where(right > 0, strength.sqrt() / right, nothing)
        b, a = self.b * d, self.a * e[:, None]
        found = _by_gram(b, a, self._left * d[:, None] * d, self._right * e[:, None] * e, w.sign(), rank)
        if found.energy >= CANCELLING**2 * float(strength.square().sum()):
            return found, False
        return _by_qr(b * w.sign(), a, rank), True

    def distance(self, weights: Sequence[float], b: torch.Tensor, a: torch.Tensor, energy: float) -> float:
        """‖Σ wₖ·Bₖ·Aₖ − b·a‖ / ‖Σ wₖ·Bₖ·Aₖ‖, `energy` being the square of that norm; digits end at about 1e-8."""
        b, a = b.double(), a.double()
        mixed = float(((self.b * self.columns(weights)).T @ b * (self.a @ a.T)).sum())
        own = float((b.T @ b * (a @ a.T)).sum())
        square = max(0.0, energy - 2 * mixed + own)
        return sqrt(square / energy) if energy else sqrt(square)


def stacked(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """B (m, Σr) and A (Σr, n) whose product is Σ wₖ·Bₖ·Aₖ, in float64."""
    whole = Stacked(pairs)
    return whole.b * whole.columns(weights), whole.a


def decompose(b: torch.Tensor, a: torch.Tensor, rank: int | None = None, *, exact: bool = False) -> Svd:
    """The decomposition of b·a in float64, its first `rank` values (all r of them for None).

    `exact` works by QR, for factors whose columns nearly depend on each other.
    """
    import torch

    b, a = b.double(), a.double()
    if exact:
        return _by_qr(b, a, rank)
    return _by_gram(b, a, b.T @ b, a @ a.T, torch.ones(b.shape[1], dtype=b.dtype, device=b.device), rank)


def _by_qr(b: torch.Tensor, a: torch.Tensor, rank: int | None) -> Svd:
    import torch

    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return Svd(qb @ u[:, :rank], s[:rank], vh[:rank] @ qa.T, float(s.square().sum()))


def _by_gram(
    b: torch.Tensor, a: torch.Tensor, left: torch.Tensor, right: torch.Tensor, weights: torch.Tensor, rank: int | None
) -> Svd:
    import torch

    one, two = _root(left), _root(right)
    core = (one.roots[:, None] * (one.vectors.T @ (weights[:, None] * two.vectors))) * two.roots
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    ub = b @ ((one.vectors * one.inverse) @ u[:, :rank])
    va = (vh[:rank] @ (two.vectors * two.inverse).T) @ a
    return Svd(ub, s[:rank], va, float(s.square().sum()))


class _Root(NamedTuple):
    vectors: torch.Tensor
    roots: torch.Tensor
    inverse: torch.Tensor


def _root(matrix: torch.Tensor) -> _Root:
    import torch

    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0)
    sound = values > values.max() * _DEPENDENT
    roots = values.sqrt()
    return _Root(vectors, roots, torch.where(sound, 1 / roots, torch.zeros_like(roots)))
