"""SCE against its three steps on whole float64 tensors."""

from __future__ import annotations

import pytest
import torch
from merge_samples import HEIGHTS, stack, tensors

from adapterops.merging.methods.sce import sce
from adapterops.merging.registry import find
from adapterops.merging.stack import TensorStack


def reference(values: list[torch.Tensor], weights: list[float], density: float) -> torch.Tensor:
    """Select by numpy-style variance, calculate energies, erase by sign: one entry after the other."""
    deltas = torch.stack([w * v.double() for v, w in zip(values, weights, strict=True)])
    if density < 1:
        variance = deltas.var(dim=0, unbiased=False).flatten()
        chosen = variance.argsort(descending=True, stable=True)[: int(density * variance.numel())]
        mask = torch.zeros_like(variance)
        mask[chosen] = 1
        deltas = deltas * mask.reshape(deltas.shape[1:])
    energy = deltas.square().sum(dim=(1, 2))
    eta = (energy / energy.sum()).tolist()
    out = torch.zeros_like(deltas[0])
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            entries = deltas[:, i, j].tolist()
            positive = sum(entries) >= 0
            agreeing = [(x, e) for x, e in zip(entries, eta, strict=True) if x and (x > 0) == positive]
            if agreeing:
                out[i, j] = sum(x * e for x, e in agreeing) / sum(e for _, e in agreeing)
    return out.float()


@pytest.mark.parametrize("rows", HEIGHTS)
@pytest.mark.parametrize("density", [0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, -0.5, 3.0]])
def test_it_selects_calculates_and_erases(weights: list[float], density: float, rows: int) -> None:
    values = [v * scale for v, scale in zip(tensors(3), (1, 2, 0.5), strict=True)]
    torch.testing.assert_close(sce(stack(values, weights, rows), density=density), reference(values, weights, density))


def test_a_hand_computed_case() -> None:
    # Variances 4, 1, 0.25: the first two are selected.  Energies 9 + 4 and 1 + 16.
    one, two = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[-1.0, 4.0, 2.0]])
    found = sce(stack([one, two]), density=0.7)
    torch.testing.assert_close(found, torch.tensor([[3.0, (2 * 13 + 4 * 17) / 30, 0.0]]))


def test_the_result_does_not_depend_on_the_blocks() -> None:
    values = tensors(3, 33, 40)
    found = [sce(stack(values, [1, 2, 0.3], rows), density=0.4) for rows in (0, 1, 7, 32)]
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_where_nothing_differs_everything_is_kept(density: float) -> None:
    value = tensors(1)[0] / 3
    torch.testing.assert_close(sce(stack([value]), density=density), value)
    torch.testing.assert_close(sce(stack([value] * 3), density=density), value)
    torch.testing.assert_close(sce(stack([value], [0.25]), density=density), value / 4)


def test_entries_that_do_not_differ_are_not_selected() -> None:
    one, two = torch.ones(2, 4), torch.ones(2, 4)
    two[0, 1] = 3
    found = sce(stack([one, two]), density=0.75)
    assert found.nonzero().tolist() == [[0, 1]]


def test_an_adapter_that_leaves_the_module_as_it_is_counts_as_zeros() -> None:
    values = tensors(2)
    zeros = [torch.zeros_like(v) for v in values]
    absent = TensorStack(values, [1.0, 0.5], [], absent=2)
    torch.testing.assert_close(sce(absent, density=0.3), sce(stack([*values, *zeros], [1.0, 0.5, 1, 1]), density=0.3))


def test_order_and_scale() -> None:
    values = tensors(3)
    one = sce(stack(values), density=0.4)
    torch.testing.assert_close(sce(stack(values[::-1]), density=0.4), one)
    torch.testing.assert_close(sce(stack([4 * v for v in values]), density=0.4), 4 * one)
    torch.testing.assert_close(sce(stack(values, [0.5] * 3), density=0.4), one / 2)


def test_the_sign_of_a_zero_sum_is_plus() -> None:
    value = torch.tensor([[1.0, -2.0]])
    torch.testing.assert_close(sce(stack([value, -value]), density=1.0), torch.tensor([[1.0, 2.0]]))


def test_zeros_stay_zeros() -> None:
    zeros, value = torch.zeros(4, 6), tensors(1, 4, 6)[0]
    assert not sce(stack([zeros, zeros]), density=0.5).any()
    assert not sce(stack([value, value], [0.0, 0.0]), density=1.0).any()
    torch.testing.assert_close(sce(stack([value, zeros]), density=1.0), value)
    assert not sce(stack([value, -value]), density=0.01).any()


def test_it_is_declared() -> None:
    assert [p.name for p in find("sce")[0].parameters] == ["density"]
