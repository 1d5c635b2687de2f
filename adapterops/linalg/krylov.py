"""Leading singular vectors of a large dense matrix by block Krylov iteration.

The subspace grows by MᵀM times its newest block (Musco and Musco, https://arxiv.org/abs/1504.05477); where it gets large it is
restarted from its best vectors (Wu and Simon, https://doi.org/10.1137/S0895479898334605).  As every other vector's image
lies in it, what the newest block's image has outside of it tells how far each singular vector is from being one, and so
when to stop.

Vectors are rows here, so that a block of them is contiguous.  Everything is relative to the matrix's norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

_MORE = 8
"""Vectors beyond the rank that are given too: squares in float32 tell small singular values from one another badly."""
_BLOCKS = 8
"""Blocks, besides as many vectors as the rank, in the subspace before it is restarted."""
_ROWS = 2048
"""Rows of the matrix that are multiplied both ways at a time."""
_GROWTH = 1.2
"""How much the subspace grows before its vectors are looked at again."""
_SAME = 1e-3
"""Squares of singular values that differ relatively by less may be the same."""
_EXACT = 16 * 2.0**-24
"""The residual of a singular vector, relative to the largest singular value, that is no more than float32's rounding."""
_SMALLEST = 1e-9
"""The share of the largest square of a singular value below which none is told from zero."""
_ROUNDING = 1e-8
"""How large noise is beside what it is added to: no larger than float32's own."""
_INSIDE = 0.1
"""The share of a row in what it was made orthogonal to, from which on it is mostly rounding."""
_INDEPENDENT = 3e-3
"""The sine of the least angle between a row and those before it at which Cholesky's factor makes them orthonormal."""
_MOST_ATTEMPTS = 5
_FLOOR = 1e-4
"""Errors below a hundredth of the norm (squared: this) count as a hundredth: float32 resolves no excess over less."""
_SLOW, _SLOWEST = 0.3, 0.98
"""Which share of one look's gain the next brings, where it falls slowly; and at most."""


class Found(NamedTuple):
    """`rows` (rank + 8, n) are orthonormal, and the leading right singular vectors are in their span; `excess` is the estimated
    excess error; `hidden` whether more singular values may be the same than a block has columns: then some may be missing."""

    rows: torch.Tensor
    excess: float
    hidden: bool


def leading(
    matrix: torch.Tensor,
    rank: int,
    tolerance: float,
    first: torch.Tensor,
    noise: torch.Tensor,
    norm: float,
    columns: int,
) -> Found:
    """Of a matrix (m, n), float32, with that norm.

    `first` (width, n) are the orthonormal rows that the subspace begins with; `noise`, of the same shape, are random ones, of
    which it is helped out.  Ends where the estimated excess is at most `tolerance`, and after `columns` products with MᵀM in
    any case.  n is at least rank + 2·width.
    """
    import torch

    width, n = first.shape
    most = min(rank + _BLOCKS * width, n - width)
    basis, core = matrix.new_empty(most, n), torch.zeros(most, most, dtype=torch.float64)
    captured: list[float] = []
    used = seen = done = 0
    block = first
    while True:
        new = slice(used, used + width)
        basis[new] = block
        used, done = used + width, done + width
        image = _image(matrix, block, norm)
        inside = image @ basis[:used].T
        core[new, :used] = inside.cpu().double()
        core[:used, new] = core[new, :used].T
        rest = torch.addmm(image, inside, basis[:used], alpha=-1)
        block = _following(rest, basis[:used], noise.roll(done, 1))
        full, last = used + width > most, done >= columns
        if used >= rank and (full or last or used >= _GROWTH * seen):
            seen = used
            values, vectors = torch.linalg.eigh(core[:used, :used])
            residuals = ((block @ rest.T).cpu().double() @ vectors[-width:]).norm(dim=0)
            captured.append(float(values[-rank:].sum()))
            excess = estimated_excess(values.flip(0).tolist(), residuals.flip(0).tolist(), rank, width, captured)
            if last or (excess <= tolerance and len(captured) > 1):
                break
        if full:
            used = seen = min((rank + most) // 2, most - width)
            basis[:used] = vectors[:, -used:].T.to(basis) @ basis[: len(vectors)]
            core.zero_()
            core.diagonal()[:used] = values[-used:]
    rows = vectors[:, -(rank + _MORE) :].T.to(basis) @ basis[:used]
    return Found(orthonormal(rows), excess, _hidden(values.flip(0)[:rank].tolist(), width))


def _image(matrix: torch.Tensor, block: torch.Tensor, norm: float) -> torch.Tensor:
    """block·MᵀM (width, n), relative to the norm; where M's rows lie together, by parts that may still be in the cache."""
    if not matrix.is_contiguous():
        return times(matrix.T, times(matrix, block) / norm) / norm
    image = block.new_zeros(block.shape)
    for row in range(0, matrix.shape[0], _ROWS):
        rows = matrix[row : row + _ROWS]
        image.addmm_(times(rows, block) / norm, rows)
    return image / norm


def times(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """rows·Mᵀ (k, m) for rows (k, n): by measurement the faster way round for how the matrix lies in memory."""
    return (matrix @ rows.T).T if matrix.is_contiguous() else rows @ matrix.T


def estimated_excess(
    values: Sequence[float], residuals: Sequence[float], rank: int, width: int, captured: Sequence[float]
) -> float:
    """What `leading` says of it, from the subspace's squared singular values, best first, with their residuals, and from
    the share of ‖M‖² that the first `rank` captured at each look so far.

    By its residual r a value λ is off by at most r, and by r²/gap where the others are a gap away (Kato and Temple). Those just
    beyond the rank are in the subspace too, so that the gap is to the one a block further.  The excess is half of what is missing
    of the squares, relatively; but residuals know nothing of vectors that the subspace hardly holds yet, so all of it counts,
    and where the looks' gains fall slowly, at least half the sum of their geometric series.  Residuals no larger than
    rounding count as nothing.
    """
    beyond, most = values[min(rank + width, len(values)) - 1], max(values[0], 0.0)
    missing = 0.0
    for value, residual in zip(values[:rank], residuals, strict=False):
        if residual > _EXACT * (max(value, _SMALLEST * most) * most) ** 0.5:
            missing += residual * min(1.0, residual / max(value - beyond, residual))
    gains = [after - before for before, after in zip(captured[-3:], captured[-2:], strict=False)]
    if missing and len(gains) == 2 and gains[1] > _SLOW * gains[0] > 0:
        ratio = min(_SLOWEST, gains[1] / gains[0])
        missing = max(missing, gains[1] * ratio / (1 - ratio) / 2)
    lost = max(0.0, 1 - captured[-1])
    return missing / max(lost, _FLOOR)


def _hidden(values: Sequence[float], width: int) -> bool:
    """Whether as many values as a block has columns are the same."""
    return any(one - other <= _SAME * one for one, other in zip(values, values[width - 1 :], strict=False))


def _following(rows: torch.Tensor, basis: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows (width, n) outside of the orthonormal `basis` (used, n) that span `rows`, which have been made
    orthogonal to it but for rounding.

    Where these are of fewer dimensions (sparse matrices, matrices of low rank, vectors found to the last digit), `noise`
    gives the rest: without it QR would, and that may lie in the basis.  Repeated while a row lay mostly in the basis, as QR
    makes large what rounding left of it.
    """
    import torch

    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    inside = rows @ basis.T
    if float(inside.square().sum(dim=1).max()) < _INSIDE**2:
        made = _by_cholesky(torch.addmm(rows, inside, basis, alpha=-1))
        if made is not None:
            return made
    for attempt in range(_MOST_ATTEMPTS):
        rows = rows / (float(rows.abs().max()) or 1.0) + noise * _ROUNDING
        squares = rows.square().sum(dim=1)
        inside = rows @ basis.T
        rows = orthonormal(rows - inside @ basis)
        if attempt and float((inside.square().sum(dim=1) / squares).max()) < 0.5:
            break
    return rows


def _by_cholesky(rows: torch.Tensor) -> torch.Tensor | None:
    """Orthonormal rows that span `rows`, about unit vectors, from their Gram matrix; None where they are nearly dependent.

    Twice, as the first time leaves rounding times the square of their condition number.  Source: Yamamoto et al.,
    https://doi.org/10.1553/etna_vol44s306.
    """
    import torch

    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex((rows @ rows.T).cpu().double())
        if int(failed) or float(factor.diagonal().min()) < _INDEPENDENT:
            return None
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
        rows = inverse.to(rows) @ rows
    return rows


def orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows that span `rows`."""
    import torch

    q: torch.Tensor = torch.linalg.qr(rows.T)[0]
    return q.T.contiguous()
