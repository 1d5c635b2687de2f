"""TSV-Merge against the authors' algorithm on dense matrices."""

from __future__ import annotations

import pytest
import torch
from merge_samples import pairs, product

from adapterops.linalg.lowrank import Pair
from adapterops.merging.methods.tsv import nearest_orthonormal, share, tsv
from adapterops.merging.registry import find


def reference(given: list[Pair], weights: list[float], counts: list[int]) -> torch.Tensor:
    """Dense SVDs cut to `counts`; stacked U and V replaced by the U·Vᵀ of their own SVDs (Procrustes)."""
    left, values, right = [], [], []
    for pair, weight, count in zip(given, weights, counts, strict=True):
        u, s, vh = torch.linalg.svd(product(pair), full_matrices=False)
        left.append(u[:, :count])
        values.append(weight * s[:count])
        right.append(vh[:count])
    uu, _, uv = torch.linalg.svd(torch.cat(left, dim=1), full_matrices=False)
    vu, _, vv = torch.linalg.svd(torch.cat(right, dim=0), full_matrices=False)
    merged: torch.Tensor = uu @ uv @ torch.diag(torch.cat(values)) @ vu @ vv
    return merged


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, -1.0, 2.0]])
@pytest.mark.parametrize(
    ("ranks", "rank", "counts"),
    [
        ([4, 4, 4], 6, [2, 2, 2]),
        ([4, 4, 4], 12, [4, 4, 4]),
        ([4, 4, 4], 8, [3, 3, 2]),
        ([4, 4, 4], 2, [1, 1, 0]),
        ([5, 1, 4], 9, [4, 1, 4]),
        ([2, 1, 2], 50, [2, 1, 2]),
    ],
)
def test_it_orthogonalises_the_leading_components(
    ranks: list[int], rank: int, counts: list[int], weights: list[float]
) -> None:
    given = pairs(ranks)
    found = tsv(given, weights, rank)
    assert found[0].shape[1] == sum(counts) <= rank
    torch.testing.assert_close(product(found), reference(given, weights, counts))


def test_the_factors_are_orthogonal() -> None:
    b, a = tsv(pairs([3, 3]), [1.0, 1.0], 6)
    torch.testing.assert_close(a @ a.T, torch.eye(6, dtype=torch.float64))
    scaled = b / b.norm(dim=0)
    torch.testing.assert_close(scaled.T @ scaled, torch.eye(6, dtype=torch.float64))


def test_no_more_components_than_the_matrix_has() -> None:
    b, a = tsv(pairs([4, 4, 4], 5, 30), [1.0] * 3, 12)
    assert b.shape == (5, 5)
    assert a.shape == (5, 30)


def test_orthogonal_adapters_are_summed() -> None:
    axes = torch.eye(8, dtype=torch.float64)
    one = (3 * axes[:, :2], axes[:2])
    two = (5 * axes[:, 2:5], axes[2:5])
    torch.testing.assert_close(product(tsv([one, two], [1.0, 2.0], 5)), product(one) + 2 * product(two))


def test_one_adapter_is_truncated() -> None:
    pair = pairs([5])[0]
    u, s, vh = torch.linalg.svd(product(pair), full_matrices=False)
    torch.testing.assert_close(product(tsv([pair], [2.0], 3)), 2 * (u[:, :3] * s[:3]) @ vh[:3])
    torch.testing.assert_close(product(tsv([pair], [1.0], 5)), product(pair))


def test_equal_adapters_give_one_of_them() -> None:
    pair = pairs([3])[0]
    torch.testing.assert_close(product(tsv([pair] * 4, [1.0] * 4, 12)), product(pair))
    torch.testing.assert_close(product(tsv([pair] * 2, [1.0, 2.0], 6)), 1.5 * product(pair))


def test_order_and_scale() -> None:
    given, weights = pairs([4, 4, 4]), [1.0, 0.5, 2.0]
    one = product(tsv(given, weights, 6))
    torch.testing.assert_close(product(tsv(given[::-1], weights[::-1], 6)), one)
    torch.testing.assert_close(product(tsv([(4 * b, a) for b, a in given], weights, 6)), 4 * one)


def test_adapters_of_weight_0_and_zero_deltas_take_no_room() -> None:
    one, two = pairs([4, 4])
    zero = (torch.zeros_like(two[0]), two[1])
    alone = product(tsv([one], [1.0], 4))
    torch.testing.assert_close(product(tsv([one, two], [1.0, 0.0], 4)), alone)
    torch.testing.assert_close(product(tsv([zero, one], [1.0, 1.0], 4)), alone)
    assert not product(tsv([zero, zero], [1.0, 1.0], 4)).any()


@pytest.mark.parametrize("shape", [(9, 4), (4, 4), (4, 9)])
def test_nearest_orthonormal_is_u_times_vh(shape: tuple[int, int]) -> None:
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(nearest_orthonormal(matrix), u @ vh)


def test_shares() -> None:
    assert share([9, 9, 9], 8) == [3, 3, 2]
    assert share([1, 0, 9], 8) == [1, 0, 7]
    assert share([1, 2], 8) == [1, 2]
    assert share([3, 3], 0) == [0, 0]


def test_it_is_declared() -> None:
    assert find("tsv")[0].sums
