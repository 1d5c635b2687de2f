"""DEFT and PaRa against peft's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import lazy
from odd_layers import base_of, factors_agree, made, outputs_agree, tuned
from peft import DeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.deft import Deft

DEFT = Deft()
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(20, 12),
    "no bias": lambda: nn.Linear(20, 12, bias=False),
    "Conv1D": lambda: Conv1D(12, 20),
}


def deft(layer: str = "linear", **fields: Any) -> tuple[Update, Any]:
    config = DeftConfig(**{"r": 4, **fields})
    model = tuned(LAYERS[layer](), config, "deft_")
    options = {"decomposition_method": config.decomposition_method, "alpha": config.alpha}
    return replace(made("deft", model, "deft_"), options=options), model


@pytest.mark.parametrize("fields", [{}, {"alpha": 6}, {"para": True}, {"r": 99}], ids=str)
@pytest.mark.parametrize("method", ["relu", "qr"])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_change_is_pefts(layer: str, method: str, fields: dict[str, Any]) -> None:
    one, model = deft(layer, decomposition_method=method, **fields)
    assert ("R" in one.tensors) is not fields.get("para", False)
    own = base_of(model)
    outputs_agree(one, model, own)
    factors_agree(one, own)
    change = DEFT.change(one, own).weight
    assert change is not None
    assert int(torch.linalg.matrix_rank(change, rtol=1e-5)) <= DEFT.rank(one) == min(fields.get("r", 4), 12)
    model.base_model.model.layer.merge()
    torch.testing.assert_close(change.double(), base_of(model).weight - own.weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_types(dtype: torch.dtype) -> None:
    one, model = deft()
    own = base_of(model)
    narrow = replace(one, tensors={role: lazy(t.torch().to(dtype)) for role, t in one.tensors.items()})
    wide = replace(one, tensors={role: lazy(t.torch().double()) for role, t in narrow.tensors.items()})
    torch.testing.assert_close(DEFT.change(narrow, own).weight, DEFT.change(wide, own).weight)


def test_what_is_missing_is_named() -> None:
    one, model = deft()
    own = base_of(model)
    with pytest.raises(CannotRepresent, match=r"mid.to_q.*base weight"):
        DEFT.delta(one)
    with pytest.raises(CannotRepresent, match="--base-weights"):
        DEFT.change(one)
    with pytest.raises(CannotRepresent, match="--set decomposition_method"):
        DEFT.change(replace(one, options={}), own)
    with pytest.raises(CannotRepresent, match="'svd' is none of DEFT's"):
        DEFT.change(replace(one, options={"decomposition_method": "svd"}), own)
    with pytest.raises(BrokenAdapter, match=r"x.P.*another model's"):
        DEFT.change(one, Own(torch.zeros(13, 20)))


def test_shapes_that_cannot_be() -> None:
    one, _ = deft()
    p, r = torch.ones(12, 4), torch.ones(4, 20)
    for tensors, said in (
        ({"R": r}, "counterpart P is missing"),
        ({"P": torch.ones(12), "R": r}, "no factor"),
        ({"P": torch.ones(4, 12), "R": torch.ones(12, 20)}, "transposed"),
        ({"P": p, "R": torch.ones(5, 20)}, "not halves"),
    ):
        with pytest.raises(BrokenAdapter, match=said):
            DEFT.check(replace(one, tensors={role: lazy(t, role) for role, t in tensors.items()}))
    assert [DEFT.fits(one, s) for s in ((12, 20), (20, 12), (12, 20, 1, 1), (12,))] == [True, False, False, False]
