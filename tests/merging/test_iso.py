"""Iso-C against a dense SVD of the sum."""

from __future__ import annotations

import pytest
import torch
from merge_samples import pairs, product

from adapterops.linalg.lowrank import Pair
from adapterops.merging.methods.iso import iso_c
from adapterops.merging.registry import find


def total(given: list[Pair], weights: list[float]) -> torch.Tensor:
    return torch.stack([w * product(pair) for w, pair in zip(weights, given, strict=True)]).sum(dim=0)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.5, -2.0]])
def test_at_full_rank_it_is_the_papers(weights: list[float]) -> None:
    given = pairs([6, 6], 8, 12)
    u, s, vh = torch.linalg.svd(total(given, weights), full_matrices=False)
    found = iso_c(given, weights, 12)
    assert found[0].shape[1] == 8
    torch.testing.assert_close(product(found), s.mean() * u @ vh)


@pytest.mark.parametrize("rank", [1, 3, 7, 9])
def test_at_a_lower_rank_it_is_that_of_the_best_approximation(rank: int) -> None:
    given = pairs([4, 3])
    u, s, vh = torch.linalg.svd(total(given, [1.0, 1.0]), full_matrices=False)
    kept = min(rank, 7)
    found = iso_c(given, [1.0, 1.0], rank)
    assert found[0].shape[1] == found[1].shape[0] == kept
    torch.testing.assert_close(product(found), s[:kept].mean() * u[:, :kept] @ vh[:kept])
    assert float(torch.linalg.svdvals(product(found)).sum()) == pytest.approx(float(s[:kept].sum()))


def test_directions_that_are_not_there_are_not_lifted() -> None:
    pair = pairs([3])[0]
    found = product(iso_c([pair] * 4, [1.0] * 4, 12))
    torch.testing.assert_close(found, 4 * product(iso_c([pair], [1.0], 3)))
    assert torch.linalg.matrix_rank(found) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_rounding_of_a_copy_is_not_lifted(dtype: torch.dtype) -> None:
    pair = pairs([3])[0]
    rounded = (pair[0].to(dtype).double(), pair[1].to(dtype).double())
    found = iso_c([pair, rounded], [1.0, 1.0], 6)
    assert found[0].shape[1] == 3
    torch.testing.assert_close(product(found), 2 * product(iso_c([pair], [1.0], 3)), rtol=0.02, atol=0.02)


def test_order_and_scale() -> None:
    given, weights = pairs([4, 3, 2]), [1.0, 0.5, 2.0]
    one = product(iso_c(given, weights, 5))
    torch.testing.assert_close(product(iso_c(given[::-1], weights[::-1], 5)), one)
    torch.testing.assert_close(product(iso_c([(4 * b, a) for b, a in given], weights, 5)), 4 * one)
    torch.testing.assert_close(product(iso_c(given, [2 * w for w in weights], 5)), 2 * one)


def test_sums_of_nothing() -> None:
    pair = pairs([3])[0]
    zero = (torch.zeros_like(pair[0]), pair[1])
    assert not product(iso_c([zero, zero], [1.0, 1.0], 4)).any()
    assert not product(iso_c([pair], [0.0], 4)).any()
    assert bool(product(iso_c([pair, zero], [1.0, 1.0], 4)).isfinite().all())


def test_it_is_declared() -> None:
    assert find("iso_c")[0].sums
