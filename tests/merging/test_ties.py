"""TIES, DARE and magnitude pruning against peft's functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from merge_samples import HEIGHTS, draws, stack, tensors
from peft.utils import merge_utils

from adapterops.errors import UsageError
from adapterops.merging.methods.pruning import dare_linear, magnitude_prune
from adapterops.merging.methods.ties import dare_ties, elect_and_merge, ties
from adapterops.merging.registry import Space, find

WEIGHTS = [[1.0, 1.0, 1.0], [0.5, 2.0, 0.25], [1.0, -0.7, 0.4], [-1.0, -1.0, 0.0]]
DENSITIES = [0.07, 0.5, 0.9]
PEFT: dict[str, Callable[..., torch.Tensor]] = {"ties": merge_utils.ties, "dare_ties": merge_utils.dare_ties}
OURS: dict[str, Callable[..., torch.Tensor]] = {"ties": ties, "dare_ties": dare_ties}


@pytest.fixture(autouse=True)
def same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft's random pruning with the stack's masks, tensor after tensor."""
    calls = [0]

    def pruned(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
        draw = draws(calls[0] + 1)[calls[0]]
        calls[0] += 1
        kept = torch.from_numpy(draw.keep(0, tensor.numel(), density)).reshape(tensor.shape)
        return tensor * kept / density if rescale else tensor * kept

    monkeypatch.setattr(merge_utils, "random_pruning", pruned)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("rows", HEIGHTS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("name", OURS)
def test_sign_elections_are_pefts(name: str, majority: str, density: float, weights: list[float], rows: int) -> None:
    values = tensors(3)
    wanted = PEFT[name](values, torch.tensor(weights), density, majority)
    found = OURS[name](stack(values, weights, rows), density=density, majority_sign=majority, sign_election="peft")
    close(found, wanted)
    assert found.count_nonzero() == wanted.count_nonzero()


@pytest.mark.parametrize("rows", HEIGHTS)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", DENSITIES)
def test_sums_are_pefts(density: float, weights: list[float], rows: int) -> None:
    values, given = tensors(3), torch.tensor(weights)
    close(dare_linear(stack(values, weights, rows), density=density), merge_utils.dare_linear(values, given, density))
    close(
        magnitude_prune(stack(values, weights, rows), density=density),
        merge_utils.magnitude_prune(values, given, density),
    )


@pytest.mark.parametrize("count", [1, 2, 4, 5])
@pytest.mark.parametrize("majority", ["total", "frequency"])
def test_any_number_of_tensors(count: int, majority: str) -> None:
    values, weights = tensors(count, seed=3), [0.3 * (k + 1) for k in range(count)]
    wanted = merge_utils.ties(values, torch.tensor(weights), 0.4, majority)
    close(ties(stack(values, weights), density=0.4, majority_sign=majority, sign_election="peft"), wanted)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("name", OURS)
def test_weighted_elections_are_pefts_of_the_weighted_tensors(name: str, majority: str) -> None:
    values, weights = tensors(3), [1.0, -0.7, 0.4]
    scaled = [value * weight for value, weight in zip(values, weights, strict=True)]
    wanted = PEFT[name](scaled, torch.ones(3), 0.5, majority)
    found = OURS[name](stack(values, weights), density=0.5, majority_sign=majority, sign_election="weighted")
    close(found, wanted)


def test_a_negative_weight_counts_in_a_weighted_election() -> None:
    # The conflict that an election before the weights leaves: 1 - 2 and -1 against 2.
    values, weights = [torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 2.0]])], [1.0, -1.0]
    for election, wanted in (("peft", [[-0.5, -2.0]]), ("weighted", [[-2.0, -1.5]])):
        found = ties(stack(values, weights), density=1.0, majority_sign="total", sign_election=election)
        assert found.tolist() == wanted


def test_the_sign_of_a_sum_of_zero_is_positive() -> None:
    values = [torch.tensor([[2.0, -3.0, 0.0, -0.0]]), torch.tensor([[-2.0, 3.0, -0.0, -0.0]])]
    for majority in ("total", "frequency"):
        found = ties(stack(values), density=1.0, majority_sign=majority, sign_election="peft")
        assert found.tolist() == [[2.0, 3.0, 0.0, 0.0]]


def test_majorities_by_sum_and_by_number_differ() -> None:
    values = [torch.tensor([[5.0]]), torch.tensor([[-1.0]]), torch.tensor([[-2.0]])]
    merged = {
        majority: ties(stack(values), density=1.0, majority_sign=majority, sign_election="peft").item()
        for majority in ("total", "frequency")
    }
    assert merged == {"total": 5.0, "frequency": -1.5}


@pytest.mark.parametrize("density", [0.03, 0.37, 0.5])
def test_exactly_so_many_are_kept_where_magnitudes_tie(density: float) -> None:
    value = torch.randint(1, 4, (30, 40), generator=torch.Generator().manual_seed(0)).float()
    value *= torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    keep = int(density * value.numel())
    for rows in HEIGHTS:
        one = magnitude_prune(stack([value], rows=rows), density=density)
        assert int(one.count_nonzero()) == keep
        assert torch.equal(one, ties(stack([value], rows=rows), **options(density)))
        assert torch.equal(one.abs().flatten().sort().values[-keep:], value.abs().flatten().sort().values[-keep:])
        assert torch.equal(one[one != 0], value[one != 0])


def options(density: float) -> dict[str, Any]:
    return {"density": density, "majority_sign": "total", "sign_election": "peft"}


def test_everything_is_kept_at_density_one() -> None:
    values, weights = tensors(3), [1.0, -0.5, 2.0]
    total: torch.Tensor = sum((v * w for v, w in zip(values, weights, strict=True)), torch.zeros(()))
    close(dare_linear(stack(values, weights), density=1.0), total)
    close(magnitude_prune(stack(values, weights), density=1.0), total)
    assert torch.equal(ties(stack(values, weights), **options(1.0)), dare_ties(stack(values, weights), **options(1.0)))


def test_a_density_that_leaves_nothing() -> None:
    values = tensors(2, 3, 3)
    assert not ties(stack(values), **options(0.1)).any()
    assert not magnitude_prune(stack(values), density=0.1).any()


def test_dare_keeps_the_mean() -> None:
    value = torch.ones(400, 500)
    found = dare_linear(stack([value]), density=0.25)
    assert set(found.unique().tolist()) == {0.0, 4.0}
    assert abs(float(found.mean()) - 1) < 5 * (3 / value.numel()) ** 0.5
    other = dare_linear(stack([value], seed=1), density=0.25)
    assert not torch.equal(found, other)


@pytest.mark.parametrize("method", [ties, dare_ties])
def test_the_result_does_not_depend_on_the_blocks(method: Callable[..., torch.Tensor]) -> None:
    values, weights = tensors(3, 31, 17), [1.0, -0.5, 2.0]
    results = [method(stack(values, weights, rows), **options(0.4)) for rows in (0, 1, 4, 30, 31, 99)]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_inputs_are_left_as_they_are() -> None:
    values = tensors(3)
    before = [value.clone() for value in values]
    for method in (ties, dare_ties):
        method(stack(values), **options(0.4))
    for method in (magnitude_prune, dare_linear):
        method(stack(values), density=0.4)
    assert all(torch.equal(value, old) for value, old in zip(values, before, strict=True))


def test_the_merge_goes_where_it_is_told_to() -> None:
    values = tensors(2, 4, 6)
    room = torch.full((6, 6), torch.nan)
    elect_and_merge([value.clone() for value in values], [1.0, 1.0], room[1:5], "total", "peft")
    assert room[[0, 5]].isnan().all()
    with pytest.warns(UserWarning, match="no pruning"):
        wanted = merge_utils.ties(values, torch.ones(2), 1.0, "total")
    close(room[1:5], wanted)


@pytest.mark.parametrize("name", ["ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_pefts_names_are_known(name: str) -> None:
    method, space = find(name)
    assert (method.name, space) == (name, Space.FACTORS)
    assert find(f"{name}_svd") == (method, Space.DELTA)
    assert find(name, "delta") == (method, Space.DELTA)
    assert method.sums == (name in ("dare_linear", "magnitude_prune"))
    with pytest.raises(UsageError, match="needs --density"):
        method.settle({})


@pytest.mark.parametrize("density", [0.0, 1.5, "much"])
def test_densities_out_of_range_are_refused(density: Any) -> None:
    names: Sequence[str] = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
    for name in names:
        with pytest.raises(UsageError, match="--density"):
            find(name)[0].settle({"density": density})
