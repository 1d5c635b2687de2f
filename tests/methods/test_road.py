"""RoAd against peft."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import update
from peft import RoadConfig
from torch import nn
from turned_layers import outputs_agree, own_of, update_of, wrapped

from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.road import VARIANTS, Road

ROAD = Road()


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [2, 4, 12])
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_are_pefts(variant: str, size: int, bias: bool, told: bool) -> None:
    base = nn.Linear(7, 12, bias=bias)
    model = wrapped(base, RoadConfig(variant=variant, group_size=size), spread=0.7)
    options = {"variant": variant} if told else {"shape": (12, 7)}
    one = update_of(model, "road", "road_", group_size=size, **options)
    outputs_agree(ROAD, one, base, model)


def test_the_group_size_changes_the_outputs_and_is_asked_for() -> None:
    base = nn.Linear(7, 12)
    model = wrapped(base, RoadConfig(group_size=4))
    one = update_of(model, "road", "road_")
    with pytest.raises(CannotRepresent, match=r"(?s)group_size.*mid.to_q.*--set group_size"):
        ROAD.change(one, own_of(base))
    changes = [ROAD.change(replace(one, options={"group_size": n}), own_of(base)).weight for n in (4, 12)]
    assert changes[0] is not None
    assert changes[1] is not None
    assert float((changes[0] - changes[1]).norm()) > 0.1 * float(changes[0].norm())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 5}, "even"),
        ({"group_size": 0}, "above zero"),
        ({"group_size": "some"}, "above zero"),
        ({"variant": "road_3"}, "none of road_1"),
    ],
)
def test_settings_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    one = update("road", {"theta": torch.ones(12), "alphas": torch.ones(12)}, options=options)
    with pytest.raises(CannotRepresent, match=message):
        ROAD.check(one)


def test_settings_that_the_tensors_contradict() -> None:
    tensors = {"theta": torch.ones(12), "alphas": torch.ones(12)}
    with pytest.raises(BrokenAdapter, match=r"(?s)12 angles of road_2 are 12 outputs.*groups of 8"):
        ROAD.check(update("road", tensors, options={"variant": "road_2", "group_size": 8}))
    ROAD.check(update("road", tensors, options={"variant": "road_1", "group_size": 8}))
    ROAD.check(update("road", tensors, options={"group_size": 8}))
    one = update("road", tensors, options={"variant": "road_1", "group_size": 4})
    with pytest.raises(BrokenAdapter, match="another model"):
        ROAD.change(one, own_of(nn.Linear(5, 12)))
    with pytest.raises(BrokenAdapter, match="another group_size"):
        ROAD.change(update("road", tensors, options={"group_size": 8}), own_of(nn.Linear(5, 12)))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"theta": torch.ones(12), "alphas": torch.ones(11)}, "as many angles"),
        ({"theta": torch.ones(12, 1), "alphas": torch.ones(12, 1)}, "in a row"),
        ({"theta": torch.ones(0), "alphas": torch.ones(0)}, "in a row"),
        ({"theta": torch.ones(12)}, "alphas is missing"),
    ],
)
def test_tensors_that_are_no_road(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(BrokenAdapter, match=message):
        ROAD.check(update("road", tensors))


def test_what_it_fits() -> None:
    one = update("road", {"theta": torch.ones(12), "alphas": torch.ones(12)})
    shapes = [(12, 5), (24, 5), (6, 5), (8, 5), (12,), (12, 5, 1, 1)]
    assert [ROAD.fits(one, shape) for shape in shapes] == [True, True, True, False, False, False]
    second = replace(one, options={"variant": "road_2"})
    assert [ROAD.fits(second, shape) for shape in shapes] == [True, False, False, False, False, False]


def test_nothing() -> None:
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert ROAD.is_nothing(update("road", {"theta": zeros, "alphas": ones}))
    assert not ROAD.is_nothing(update("road", {"theta": ones, "alphas": ones}))
    assert not ROAD.is_nothing(update("road", {"theta": zeros, "alphas": zeros}))


def test_rows_are_mixed() -> None:
    one = update("road", {"theta": torch.ones(12), "alphas": torch.ones(12)})
    with pytest.raises(CannotRepresent, match="fused"):
        ROAD.take_rows(one, [(0, 6)])
    for act in (ROAD.change, ROAD.delta):
        with pytest.raises(CannotRepresent, match="--base-weights"):
            act(one)
