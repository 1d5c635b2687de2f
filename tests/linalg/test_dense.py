"""Truncated decompositions against LAPACK's full ones, in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch

from adapterops.errors import BrokenAdapter
from adapterops.linalg import dense, krylov
from adapterops.linalg.dense import truncated
from adapterops.linalg.lowrank import Svd, decompose
from adapterops.linalg.random import Draw

DRAW = Draw("test")


def adapters(m: int, n: int, rank: int, count: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Factors of adapters that share a part, with columns that decay, as trained ones do."""
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(count + 1, m, rank, generator=generator), torch.randn(count + 1, rank, n, generator=generator)
    decay = torch.arange(1, rank + 1).float() ** -0.7
    return (
        [(0.8 * b[0] + 0.6 * own) * decay * 0.01 for own in b[1:]],
        [(0.8 * a[0] + 0.6 * own) / math.sqrt(n) for own in a[1:]],
    )


@cache
def merged(m: int, n: int, rank: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """A TIES-merged delta of density 0.2, and the leading right singular vectors of the untrimmed sum."""
    bs, as_ = adapters(m, n, rank)
    out = torch.zeros(m, n)
    count = torch.zeros(m, n)
    deltas = [b @ a for b, a in zip(bs, as_, strict=True)]
    trimmed = [d * (d.abs() > d.abs().flatten().kthvalue(int(0.8 * d.numel())).values) for d in deltas]
    sign = torch.where(sum(trimmed, out) >= 0, 1, -1)
    for d in trimmed:
        agrees = d.sign() == sign
        out, count = out + d * agrees, count + agrees
    return out / count.clamp_min(1), decompose(torch.cat(bs, 1), torch.cat(as_, 0), rank + 8).vh.T.float()


def excess(matrix: torch.Tensor, found: Svd) -> float:
    """By the definition, all in float64."""
    rank = found.s.numel()
    best = torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt()
    approximation = found.u.double() * found.s.double() @ found.vh.double()
    return float((matrix.double() - approximation).norm() / best) - 1


def check(matrix: torch.Tensor, found: Svd, rank: int) -> None:
    """Shapes, orthonormality, order, the energy."""
    m, n = matrix.shape
    assert (found.u.shape, found.s.shape, found.vh.shape) == ((m, rank), (rank,), (rank, n))
    eye = torch.eye(rank)
    torch.testing.assert_close(found.u.T @ found.u, eye, atol=3e-6, rtol=0)
    torch.testing.assert_close(found.vh @ found.vh.T, eye, atol=3e-6, rtol=0)
    assert (found.s.diff() <= 0).all()
    assert found.energy == pytest.approx(float(matrix.double().square().sum()), rel=3e-7)
    assert found.u.is_contiguous()
    assert found.vh.is_contiguous()


@pytest.mark.parametrize("shape", [(600, 400), (400, 600)])
@pytest.mark.parametrize("rank", [4, 16, 32])
@pytest.mark.parametrize("warm", [False, True])
def test_merged_deltas(shape: tuple[int, int], rank: int, warm: bool) -> None:
    matrix, start = merged(*shape)
    found, estimate = truncated(matrix, rank, start=start if warm else None, draw=DRAW)
    check(matrix, found, rank)
    assert -1e-7 < excess(matrix, found) <= 1e-5
    assert 0 <= estimate <= 1e-5
    values = torch.linalg.svdvals(matrix.double())[:rank].float()
    torch.testing.assert_close(found.s, values, rtol=1e-3, atol=0)


@pytest.mark.parametrize("shape", [(300, 40), (40, 300), (160, 160), (400, 330), (7, 1), (1, 9)])
def test_small_matrices_are_exact(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    rank = min(shape) // 3 + 1 if min(shape) < 200 else 64
    found, estimate = truncated(matrix, rank, draw=DRAW)
    check(matrix, found, rank)
    assert estimate == 0
    torch.testing.assert_close(found.s, torch.linalg.svdvals(matrix)[:rank], rtol=3e-6, atol=1e-6)
    if rank < min(shape):
        assert abs(excess(matrix, found)) < 1e-6


def test_white_noise_ends_with_an_honest_estimate() -> None:
    matrix = torch.randn(400, 400, generator=torch.Generator().manual_seed(4))
    found, estimate = truncated(matrix, 8, draw=DRAW)
    check(matrix, found, 8)
    assert excess(matrix, found) < 3e-5
    assert estimate <= 1e-5


def test_it_ends_where_the_tolerance_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(400, 400, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(dense, "MOST_STEPS", 4)
    found, estimate = truncated(matrix, 8, tolerance=0.0, draw=DRAW)
    check(matrix, found, 8)
    true = excess(matrix, found)
    assert true > 1e-5
    assert true / 3 < estimate < true * 30


def test_restarts_go_on_to_the_same_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(500, 400, generator=torch.Generator().manual_seed(6))
    monkeypatch.setattr(krylov, "_BLOCKS", 3)
    found, estimate = truncated(matrix, 6, draw=DRAW, tolerance=1e-6)
    check(matrix, found, 6)
    assert estimate <= 1e-6
    assert excess(matrix, found) < 1e-6


def test_a_tighter_tolerance_gives_less_excess() -> None:
    matrix, _ = merged(600, 400)
    loose, tight = (truncated(matrix, 32, tolerance=tolerance, draw=DRAW)[0] for tolerance in (1e-2, 1e-6))
    assert excess(matrix, tight) <= 1e-6
    assert excess(matrix, tight) < excess(matrix, loose) <= 1e-2


def test_a_warm_start_saves_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, start = merged(600, 400)
    columns: list[int] = []
    image = krylov._image

    def counted(matrix: torch.Tensor, block: torch.Tensor, norm: float) -> torch.Tensor:
        columns.append(len(block))
        return image(matrix, block, norm)

    monkeypatch.setattr(krylov, "_image", counted)
    truncated(matrix, 16, draw=DRAW)
    cold, columns[:] = sum(columns), []
    truncated(matrix, 16, start=start, draw=DRAW)
    assert sum(columns) < cold


@pytest.mark.parametrize("columns", [1, 24, 200])
def test_any_start_will_do(columns: int) -> None:
    matrix, _ = merged(400, 600)
    start = torch.zeros(600, columns, dtype=torch.float64)
    start[0] = 1  # of rank one, in another dtype, and of no use
    found, _ = truncated(matrix, 16, start=start, draw=DRAW)
    check(matrix, found, 16)
    assert excess(matrix, found) <= 1e-5


@pytest.mark.parametrize("shape", [(500, 400), (400, 500)])
def test_a_start_that_is_blind_to_the_leading_vectors(shape: tuple[int, int]) -> None:
    matrix = torch.zeros(shape)
    matrix.diagonal().copy_(torch.linspace(2, 1, 400) ** 4)
    start = torch.eye(shape[1])[:, 300:340]  # singular vectors, and not the leading ones
    found, _ = truncated(matrix, 8, start=start, draw=DRAW)
    check(matrix, found, 8)
    assert excess(matrix, found) < 1e-4


def test_exact_is_lapacks() -> None:
    matrix, _ = merged(400, 600)
    found, estimate = truncated(matrix, 12, draw=DRAW, exact=True)
    check(matrix, found, 12)
    assert estimate == 0
    assert torch.equal(found.s, torch.linalg.svd(matrix, full_matrices=False)[1][:12])


@pytest.mark.parametrize("exact", [False, True])
def test_a_rank_above_the_smaller_side_is_that_side(exact: bool) -> None:
    matrix = torch.randn(30, 12, generator=torch.Generator().manual_seed(7))
    found, _ = truncated(matrix, 99, draw=DRAW, exact=exact)
    check(matrix, found, 12)
    torch.testing.assert_close(found.u * found.s @ found.vh, matrix)


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("columns", [5, 17, 60])
@pytest.mark.parametrize("wide", [False, True])
def test_sparse_matrices_and_subspaces_that_end(wide: bool, columns: int, rank: int) -> None:
    # Exact zeros: after a step or two, MᵀM gives nothing new.
    matrix = torch.zeros(500, 400)
    matrix[40 : 40 + columns, 7 : 7 + columns] = torch.diag(torch.linspace(2, 1, columns))
    matrix = matrix.T.contiguous() if wide else matrix
    found, _ = truncated(matrix, rank, tolerance=0.0, draw=DRAW)
    check(matrix, found, rank)
    wanted = torch.zeros(max(rank, columns))
    wanted[:columns] = torch.linspace(2, 1, columns)
    torch.testing.assert_close(found.s, wanted[:rank], rtol=1e-5, atol=1e-6)


def test_the_identity() -> None:
    found, _ = truncated(torch.eye(400), 8, draw=DRAW)
    check(torch.eye(400), found, 8)
    torch.testing.assert_close(found.s, torch.ones(8))


@pytest.mark.parametrize("shape", [(500, 400), (400, 500), (20, 10)])
def test_zeros(shape: tuple[int, int]) -> None:
    found, estimate = truncated(torch.zeros(shape), 8, draw=DRAW)
    check(torch.zeros(shape), found, 8)
    assert not found.s.any()
    assert (found.energy, estimate, found.error) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("shape", [(700, 500), (500, 700), (90, 60)])
def test_a_matrix_of_lower_rank_than_asked_for(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(8)
    matrix = torch.randn(shape[0], 5, generator=generator) @ torch.randn(5, shape[1], generator=generator)
    found, _ = truncated(matrix, 16, draw=DRAW)
    check(matrix, found, 16)
    assert float((matrix - found.u * found.s @ found.vh).norm() / matrix.norm()) < 2e-6
    assert float(found.s[5:].max() / found.s[0]) < 1e-6


@pytest.mark.parametrize("scale", [1e-25, 1e15])
def test_any_scale(scale: float) -> None:
    matrix, _ = merged(600, 400)
    found, _ = truncated(matrix, 8, draw=DRAW)
    scaled, _ = truncated(matrix.double().mul(scale).float(), 8, draw=DRAW)
    torch.testing.assert_close(scaled.s.double() / scale, found.s.double(), rtol=1e-5, atol=0)


def test_the_same_bytes_each_time() -> None:
    matrix, _ = merged(600, 400)
    first, second = (truncated(matrix, 8, draw=Draw("a"))[0] for _ in range(2))
    other = truncated(matrix, 8, draw=Draw("b"))[0]
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.vh, second.vh)
    assert not torch.equal(first.vh, other.vh)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    matrix = torch.ones(300, 300)
    matrix[7, 9] = value
    with pytest.raises(BrokenAdapter, match="infinite or no number"):
        truncated(matrix, 4, draw=DRAW)


def with_values(m: int, n: int, values: Sequence[float]) -> torch.Tensor:
    """A matrix of these singular values."""
    generator = torch.Generator().manual_seed(9)
    u, v = (torch.linalg.qr(torch.randn(k, len(values), generator=generator, dtype=torch.float64))[0] for k in (m, n))
    return (u * torch.tensor(values, dtype=torch.float64) @ v.T).float()


def best(matrix: torch.Tensor, *ranks: int) -> list[torch.Tensor]:
    """LAPACK's best approximation of each rank, in the matrix's type."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return [u[:, :rank] * s[:rank] @ vh[:rank] for rank in ranks]


SPECTRA = {
    "noise": [math.sqrt(1 - k / 901) for k in range(1, 901)],
    "falling": [k**-0.7 for k in range(1, 901)],
    "steep": [2 ** (-k / 3) for k in range(60)],
    "one stands out": [30.0] + [math.sqrt(1 - k / 901) for k in range(1, 900)],
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("shape", [(900, 900), (1500, 900), (900, 1500)])
def test_to_the_last_digit_it_is_as_good_as_lapack(name: str, shape: tuple[int, int]) -> None:
    matrix, ranks = with_values(*shape, SPECTRA[name]), (16, 40)
    for rank, wanted, same in zip(ranks, best(matrix.double(), *ranks), best(matrix, *ranks), strict=True):
        found, estimate = truncated(matrix, rank, tolerance=0, draw=DRAW)
        check(matrix, found, rank)
        assert estimate == 0
        ours = found.u.double() * found.s.double() @ found.vh.double()
        error, theirs = (float((part - wanted).norm() / matrix.norm()) for part in (ours, same))
        assert error < max(2e-6, 3 * theirs), rank


@pytest.mark.parametrize("tolerance", [1e-5, 0])
@pytest.mark.parametrize("rank", [16, 32, 48])
@pytest.mark.parametrize("apart", [0, 1e-6, 1e-4])
def test_more_equal_values_than_a_narrow_block_has_columns(tolerance: float, rank: int, apart: float) -> None:
    equal = [2 + apart * k / 50 for k in range(50, 0, -1)]
    matrix = with_values(900, 700, equal[:25] + [value - 0.2 for value in equal[25:]] + SPECTRA["noise"][650:])
    found, _ = truncated(matrix, rank, tolerance=tolerance, draw=DRAW)
    check(matrix, found, rank)
    assert excess(matrix, found) < 1e-5
    torch.testing.assert_close(found.s, torch.linalg.svdvals(matrix.double())[:rank].float(), rtol=1e-4, atol=0)


def test_equal_values_at_the_cut() -> None:
    values = [k**-0.7 for k in range(1, 901)]
    values[15] = values[16] = values[17]
    matrix = with_values(900, 1000, values)
    found, estimate = truncated(matrix, 16, tolerance=0, draw=DRAW)
    check(matrix, found, 16)
    assert estimate == 0
    assert excess(matrix, found) < 1e-10


def test_a_start_of_singular_vectors_that_do_not_lead() -> None:
    values = [2.0] * 10 + SPECTRA["noise"][10:]
    matrix = with_values(900, 900, values)
    start = torch.linalg.svd(matrix, full_matrices=False)[2][100:114].T
    found, _ = truncated(matrix, 8, start=start, draw=DRAW)
    check(matrix, found, 8)
    torch.testing.assert_close(found.s, torch.full((8,), 2.0), rtol=1e-4, atol=0)


def test_float64_and_any_layout() -> None:
    matrix = with_values(900, 1200, SPECTRA["falling"])
    (expected,) = best(matrix.double(), 8)
    for other in (matrix.double(), matrix.T.contiguous().T, torch.cat([matrix, matrix], 1)[:, :1200]):
        found, _ = truncated(other, 8, tolerance=0, draw=DRAW)
        product = found.u.double() * found.s.double() @ found.vh.double()
        assert float((product - expected).norm() / expected.norm()) < 2e-6
