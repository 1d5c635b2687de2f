"""LN tuning against peft's layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import lazy
from odd_layers import made, tuned
from peft import LNTuningConfig
from torch import nn

from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.ln_tuning import LnTuning

LN = LnTuning()
LAYERS: dict[str, Any] = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "Linear": lambda: nn.Linear(8, 8),
}


def ln(layer: nn.Module) -> Any:
    model = tuned(layer, LNTuningConfig(), "ln_tuning_layers")
    base = Own(model.base_model.model.layer.base_layer.weight.detach().clone(), None)
    bias = getattr(model.base_model.model.layer.base_layer, "bias", None)
    state = {k: t for k, t in model.state_dict().items() if "ln_tuning_layers" in k}
    roles = {k.rpartition(".")[2]: t for k, t in state.items()}
    one = made("ln_tuning", model, "ln_tuning_layers.")
    # `made` takes ".weight" from the ends of keys; here it is all that is left of one.
    one = replace(one, tensors={role: lazy(t, f"x.{role}") for role, t in roles.items()})
    LN.check(one)
    return one, model, base._replace(bias=None if bias is None else bias.detach().clone())


@pytest.mark.parametrize("kind", LAYERS)
def test_the_change_is_pefts(kind: str) -> None:
    one, model, own = ln(LAYERS[kind]())
    assert LN.fits(one, tuple(own.weight.shape))
    change = LN.change(one, own)
    assert change.weight is not None
    assert (change.bias is None) == (own.bias is None)
    fresh = LAYERS[kind]().double()
    with torch.no_grad():
        fresh.weight.copy_(own.weight + change.weight)
        if own.bias is not None:
            fresh.bias.copy_(own.bias + change.bias)
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2)).double()
        torch.testing.assert_close(fresh(x), model(x), rtol=1e-5, atol=1e-6)
        assert float((model(x) - model.base_model.model.layer.base_layer(x)).norm()) > 1


def test_what_is_missing_is_named() -> None:
    one, _, own = ln(nn.LayerNorm(8))
    with pytest.raises(CannotRepresent, match="--base-weights"):
        LN.delta(one)
    with pytest.raises(CannotRepresent, match="--base-weights"):
        LN.change(one)
    with pytest.raises(BrokenAdapter, match=r"x.weight.*another model's"):
        LN.change(one, Own(torch.zeros(9), torch.zeros(9)))
    with pytest.raises(BrokenAdapter, match=r"x.bias.*no bias"):
        LN.change(one, own._replace(bias=None))


def test_statistics_are_no_parameters() -> None:
    one, _, own = ln(nn.BatchNorm1d(8))
    assert {"running_mean", "running_var"} < one.tensors.keys()
    with pytest.raises(CannotRepresent, match="running_mean"):
        LN.change(one, own)


def test_rows() -> None:
    one, _, own = ln(nn.LayerNorm(8))
    part = replace(one, tensors=LN.take_rows(one, [(2, 4)]))
    LN.check(part)
    change = LN.change(part, Own(own.weight[2:4], own.bias[2:4]))
    whole = LN.change(one, own)
    assert whole.weight is not None
    torch.testing.assert_close(change.weight, whole.weight[2:4])
    assert not LN.is_nothing(one)


def test_shapes_that_cannot_be() -> None:
    one, *_ = ln(nn.LayerNorm(8))
    for tensors, said in (
        ({}, "without any tensor"),
        ({"weight": torch.ones(0)}, "holds no parameter"),
        ({"weight": torch.ones(8), "bias": torch.ones(9)}, "8 outputs"),
    ):
        with pytest.raises(BrokenAdapter, match=said):
            LN.check(replace(one, tensors={role: lazy(t) for role, t in tensors.items()}))
    assert [LN.fits(one, s) for s in ((8,), (9,), (8, 8))] == [True, False, False]
