"""DELLA against the paper's rules, computed entry by entry."""

from __future__ import annotations

import pytest
import torch
from merge_samples import HEIGHTS, draws, stack, tensors

from adapterops.errors import UsageError
from adapterops.merging.methods.della import della, della_linear, keep_probabilities
from adapterops.merging.registry import Space, find


def pruned(value: torch.Tensor, k: int, density: float, epsilon: float, seed: int = 0) -> torch.Tensor:
    """MagPrune with Python's own sort: ranks inside each row, p = density ± epsilon, kept values over p."""
    rows, columns = value.shape
    numbers = draws(k + 1, seed)[k].uniform(0, rows * columns).reshape(rows, columns)
    out = torch.zeros_like(value)
    for i, row in enumerate(value.tolist()):
        order = sorted(range(columns), key=lambda j: (abs(row[j]), j))
        for rank, j in enumerate(order):
            chance = density - epsilon + 2 * epsilon * rank / (columns - 1) if density < 1 else 1.0
            if numbers[i, j] < chance:
                out[i, j] = row[j] / chance
    return out


def elected(values: list[torch.Tensor], weights: list[float], by_count: bool = False) -> torch.Tensor:
    """Per entry: the sign of the weighted sum (or count), then the mean of those that have it."""
    out = torch.zeros_like(values[0])
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            entries = [weight * float(value[i, j]) for value, weight in zip(values, weights, strict=True)]
            votes = [(x > 0) - (x < 0) for x in entries] if by_count else entries
            positive = sum(votes) >= 0
            agreeing = [x for x in entries if x and (x > 0) == positive]
            out[i, j] = sum(agreeing) / max(1, len(agreeing))
    return out


@pytest.mark.parametrize("rows", HEIGHTS)
@pytest.mark.parametrize(("density", "epsilon"), [(0.5, 0.1), (0.3, 0.25), (0.9, 0.1), (0.5, 0.0), (1.0, 0.3)])
def test_della_linear_is_the_weighted_sum_of_what_magprune_keeps(density: float, epsilon: float, rows: int) -> None:
    values, weights = tensors(3), [1.0, -0.5, 2.0]
    wanted = sum(w * pruned(v, k, density, epsilon) for k, (v, w) in enumerate(zip(values, weights, strict=True)))
    torch.testing.assert_close(della_linear(stack(values, weights, rows), density=density, epsilon=epsilon), wanted)


@pytest.mark.parametrize("rows", HEIGHTS)
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_della_elects_signs_among_what_magprune_keeps(majority: str, rows: int) -> None:
    values, weights = tensors(3), [1.0, -0.5, 2.0]
    kept = [pruned(value, k, 0.6, 0.2) for k, value in enumerate(values)]
    found = della(
        stack(values, weights, rows), density=0.6, epsilon=0.2, majority_sign=majority, sign_election="weighted"
    )
    torch.testing.assert_close(found, elected(kept, weights, majority == "frequency"))


def test_the_result_does_not_depend_on_the_blocks() -> None:
    values = tensors(3, 33, 40)
    found = [
        della(stack(values, None, rows), density=0.4, epsilon=0.1, majority_sign="total", sign_election="peft")
        for rows in (0, 1, 7, 32)
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_equal_magnitudes_rank_by_their_column() -> None:
    value = torch.tensor([[1.0, -1.0, 1.0, -1.0, 0.0, 0.0]]).repeat(40, 1)
    found = della_linear(stack([value]), density=0.5, epsilon=0.4)
    torch.testing.assert_close(found, pruned(value, 0, 0.5, 0.4))


def test_the_expected_value_is_kept_and_large_entries_are_spared() -> None:
    value = torch.arange(1.0, 41.0).repeat(4000, 1)
    found = della_linear(stack([value]), density=0.5, epsilon=0.3)
    torch.testing.assert_close(found.mean(dim=0), value[0], rtol=0.12, atol=0.0)
    kept = (found != 0).float().mean(dim=0)
    torch.testing.assert_close(kept, torch.linspace(0.2, 0.8, 40), rtol=0.0, atol=0.04)
    assert abs(float(kept.mean()) - 0.5) < 0.01


def test_the_seed_decides_and_nothing_else() -> None:
    values = tensors(1)
    one, same, other = (della_linear(stack(values, seed=seed), density=0.5, epsilon=0.1) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_scaling_all_deltas_scales_the_result() -> None:
    values = tensors(3)
    one = della(stack(values), density=0.5, epsilon=0.1, majority_sign="total", sign_election="peft")
    four = della(stack([4 * v for v in values]), density=0.5, epsilon=0.1, majority_sign="total", sign_election="peft")
    torch.testing.assert_close(four, 4 * one)


def test_a_density_of_1_keeps_everything_whatever_epsilon_is() -> None:
    values = tensors(2)
    torch.testing.assert_close(della_linear(stack(values), density=1.0, epsilon=0.5), values[0] + values[1])


def test_one_column_and_zeros() -> None:
    assert keep_probabilities(0.3, 0.1, 1).tolist() == pytest.approx([0.3])
    column = della_linear(stack([torch.ones(2000, 1)]), density=0.25, epsilon=0.1)
    assert set(column.flatten().tolist()) == {0.0, 4.0}
    assert not della_linear(stack([torch.zeros(4, 6)]), density=0.5, epsilon=0.1).any()


@pytest.mark.parametrize(("density", "epsilon", "limit"), [(0.1, 0.1, "below 0.1"), (0.95, 0.1, "at most 0.05")])
def test_probabilities_outside_0_to_1_are_refused(density: float, epsilon: float, limit: str) -> None:
    with pytest.raises(UsageError, match=f"--epsilon may be {limit}"):
        della_linear(stack(tensors(1)), density=density, epsilon=epsilon)


def test_they_are_declared() -> None:
    method, space = find("della")
    assert space is Space.DELTA
    assert method.settle({"density": 0.5}) == {
        "density": 0.5,
        "epsilon": 0.1,
        "majority_sign": "total",
        "sign_election": "auto",
    }
    assert find("della_linear")[0].sums
