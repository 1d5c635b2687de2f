"""What the Krylov iteration knows of its own error, and what it makes orthonormal."""

from __future__ import annotations

import pytest
import torch

from adapterops.linalg.krylov import _by_cholesky, _following, estimated_excess, leading, times


def rows(many: int, columns: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(columns, many, generator=torch.Generator().manual_seed(seed)))[0].T.contiguous()


def test_the_estimate_is_by_residuals() -> None:
    # Of an error of 0.2, 0.01² / (0.5 − 0.1) is missing.
    values, residuals = [0.5, 0.3, 0.2, 0.1], [0.01, 0.0, 0.1, 0.1]
    assert estimated_excess(values, residuals, 2, 2, [0.8]) == pytest.approx(0.01**2 / 0.4 / 0.2)
    assert estimated_excess(values, [0.01, 0.02, 0.1, 0.1], 2, 2, [0.8]) == pytest.approx(
        (0.01**2 / 0.4 + 0.02**2 / 0.2) / 0.2
    )


def test_without_a_gap_a_residual_counts_whole() -> None:
    assert estimated_excess([0.5, 0.5], [0.01, 0.01], 1, 1, [0.5]) == pytest.approx(0.01 / 0.5)


def test_gains_that_fall_slowly_count_as_a_geometric_series() -> None:
    # Gains of 0.08, 0.04, 0.02 …: 0.02 is missing yet, of an error of 0.36.
    captured, values = [0.5, 0.58, 0.62, 0.64], [0.4, 0.24, 0.01]
    assert estimated_excess(values, [1e-3, 1e-3, 0.1], 2, 1, captured) == pytest.approx(0.02 / 2 / 0.36)
    assert estimated_excess(values, [0.1, 0.1, 0.1], 2, 1, captured) > 0.1  # the residuals say more
    fast = [0.5, 0.639, 0.64]
    assert estimated_excess(values, [1e-3, 1e-3, 0.1], 2, 1, fast) < 1e-4


def test_rounding_counts_as_nothing() -> None:
    captured = [0.5, 0.55, 0.6]
    assert estimated_excess([0.5, 0.1, 0.05], [4e-7, 1e-7, 0.1], 2, 1, captured) == 0
    assert estimated_excess([0.5, 0.1, 0.05], [4e-6, 1e-7, 0.1], 2, 1, captured) > 0
    assert estimated_excess([0.5, 0.0, -1e-9], [0.0, 1e-12, 0.1], 2, 1, captured) == 0


def test_errors_below_a_hundredth_are_relative_to_that() -> None:
    assert estimated_excess([0.9, 0.1], [1e-4, 0.0], 1, 1, [1.0]) == pytest.approx(1e-8 / 0.8 / 1e-4)


def test_cholesky_makes_them_orthonormal_or_says_no() -> None:
    first = rows(12, 300, 0)
    skewed = first + 0.9 * first.roll(1, 0)
    made = _by_cholesky(skewed / skewed.norm(dim=1, keepdim=True))
    assert made is not None
    torch.testing.assert_close(made @ made.T, torch.eye(12), atol=1e-6, rtol=0)
    torch.testing.assert_close(first @ made.T @ made, first, atol=1e-4, rtol=0)
    first[3] = first[4] + 1e-5 * first[3]
    assert _by_cholesky(first) is None


@pytest.mark.parametrize("kind", ["apart", "dependent", "zero", "inside"])
def test_the_following_block_is_outside_of_the_basis(kind: str) -> None:
    basis, fresh, noise = rows(30, 400, 1), rows(8, 400, 2), rows(8, 400, 3)
    fresh = fresh - fresh @ basis.T @ basis
    fresh[2:] *= 1e-4
    if kind == "dependent":
        fresh[5] = fresh[6]
    elif kind == "zero":
        fresh[4:] = 0
    elif kind == "inside":
        fresh[1] = basis[0] * 1e-6 + fresh[1] * 1e-9
    made = _following(fresh, basis, noise)
    torch.testing.assert_close(made @ made.T, torch.eye(8), atol=1e-6, rtol=0)
    assert float((made @ basis.T).abs().max()) < 1e-6
    if kind != "inside":
        torch.testing.assert_close(fresh @ made.T @ made, fresh, atol=1e-6, rtol=0)


def test_products_are_the_same_whatever_the_layout() -> None:
    matrix, block = rows(50, 70, 4), rows(6, 70, 5)
    expected = block.double() @ matrix.double().T
    for one in (matrix, matrix.T.contiguous().T, torch.cat([matrix, matrix], 1)[:, :70]):
        torch.testing.assert_close(times(one, block).double(), expected, atol=1e-6, rtol=0)


def test_it_ends_after_so_many_columns_and_says_what_may_be_hidden() -> None:
    noise = torch.randn(6, 300, generator=torch.Generator().manual_seed(6))
    white = torch.randn(500, 300, generator=torch.Generator().manual_seed(7))
    found = leading(white, 8, 0.0, rows(6, 300, 8), noise, float(white.norm()), 12)
    assert found.rows.shape == (12, 300)
    assert found.excess > 1e-3
    assert not found.hidden
    equal = torch.diag(torch.tensor([3.0] * 7 + [1e-3] * 293))
    found = leading(equal, 8, 1e-5, rows(6, 300, 8), noise, float(equal.norm()), 320)
    assert found.hidden
