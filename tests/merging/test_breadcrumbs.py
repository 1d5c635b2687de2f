"""Model Breadcrumbs against a sort of all entries."""

from __future__ import annotations

import pytest
import torch
from merge_samples import HEIGHTS, stack, tensors

from adapterops.errors import UsageError
from adapterops.merging.methods.breadcrumbs import breadcrumbs, breadcrumbs_ties
from adapterops.merging.registry import find

SHARES = [(0.5, 0.1), (0.9, 0.1), (0.3, 0.0), (0.5, 0.5), (0.6, 0.003), (1.0, 0.0), (0.001, 0.1)]
"""(density, gamma); 0.003 of 240 entries is less than one: mergekit gives zeros there."""


def middle(value: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """Sorted by falling magnitude, then position: the first ⌊γn⌋ go, the next ⌊density·n⌋ stay."""
    flat = value.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))
    first = int(gamma * len(flat))
    kept = order[first : first + int(density * len(flat))]
    out = torch.zeros(len(flat))
    out[kept] = torch.tensor([flat[i] for i in kept])
    return out.reshape(value.shape)


@pytest.mark.parametrize("rows", HEIGHTS)
@pytest.mark.parametrize(("density", "gamma"), SHARES)
def test_breadcrumbs_is_the_weighted_sum_of_the_middles(density: float, gamma: float, rows: int) -> None:
    values, weights = tensors(3), [1.0, -0.5, 2.0]
    found = breadcrumbs(stack(values, weights, rows), density=density, gamma=gamma)
    wanted = sum(w * middle(v, density, gamma) for v, w in zip(values, weights, strict=True))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("density", "gamma"), SHARES)
def test_counts_are_exact_among_equal_magnitudes(density: float, gamma: float) -> None:
    value = torch.tensor([1.0, -1.0, 2.0, 2.0, -2.0, 0.5]).repeat(10, 4)
    found = breadcrumbs(stack([value], rows=3), density=density, gamma=gamma)
    assert torch.equal(found, middle(value, density, gamma))
    assert int((found != 0).sum()) == int(density * value.numel())


def test_outliers_of_less_than_one_entry_are_none() -> None:
    value = tensors(1)[0]
    found = breadcrumbs(stack([value]), density=0.5, gamma=0.001)
    assert int((found != 0).sum()) == value.numel() // 2
    assert float(found.abs().max()) == float(value.abs().max())


@pytest.mark.parametrize("rows", HEIGHTS)
def test_breadcrumbs_ties_takes_the_mean_of_those_that_agree(rows: int) -> None:
    values = tensors(3)
    kept = torch.stack([middle(value, 0.5, 0.1) for value in values])
    positive = kept.sum(dim=0) >= 0
    agrees = torch.where(positive, kept > 0, kept < 0)
    wanted = (kept * agrees).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)
    found = breadcrumbs_ties(
        stack(values, None, rows), density=0.5, gamma=0.1, majority_sign="total", sign_election="peft"
    )
    torch.testing.assert_close(found, wanted)


def test_the_result_does_not_depend_on_the_blocks() -> None:
    values = tensors(3, 33, 40)
    found = [breadcrumbs(stack(values, None, rows), density=0.4, gamma=0.05) for rows in (0, 1, 7, 32)]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_order_and_scale() -> None:
    values, weights = tensors(3), [1.0, 0.5, 2.0]
    one = breadcrumbs(stack(values, weights), density=0.4, gamma=0.05)
    turned = breadcrumbs(stack(values[::-1], weights[::-1]), density=0.4, gamma=0.05)
    torch.testing.assert_close(one, turned)
    torch.testing.assert_close(breadcrumbs(stack([4 * v for v in values], weights), density=0.4, gamma=0.05), 4 * one)


def test_equal_adapters_with_election_are_one_of_them() -> None:
    value = tensors(1)[0]
    found = breadcrumbs_ties(
        stack([value] * 3), density=0.4, gamma=0.05, majority_sign="frequency", sign_election="peft"
    )
    torch.testing.assert_close(found, middle(value, 0.4, 0.05))


def test_shares_of_more_than_all_are_refused() -> None:
    with pytest.raises(UsageError, match=r"--density 0.9 --gamma 0.2: .* --gamma may be at most 0.1"):
        breadcrumbs(stack(tensors(1)), density=0.9, gamma=0.2)


def test_they_are_declared() -> None:
    method, _ = find("breadcrumbs")
    assert method.sums
    assert method.settle({"density": 0.5}) == {"density": 0.5, "gamma": 0.01}
    assert not find("breadcrumbs_ties")[0].sums
