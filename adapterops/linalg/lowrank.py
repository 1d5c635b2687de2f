"""Sums of low-rank matrices, decomposed without ever forming them.

M = Σ wₖ·Bₖ·Aₖ, with Bₖ (m, rₖ), Aₖ (rₖ, n) and Σr small, has the singular values of a core (Σr, Σr).  The core comes from
the Gram matrices of all B's and all A's in float64, which is fast; or from their QR decompositions, which keep twice the
digits where terms cancel (a Gram matrix squares the condition).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

Pair = tuple["torch.Tensor", "torch.Tensor"]
"""B (m, r) and A (r, n)."""

Lengths = Callable[["torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]
"""Of singular values (…, k), what to multiply u's columns and vh's rows by."""

CANCELLING = 1e-3
"""‖Σ terms‖ / √Σ‖term‖², over the rank-one terms: below this they cancel."""
_INDEPENDENT = 1e-8
"""The share of a row's square that the rows before it must leave over, for a Cholesky decomposition to keep its digits."""
_FAINT = 1e-10
"""Squares of singular values below this share of the largest one's have too few digits."""
_DEPENDENT = 1e-15
"""Eigenvalues of a Gram matrix below this share of the largest are rounding."""
_TAME = 1e12
"""Numbers between 1 / this and this, or 0, are multiplied in float32 without regard to its range."""


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


class Several(NamedTuple):
    """The decompositions of N matrices of one size: u (N, m, k), s (N, k), vh (N, k, n), and what belongs to each.

    u's columns and vh's rows are unit vectors, or have the lengths that `decompose` was asked for.
    """

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor
    energies: list[float]
    cancels: list[bool]
    """Whether the terms of each cancel."""
    lengths: tuple[torch.Tensor, torch.Tensor]
    """Those of u's columns and of vh's rows, (N, k) each."""

    @property
    def kept(self) -> list[float]:
        """As `Svd.kept`, of each."""
        squares = self.s.square().sum(dim=1).tolist()
        return [min(1.0, own / energy) if energy else 1.0 for own, energy in zip(squares, self.energies, strict=True)]

    def errors(self, b: torch.Tensor, a: torch.Tensor) -> list[float]:
        """‖M − b·a‖ / ‖M‖ of each (where M is 0: ‖b·a‖), b (N, m, k) and a (N, k, n) being u and vh in another type, where
        those have lengths that make u·vh the first k singular values' part of M.

        What was left out and what rounding changed are at right angles, but for the product of two roundings; so the factors
        of M, with all their ranks, need not be gone through again, nor u and vh multiplied by themselves: their columns and
        rows are at right angles too.  The sums are of differences, so that float32 does where u and vh are that; factors out
        of `_TAME`'s range are made as large as 1 first, for that of their squares.
        """
        squares = self.s.square().sum(dim=1).tolist()
        # b·a - u·vh = du·(vh + dv) + u·dv.  One side after the other, since they are large.
        uu, ud, dd, left = _changes(self.u, b, self.lengths[0])
        vv, ve, ee, right = _changes(self.vh.mT, a.mT, self.lengths[1])
        sums = (dd * (vv + ve + ve.mT + ee) + 2 * ud.mT * (ve + ee) + uu * ee).sum(dim=(1, 2)).clamp_min(0)
        out = []
        for energy, kept, change in zip(self.energies, squares, (sums * (left * right) ** 2).tolist(), strict=True):
            square = max(0.0, energy - kept) + change
            out.append(sqrt(square / energy) if energy else sqrt(square))
        return out

    def of(self, number: int) -> Svd:
        """That of one matrix."""
        return Svd(self.u[number], self.s[number], self.vh[number], self.energies[number])


class Stacked:
    """Weighted sums of K low-rank matrices, of N modules of one size and the same ranks.

    `b` (N, m, Σr) and `a` (N, Σr, n), float64, hold each module's B's and A's side by side, `ranks` of them each; the k-th
    matrix of a module is its `scales[k]` times its B times its A.  Small steps are taken for all modules at once, and no
    module's numbers depend on the others.  `single` is b and a in float32, of who has them so.
    """

    def __init__(
        self,
        b: torch.Tensor,
        a: torch.Tensor,
        ranks: Sequence[int],
        scales: Sequence[Sequence[float]],
        single: Pair | None = None,
    ) -> None:
        self.b, self.a, self.ranks, self.scales, self.single = b, a, ranks, scales, single

    @classmethod
    def of(cls, pairs: Sequence[Pair], scales: Sequence[float] | None = None) -> Stacked:
        """One module's matrices, of any types; without `scales` these are 1."""
        import torch

        b = torch.cat([b.double() for b, _ in pairs], dim=1)[None]
        a = torch.cat([a.double() for _, a in pairs], dim=0)[None]
        return cls(b, a, [b.shape[1] for b, _ in pairs], [scales or [1.0] * len(pairs)])

    @cached_property
    def _left(self) -> torch.Tensor:
        """The B's Gram matrices, (N, Σr, Σr)."""
        return _products(self.b.mT)

    @cached_property
    def _right(self) -> torch.Tensor:
        return _products(self.a)

    @property
    def is_finite(self) -> bool:
        """Whether no factor holds NaN or infinity, nor numbers whose squares are infinite."""
        import torch

        return bool(torch.isfinite(self._left.sum() + self._right.sum()))

    @property
    def inner(self) -> torch.Tensor:
        """⟨BᵢAᵢ, BⱼAⱼ⟩ (N, K, K), float64, scales included, on the CPU."""
        import torch

        products = (self._left * self._right).cpu()
        mask = products.new_zeros(len(self.ranks), products.shape[1])
        at = 0
        for row, rank in zip(mask, self.ranks, strict=True):
            row[at : at + rank] = 1.0
            at += rank
        scales = torch.tensor(self.scales, dtype=torch.float64)
        # As many masks as products: a mask for all would be one product, whose digits may depend on how many there are.
        masks = mask.expand(len(products), -1, -1)
        return masks @ products @ masks.mT * scales[:, :, None] * scales[:, None, :]

    def columns(self, weights: Sequence[Sequence[float]]) -> torch.Tensor:
        """The weight of each column of B, (N, Σr), its scale included, for each module's K weights."""
        import torch

        spread = [
            [weight * scale for weight, scale, rank in zip(*own, self.ranks, strict=True) for _ in range(rank)]
            for own in zip(weights, self.scales, strict=True)
        ]
        return torch.tensor(spread, dtype=torch.float64, device=self.b.device)

    def decompose(
        self,
        weights: Sequence[Sequence[float]],
        rank: int | None = None,
        lengths: Lengths | None = None,
        single: bool = False,
    ) -> Several:
        """The decompositions of Σ wₖ·Bₖ·Aₖ, their first `rank` values (all Σr for None); Σr is at most m and n.

        `lengths` gives u's columns and vh's rows theirs.  Where terms cancel, QR is used.  `single` gives u and vh in float32,
        for those who round them to 16 bits and whose factors float32 can hold: only the last product is made in it, which cancels
        by no more than `CANCELLING`.
        """
        import torch

        # Each rank-one term is split evenly between its column and its row: a Gram matrix keeps half the digits of a factor
        # whose columns differ much in size.
        w = self.columns(weights)
        left, right = (gram.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt() for gram in (self._left, self._right))
        strength = w.abs() * left * right
        # What is squared below is no larger than 1.
        top = strength.amax(dim=1)
        top = torch.where(top > 0, top, 1.0)
        strength = strength / top[:, None]
        root = strength.sqrt()
        # A column of zeros stays one.
        d, e = (torch.where(size > 0, root / size, 0.0) for size in (left, right))
        one, two = self._left * (d[:, :, None] * d[:, None, :]), self._right * (e[:, :, None] * e[:, None, :])
        core = _cores(one, two, w.sign(), rank)
        # While they are small.
        left, right = sides = _of_length(core.s * top[:, None], lengths)
        to_u, to_vh = d[:, :, None] * core.u * left[:, None, :], right[:, :, None] * core.vh * e[:, None, :]
        if single:
            b, a = self.single or (self.b.float(), self.a.float())
            u, vh = b @ to_u.float(), to_vh.float() @ a
            for n, fine in enumerate(_tame(d, e, left, right).tolist()):
                if not fine:
                    u[n], vh[n] = self.b[n] @ to_u[n], to_vh[n] @ self.a[n]
        else:
            u, vh = self.b @ to_u, to_vh @ self.a
        cancels = []
        strengths = strength.square().sum(dim=1).tolist()
        for n, (energy, most) in enumerate(zip(core.energies, strengths, strict=True)):
            cancels.append(energy < CANCELLING**2 * most)
            if cancels[n]:
                found = _by_qr(self.b[n] * (d[n] * w[n].sign()), self.a[n] * e[n, :, None], rank)
                core.s[n], core.energies[n] = found.s, found.energy
                sides[0][n], sides[1][n] = own = _of_length(found.s * top[n], lengths)
                u[n], vh[n] = found.u * own[0], own[1][:, None] * found.vh
        energies = [energy * size * size for energy, size in zip(core.energies, top.tolist(), strict=True)]
        return Several(u, core.s * top[:, None], vh, energies, cancels, sides)


def _products(rows: torch.Tensor) -> torch.Tensor:
    """Of rows (N, r, n), each with each, (N, r, r).

    On the CPU the first half with all, the others with the others, and mirrored; elsewhere calls cost more than that saves.
    """
    import torch

    if rows.device.type != "cpu":
        return rows @ rows.mT
    r = rows.shape[1]
    half = (r + 1) // 2
    out = rows.new_empty((len(rows), r, r))
    for own, room in zip(rows, out, strict=True):
        torch.mm(own[:half], own.T, out=room[:half])
        torch.mm(own[half:], own[half:].T, out=room[half:, half:])
    out[:, half:, :half] = out[:, :half, half:].mT
    return out


def _of_length(s: torch.Tensor, lengths: Lengths | None) -> tuple[torch.Tensor, torch.Tensor]:
    return (s.new_ones(s.shape), s.new_ones(s.shape)) if lengths is None else lengths(s)


def _tame(*sizes: torch.Tensor) -> torch.Tensor:
    """Of sizes (N, …), none of them negative: of which n all are within `_TAME`, (N,)."""
    import torch

    each = [((size == 0) | ((size > 1 / _TAME) & (size < _TAME))).all(dim=1) for size in sizes]
    return torch.stack(each).all(dim=0)


def _changes(
    values: torch.Tensor, rounded: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The products (N, k, k), float64, of the columns of values (N, m, k), which are at right angles and of these lengths
    (N, k), and of what rounding added to them: of the first with the first, first with second, second with second.

    All were divided by the sizes (N,) that come with them first: ones, but where squares would leave float32's range.
    """
    import torch

    change = torch.sub(rounded.to(values), values)
    top = lengths.amax(dim=1)
    if not bool(_tame(top[:, None]).all()):
        top = torch.where(top > 0, top, 1.0)
        values, change = values / top[:, None, None], change / top[:, None, None]
        lengths = lengths / top[:, None]
    else:
        top = torch.ones_like(top)
    across = (values.mT @ change).double()
    return lengths.square().diag_embed(), across, (change.mT @ change).double(), top


def stacked(pairs: Sequence[Pair], weights: Sequence[float]) -> Pair:
    """B (m, Σr) and A (Σr, n) whose product is Σ wₖ·Bₖ·Aₖ, in float64."""
    whole = Stacked.of(pairs)
    return whole.b[0] * whole.columns([weights])[0], whole.a[0]


def decompose(b: torch.Tensor, a: torch.Tensor, rank: int | None = None, *, exact: bool = False) -> Svd:
    """The decomposition of b·a in float64, its first `rank` values (all r of them for None).

    `exact` works by QR, for factors whose columns nearly depend on each other.
    """
    import torch

    b, a = b.double(), a.double()
    if exact:
        return _by_qr(b, a, rank)
    found = _dependent_core(b.T @ b, a @ a.T, torch.ones(b.shape[1], dtype=b.dtype, device=b.device), rank)
    return Svd(b @ found.u, found.s, found.vh @ a, found.energy)


def _by_qr(b: torch.Tensor, a: torch.Tensor, rank: int | None) -> Svd:
    import torch

    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
    return Svd(qb @ u[:, :rank], s[:rank], vh[:rank] @ qa.T, float(s.square().sum()))


def _cores(left: torch.Tensor, right: torch.Tensor, signs: torch.Tensor, rank: int | None) -> Several:
    """The decompositions of b · diag(signs) · a in terms of the factors, whose Gram matrices (N, r, r) are `left` and
    `right`: b·u and vh·a are the singular vectors, u (N, r, k), vh (N, k, r).

    With right = L·Lᵀ the rows of L⁻¹·a are orthonormal, so one eigendecomposition of the squared sum in those does.  The
    product b·u·s·vh·a keeps its digits whatever the values, of which the square root costs half.  Where rows of a nearly
    depend on others, or values come near to nothing, `_dependent_core` takes longer.
    """
    import torch

    lower, failed = torch.linalg.cholesky_ex(right)
    pivots = lower.diagonal(dim1=1, dim2=2).square() / right.diagonal(dim1=1, dim2=2)
    sound = (failed == 0) & (pivots.amin(dim=1) > _INDEPENDENT)  # a NaN is not
    lower = torch.where(sound[:, None, None], lower, torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device))
    turned = signs[:, :, None] * lower
    values, vectors = torch.linalg.eigh(turned.mT @ left @ turned)
    values = values.flip(1).clamp_min(0)
    kept = values[:, :rank]
    sound &= kept[:, -1] > _FAINT * values[:, 0]
    s, own = kept.sqrt(), vectors.flip(2)[:, :, :rank]
    vh = torch.linalg.solve_triangular(lower.mT, own, upper=True).mT.contiguous()
    u = turned @ (own / s[:, None, :])
    energies = values.sum(dim=1).tolist()
    for n, fine in enumerate(sound.tolist()):
        if not fine:
            u[n], s[n], vh[n], energies[n] = _dependent_core(left[n], right[n], signs[n], rank)
    return Several(u, s, vh, energies, [], _of_length(s, None))


def _dependent_core(left: torch.Tensor, right: torch.Tensor, signs: torch.Tensor, rank: int | None) -> Svd:
    """As `_cores`, of one matrix and for any factors."""
    import torch

    one, two = _root(left), _root(right)
    core = (one.roots[:, None] * (one.vectors.T @ (signs[:, None] * two.vectors))) * two.roots
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    ub = (one.vectors * one.inverse) @ u[:, :rank]
    return Svd(ub, s[:rank], vh[:rank] @ (two.vectors * two.inverse).T, float(s.square().sum()))


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
