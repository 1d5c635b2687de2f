"""The best low-rank approximation of a dense matrix.

Block Krylov iteration (Musco and Musco, https://arxiv.org/abs/1504.05477), restarted from the best vectors where its
subspace gets large: the subspace grows by MᵀM times its newest block, and holds the leading singular vectors to many
digits long before it is the whole space.  How fast it still gains on ‖M‖² tells when to stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from adapterops.errors import BrokenAdapter
from adapterops.linalg.lowrank import Svd
from adapterops.linalg.random import Draw

if TYPE_CHECKING:
    import torch

MOST_STEPS = 40
_MORE = 8
"""How much wider than the rank a block is: the vectors just beyond the rank converge slowest."""
_RANDOM = 2
"""Columns of the first block that are random whatever start is given: it may be blind to some leading vectors."""
_MOST_BLOCKS = 6
"""Blocks in the subspace before it is restarted."""
_SMALL_SIDE, _SMALL_BLOCKS = 160, 8
"""A side up to so many columns, or blocks, is decomposed by its Gram matrix: by measurement faster there."""
_ROUNDING = 1e-8
"""How large noise is beside what it is added to: no larger than float32's own."""
_MOST_ATTEMPTS = 5
_SQUARABLE = (1e-20, 1e30)
_ROWS = 1024
"""Rows of which a Gram matrix is summed up at a time."""
_FLOOR = 1e-4
"""Errors below a hundredth of the norm (squared: this) count as a hundredth: float32 resolves no excess over less."""
_SLOWEST, _FASTEST, _UNKNOWN = 0.98, 0.1, 0.5
"""Which share of a step's gain the next step is believed to bring: limits, and what is assumed after the first two."""

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
    it is estimated to be at most `tolerance`, and in any case after `MOST_STEPS` steps; where ‖M − best approximation‖
    is less than a hundredth of ‖M‖, the excess is relative to that hundredth.

    Works on the matrix's device (on the CPU for MPS, which has no float64).  Besides the matrix it holds
    6·(rank + 8)·(m + n) numbers.  Raises `BrokenAdapter` for values that are not finite.
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
        given = [] if start is None else [start[:, : width - _RANDOM].to(matrix)]
        given = given if m >= n else [matrix @ columns for columns in given]
        noise = torch.from_numpy(draw.normal(width * tall.shape[1])).reshape(width, -1).to(matrix)
        first = _orthonormal(torch.cat([*(columns.T for columns in given), noise])[:width])
        (u, s, vh), excess = _by_krylov(tall, rank, tolerance, first, noise, math.sqrt(energy))
    if m < n:
        u, vh = vh.T, u.T
    return Svd(u.contiguous(), s, vh.contiguous(), energy), excess


def _by_krylov(
    matrix: torch.Tensor, rank: int, tolerance: float, first: torch.Tensor, noise: torch.Tensor, norm: float
) -> tuple[Parts, float]:
    """Of a matrix (m, n), m ≥ n, and its norm; `first` (width, n) are the rows that the subspace begins with, and
    `noise` are random ones, of which it is helped out.

    Vectors are rows here, so that a block of them is contiguous.  Everything is relative to the norm.
    """
    import torch

    m, n = matrix.shape
    width = first.shape[0]
    most = _MOST_BLOCKS * width
    basis, images = matrix.new_empty(most, n), matrix.new_empty(most, m)
    gram = torch.zeros(most, most, dtype=torch.float64)
    captured: list[float] = []
    used, block = 0, first
    while True:
        new = slice(used, used + width)
        basis[new] = block
        torch.mm(block, matrix.T, out=images[new])
        images[new] /= norm
        used += width
        gram[:used, new] = (images[:used] @ images[new].T).cpu().double()
        gram[new, :used] = gram[:used, new].T
        values, vectors = torch.linalg.eigh(gram[:used, :used])
        captured.append(float(values[-rank:].sum()))
        excess = estimated_excess(captured)
        if excess <= tolerance or len(captured) == MOST_STEPS:
            break
        block = _following(images[new] @ matrix, basis[:used], noise.roll(len(captured), 1))
        if used + width > most:
            kept = min(rank + width, most - width)
            best = vectors[:, -kept:].T.to(basis)
            basis[:kept], images[:kept] = best @ basis[:used], best @ images[:used]
            gram[:kept, :kept] = torch.diag(values[-kept:])
            used = kept
    best = vectors[:, -rank:].T.to(basis)
    return _finished(best @ images[:used], best @ basis[:used], norm), excess


def estimated_excess(captured: Sequence[float]) -> float:
    """What `truncated` says of it, from the share of ‖M‖² that was captured after each step so far.

    What is missing is taken for a geometric series that begins with the last gain; its ratio is the larger one of the
    last two, as steps bring less and less.
    """
    lost = max(0.0, 1 - captured[-1])
    gains = [max(0.0, after - before) for before, after in pairwise(captured)]
    missing = lost
    if gains:
        ratios = [min(after / before, 1.0) if before else 0.0 for before, after in pairwise(gains)]
        ratio = min(_SLOWEST, max(_FASTEST, *ratios[-2:])) if ratios else _UNKNOWN
        missing = min(lost, gains[-1] * ratio / (1 - ratio))
    return missing / (2 * max(lost, _FLOOR))


def _following(rows: torch.Tensor, basis: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows (width, n) that span what `rows` have outside of the orthonormal `basis` (used, n).

    Where that is of fewer dimensions (sparse matrices, matrices of low rank), `noise` gives the rest: without it QR
    would, and that may lie in the basis.  Repeated while a row lay mostly in the basis, as QR makes large what rounding
    left of it.
    """
    for attempt in range(_MOST_ATTEMPTS):
        rows = rows / (float(rows.abs().max()) or 1.0) + noise * _ROUNDING
        squares = rows.square().sum(dim=1)
        inside = rows @ basis.T
        rows = _orthonormal(rows - inside @ basis)
        if attempt and float((inside.square().sum(dim=1) / squares).max()) < 0.5:
            break
    return rows


def _orthonormal(rows: torch.Tensor) -> torch.Tensor:
    """Orthonormal rows that span `rows`."""
    import torch

    q: torch.Tensor = torch.linalg.qr(rows.T)[0]
    return q.T.contiguous()


def _by_gram(matrix: torch.Tensor, rank: int) -> Parts:
    """Of a matrix (m, n), m ≥ n, with few columns, from the eigenvectors of MᵀM in float64."""
    import torch

    n = matrix.shape[1]
    gram = torch.zeros(n, n, dtype=torch.float64, device=matrix.device)
    for row in range(0, matrix.shape[0], _ROWS):
        block = matrix[row : row + _ROWS].double()
        gram.addmm_(block.T, block)
    best = torch.linalg.eigh(gram)[1][:, -rank:].T.to(matrix)
    return _finished(best @ matrix.T, best, 1.0)


def _finished(images: torch.Tensor, basis: torch.Tensor, norm: float) -> Parts:
    """The singular value decomposition of M·P for the projection P on the orthonormal rows `basis` (rank, n).

    `images` (rank, m) are M times each of them, relative to `norm`.
    """
    import torch

    u, core = torch.linalg.qr(images.T)
    left, s, right = torch.linalg.svd(core.cpu().double())
    return u @ left.to(u), (s * norm).to(u), right.to(u) @ basis


def _energy(matrix: torch.Tensor) -> float:
    """‖M‖², in float64 over the blocks' sums; the entries too where their squares would leave float32's range."""
    import torch

    rows = max(1, (1 << 15 if matrix.device.type == "cpu" else 1 << 22) // matrix.shape[1])
    total = 0.0
    for row in range(0, matrix.shape[0], rows):
        flat = matrix[row : row + rows].reshape(-1)
        total += float(torch.dot(flat, flat))
    if not _SQUARABLE[0] < total < _SQUARABLE[1]:
        return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    return total
