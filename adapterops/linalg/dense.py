"""The best low-rank approximation of a dense matrix: by block Krylov iteration (`krylov.py`), or by the Gram matrix of a small
side.

A block narrower than the rank takes more steps, and fewer columns in all; but of singular values that are the same it finds
as many as it has columns.  So a block is narrow only where there is no start, and where that many come out the same, a wide
one goes on.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adapterops.errors import BrokenAdapter
from adapterops.linalg.krylov import Found, leading, orthonormal, times
from adapterops.linalg.lowrank import Svd
from adapterops.linalg.random import Draw

if TYPE_CHECKING:
    import torch

MOST_STEPS = 40
"""Steps of a wide block after which it ends in any case; of a narrow one, as many as have as many columns in all."""
_MORE = 8
"""How much wider than the rank a wide block is: the vectors just beyond the rank converge slowest."""
_NARROWEST, _STEP = 16, 8
"""Columns of the narrowest block, as reading the matrix costs as much for fewer; and what those of others are multiples of."""
_RANDOM = 2
"""Columns of the first block that are random whatever start is given: it may be blind to some leading vectors."""
_SMALL_SIDE, _SMALL_BLOCKS = 160, 8
"""A side up to so many columns, or wide blocks, is decomposed by its Gram matrix: by measurement faster there."""
_STEEP = 0.03
"""A singular value below this share of the largest: squares in float32 do not tell its vector well from the next one's."""
_SQUARABLE = (1e-20, 1e30)
_ROWS = 1024
"""Rows of which a Gram matrix is summed up at a time."""

Parts = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""u (m, rank), s (rank,), vh (rank, n)."""


def truncated(
    matrix: torch.Tensor,
    rank: int,
    *,
    tolerance: float = 1e-5,
    start: torch.Tensor | None = None,
    draw: Draw,
    exact: bool = False,
) -> tuple[Svd, float]:
    """The leading `rank` singular values and vectors of `matrix` (m, n), float32, and their estimated excess error.

    `start` (n, k): columns that span much of the leading right singular vectors, best first (up to rank + 6 are used);
    the first block is filled up from `draw`.  `exact` decomposes the whole matrix.  A rank above min(m, n) is taken as
    that.

    The excess is (‖M − approximation‖ − ‖M − best approximation‖) / ‖M − best approximation‖.  The iteration ends when
    it is estimated to be at most `tolerance`, or when the singular vectors' residuals are no more than float32's rounding
    (with a `tolerance` of 0, only then), and in any case after `MOST_STEPS` steps; where ‖M − best approximation‖ is less than
    a hundredth of ‖M‖, the excess is relative to that hundredth.

    Works on the matrix's device (on the CPU for MPS, which has no float64).  Besides the matrix it holds some
    18·(rank + 8)·min(m, n) + 3·(rank + 8)·max(m, n) numbers.  Raises `BrokenAdapter` for values that are not finite.
    """
    import torch

    if matrix.device.type == "mps":
        matrix = matrix.cpu()
    m, n = matrix.shape
    rank = min(rank, m, n)
    energy = _energy(matrix)
    if not math.isfinite(energy):
        raise BrokenAdapter(
            "the merged delta is infinite or no number somewhere: smaller --weights keep it within float32"
        )
    if energy == 0:
        eye = torch.eye(max(m, n), rank, dtype=matrix.dtype, device=matrix.device)
        return Svd(eye[:m].clone(), matrix.new_zeros(rank), eye[:n].T.contiguous(), 0.0), 0.0
    if exact:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return Svd(u[:, :rank].contiguous(), s[:rank].clone(), vh[:rank].contiguous(), energy), 0.0
    tall, excess = matrix if m >= n else matrix.T, 0.0
    width = rank + _MORE
    if tall.shape[1] <= max(_SMALL_SIDE, _SMALL_BLOCKS * width):
        u, s, vh = _by_gram(tall, rank)
    else:
        if start is not None:
            start = start[:, : width - _RANDOM].to(matrix)
            start = start.T if m >= n else times(matrix, start.T)
        (u, s, vh), excess = _by_krylov(tall, rank, tolerance, start, draw, math.sqrt(energy))
    if m < n:
        u, vh = vh.T, u.T
    return Svd(u.contiguous(), s, vh.contiguous(), energy), excess


def _by_krylov(
    matrix: torch.Tensor, rank: int, tolerance: float, start: torch.Tensor | None, draw: Draw, norm: float
) -> tuple[Parts, float]:
    """Of a matrix (m, n), m ≥ n, and its norm; at most rank + 6 rows of `start` (k, n)."""
    import torch

    wide = rank + _MORE
    noise = torch.from_numpy(draw.normal(wide * matrix.shape[1])).reshape(wide, -1).to(matrix)

    def begun(rows: torch.Tensor | None, width: int) -> Found:
        first = noise if rows is None else torch.cat([rows, noise])
        columns = MOST_STEPS * wide
        return leading(matrix, rank, tolerance, orthonormal(first[:width]), noise[:width], norm, columns)

    narrow = min(wide, max(_NARROWEST, -(-rank // 2 // _STEP) * _STEP))
    found = begun(start, narrow if start is None else wide)
    if start is None and found.hidden:
        found = begun(None, wide)
    return _finished(matrix, found.rows, rank, norm), found.excess


def _by_gram(matrix: torch.Tensor, rank: int) -> Parts:
    """Of a matrix (m, n), m ≥ n, with few columns, from the eigenvectors of MᵀM in float64."""
    import torch

    n = matrix.shape[1]
    gram = torch.zeros(n, n, dtype=torch.float64, device=matrix.device)
    for row in range(0, matrix.shape[0], _ROWS):
        block = matrix[row : row + _ROWS].double()
        gram.addmm_(block.T, block)
    best = torch.linalg.eigh(gram)[1][:, -rank:].T.to(matrix)
    return _finished(matrix, best, rank, 1.0)


def _finished(matrix: torch.Tensor, rows: torch.Tensor, rank: int, norm: float) -> Parts:
    """The leading part of the singular value decomposition of M·P for the projection P on the span of the orthonormal `rows`
    (k, n), k ≥ rank; of P'·M, for P' on the span of M·rowsᵀ, where the singular values differ much.
    """
    import torch

    left, core = torch.linalg.qr(times(matrix, rows).T / norm)
    u, s, vh = torch.linalg.svd(core.cpu().double())
    if s[rank - 1] < _STEEP * s[0]:
        right, core = torch.linalg.qr(times(matrix.T, left.T).T / norm)
        v, s, uh = torch.linalg.svd(core.cpu().double())
        u, vh, rows = uh.T, v.T, right.T
    return left @ u[:, :rank].to(left), (s[:rank] * norm).to(left), vh[:rank].to(left) @ rows


def _energy(matrix: torch.Tensor) -> float:
    """‖M‖², in float64 over the blocks' sums; the entries too where their squares would leave float32's range.

    On the CPU numpy's dot product sums a block: torch's keeps fewer partial sums on some processors, and was 5e-8 off.
    """
    import torch

    cpu = matrix.device.type == "cpu"
    rows = max(1, (1 << 15 if cpu else 1 << 22) // matrix.shape[1])
    total = 0.0
    for row in range(0, matrix.shape[0], rows):
        flat = matrix[row : row + rows].reshape(-1)
        block = flat.numpy() if cpu else flat
        total += float(block @ block)
    if not _SQUARABLE[0] < total < _SQUARABLE[1]:
        return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    return total
