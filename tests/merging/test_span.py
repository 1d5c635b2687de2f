"""slerp, karcher and model_stock against the same on flattened dense deltas."""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, pi, sin
from typing import Any

import pytest
import torch
from merge_samples import tensors

from adapterops.errors import AdapterOpsError, UsageError
from adapterops.merging.methods.span import karcher, model_stock, slerp
from adapterops.merging.registry import find

METHODS: dict[str, Any] = {"slerp": slerp, "karcher": karcher, "model_stock": model_stock}


def vectors(*norms: float, seed: int = 0, common: float = 0.5) -> list[torch.Tensor]:
    """Dense deltas with acute angles, of these norms."""
    noise = [t.double().flatten() for t in tensors(len(norms) + 1, 5, 6, seed)]
    out = [common * noise[-1] + value for value in noise[:-1]]
    return [norm * value / value.norm() for norm, value in zip(norms, out, strict=True)]


def merged(method: str, values: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    stacked = torch.stack(list(values)).double()
    coefficients = METHODS[method](stacked @ stacked.T, weights)
    assert len(coefficients) == len(values)
    return torch.tensor(list(coefficients), dtype=torch.float64) @ stacked


def logarithm(here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """The tangent vector at one point of the sphere that leads to the other."""
    angle = acos(max(-1.0, min(1.0, float(here @ there))))
    return (there - (here @ there) * here) * (angle / sin(angle) if angle > 1e-9 else 1.0)


@pytest.mark.parametrize("t", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_slerp_goes_along_the_arc(t: float) -> None:
    one, two = vectors(1.0, 3.0)
    found = merged("slerp", [one, two], [2 * (1 - t), 2 * t])
    assert float(found.norm()) == pytest.approx((1 - t) * 1.0 + t * 3.0)
    angle = acos(float(one @ two) / 3)
    assert acos(min(1.0, float(found @ one) / float(found.norm()))) == pytest.approx(t * angle, abs=1e-7)
    in_plane = torch.linalg.lstsq(torch.stack([one, two], dim=1), found[:, None]).residuals
    assert float(in_plane.sum()) < 1e-20


def test_slerp_of_equal_norms_is_the_usual_formula() -> None:
    one, two = vectors(2.0, 2.0)
    angle = acos(float(one @ two) / 4)
    wanted = (sin(0.7 * angle) * one + sin(0.3 * angle) * two) / sin(angle)
    torch.testing.assert_close(merged("slerp", [one, two], [0.7, 0.3]), wanted)


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.7], [5.0, 1.0]])
def test_karcher_of_two_is_slerp(weights: list[float]) -> None:
    values = vectors(1.0, 3.0)
    torch.testing.assert_close(
        merged("karcher", values, weights), merged("slerp", values, weights), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [0.1, 2.0, 1.0, 0.5]])
@pytest.mark.parametrize("common", [0.0, 0.5, 3.0])
def test_karcher_is_where_the_tangents_cancel(common: float, weights: list[float]) -> None:
    values = vectors(1.0, 3.0, 0.5, 2.0, common=common)
    found = merged("karcher", values, weights)
    total = sum(weights)
    assert float(found.norm()) == pytest.approx(
        sum(w * float(v.norm()) for w, v in zip(weights, values, strict=True)) / total
    )
    here = found / found.norm()
    pull = torch.stack([w * logarithm(here, v / v.norm()) for w, v in zip(weights, values, strict=True)]).sum(dim=0)
    assert float(pull.norm()) < 1e-7 * total


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_model_stock_is_the_multiple_of_the_mean_that_is_nearest_to_the_centre(count: int, spread: float) -> None:
    # The paper's picture: a centre, and equal noise in directions orthogonal to it and to each other.
    axes = torch.eye(count + 1, dtype=torch.float64)
    values = [axes[0] + spread * axes[k + 1] for k in range(count)]
    mean = torch.stack(values).mean(dim=0)
    wanted = mean * (mean @ axes[0]) / (mean @ mean)
    torch.testing.assert_close(merged("model_stock", values, [1.0] * count), wanted)


def test_model_stock_takes_the_mean_cosine_of_all_pairs() -> None:
    values, weights = vectors(1.0, 3.0, 0.5), [1.0, 2.0, 1.0]
    cosines = [float(a @ b / a.norm() / b.norm()) for i, a in enumerate(values) for b in values[:i]]
    cosine = sum(cosines) / 3
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / 4
    torch.testing.assert_close(merged("model_stock", values, weights), 3 * cosine / (1 + 2 * cosine) * mean)


@pytest.mark.parametrize("method", METHODS)
def test_parallel_deltas_give_their_mean(method: str) -> None:
    one = vectors(1.0)[0]
    torch.testing.assert_close(merged(method, [one, 3 * one], [1.0, 1.0]), 2 * one)
    torch.testing.assert_close(merged(method, [one, one], [0.2, 0.7]), one)


@pytest.mark.parametrize("method", METHODS)
def test_almost_parallel_deltas_are_no_trouble(method: str) -> None:
    one, two = vectors(1.0, 1.0)
    for distance in (1e-3, 1e-6, 1e-8, 1e-12):
        near = one + distance * two
        torch.testing.assert_close(merged(method, [one, near], [1.0, 1.0]), one, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", ["karcher", "model_stock"])
def test_equal_and_single_adapters_are_kept(method: str) -> None:
    one = vectors(1.7)[0]
    torch.testing.assert_close(merged(method, [one], [0.3]), one)
    torch.testing.assert_close(merged(method, [one] * 4, [1.0, 2.0, 3.0, 4.0]), one)


@pytest.mark.parametrize("method", METHODS)
def test_order_scale_and_units_of_the_weights(method: str) -> None:
    values, weights = vectors(1.0, 2.0), [0.4, 1.0]
    one = merged(method, values, weights)
    torch.testing.assert_close(merged(method, values[::-1], weights[::-1]), one)
    torch.testing.assert_close(merged(method, [4 * v for v in values], weights), 4 * one)
    torch.testing.assert_close(merged(method, values, [10 * w for w in weights]), one)


@pytest.mark.parametrize("method", METHODS)
def test_zero_deltas(method: str) -> None:
    one, two = vectors(2.0, 1.0)
    zero = torch.zeros_like(one)
    torch.testing.assert_close(merged(method, [one, zero], [3.0, 1.0]), one)
    torch.testing.assert_close(merged(method, [one], [0.5]), one)
    torch.testing.assert_close(
        merged(method, [zero, one, two], [9.0, 3.0, 1.0]), merged(method, [one, two], [3.0, 1.0])
    )
    assert not merged(method, [zero, zero], [1.0, 1.0]).any()


@pytest.mark.parametrize("method", ["karcher", "model_stock"])
def test_an_adapter_of_weight_0_might_as_well_not_be_there(method: str) -> None:
    values = vectors(1.0, 2.0, 3.0)
    torch.testing.assert_close(
        merged(method, values, [1.0, 0.0, 2.0]), merged(method, [values[0], values[2]], [1.0, 2.0])
    )


def test_model_stock_keeps_nothing_of_deltas_that_disagree() -> None:
    one, two = vectors(1.0, 1.0)
    assert not merged("model_stock", [one, -one], [1.0, 1.0]).any()
    assert not merged("model_stock", [one, two, -one - two], [1.0, 1.0, 1.0]).any()


@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_obtuse_angles(method: str) -> None:
    one, two = vectors(1.0, 1.0)
    obtuse = two - 1.5 * (one @ two) * one - 2 * one
    obtuse = obtuse / obtuse.norm()
    assert acos(float(one @ obtuse)) > 0.75 * pi
    found = merged(method, [one, obtuse], [1.0, 1.0])
    assert float(found.norm()) == pytest.approx(1.0)
    assert float(found @ one) == pytest.approx(float(found @ obtuse))


@pytest.mark.parametrize("method", ["slerp", "karcher"])
def test_opposite_deltas_are_refused(method: str) -> None:
    one = vectors(1.0)[0]
    with pytest.raises(AdapterOpsError, match=f"{method}: the deltas point in opposite directions.*--method svd"):
        merged(method, [one, -2 * one], [1.0, 1.0])


def test_opposite_deltas_of_which_one_has_no_weight() -> None:
    one = vectors(1.0)[0]
    for method in ("slerp", "karcher"):
        torch.testing.assert_close(merged(method, [one, -one], [1.0, 0.0]), one)


def test_directions_without_a_mean_are_refused() -> None:
    angles = torch.tensor([0.0, 2 * pi / 3, 4 * pi / 3], dtype=torch.float64)
    around = list(torch.stack([angles.cos(), angles.sin()], dim=1))
    with pytest.raises(AdapterOpsError, match="opposite"):
        merged("karcher", around, [1.0, 1.0, 1.0])


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_say_nothing_are_refused(method: str) -> None:
    values = vectors(1.0, 2.0)
    with pytest.raises(UsageError, match=f"{method}: all weights are 0"):
        merged(method, values, [0.0, 0.0])
    with pytest.raises(UsageError, match=f"{method}: weight -1 is negative"):
        merged(method, values, [1.0, -1.0])


def test_slerp_is_between_two() -> None:
    with pytest.raises(UsageError, match="more than two deltas here; karcher"):
        merged("slerp", vectors(1.0, 2.0, 3.0), [1.0, 1.0, 1.0])


def test_they_are_declared() -> None:
    assert find("slerp")[0].adapters == 2
    assert not any(find(method)[0].sums for method in METHODS)
