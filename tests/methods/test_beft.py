"""BEFT against peft's layer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from method_updates import lazy
from odd_layers import base_of, made, outputs_agree, tuned
from peft import BeftConfig
from torch import nn

from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.beft import Beft

BEFT = Beft()


@pytest.mark.parametrize("biased", [True, False])
def test_the_change_is_pefts(biased: bool) -> None:
    model = tuned(nn.Linear(20, 12, bias=biased), BeftConfig(), "beft_")
    one, own = made("beft", model, "beft_"), base_of(model)
    assert one.tensors["bias"].shape == (1, 12)
    change = BEFT.change(one, own)
    assert change.weight is None
    outputs_agree(one, model, own)
    torch.testing.assert_close(BEFT.change(one).bias, change.bias)
    layer = model.base_model.model.layer
    if biased:
        layer.merge()
        torch.testing.assert_close(change.bias, (base_of(model).bias - own.bias).float())
    else:  # the forward adds it all the same, as above
        with pytest.raises(ValueError, match="no bias"):
            layer.merge()
    with pytest.raises(CannotRepresent, match="only its bias changes"):
        BEFT.delta(one)
    with pytest.raises(BrokenAdapter, match=r"x.bias.*another model's"):
        BEFT.change(one, Own(torch.zeros(13, 20)))


def test_rows() -> None:
    one = made("beft", tuned(nn.Linear(20, 12), BeftConfig(), "beft_"), "beft_")
    part = replace(one, tensors=BEFT.take_rows(one, [(9, 12), (2, 4)]))
    BEFT.check(part)
    assert part.tensors["bias"].shape == (1, 5)
    torch.testing.assert_close(BEFT.bias_delta(part), BEFT.bias_delta(one)[[9, 10, 11, 2, 3]])
    assert not BEFT.is_nothing(one)
    assert BEFT.is_nothing(replace(one, tensors={"bias": lazy(torch.zeros(1, 12))}))
    assert [BEFT.fits(one, s) for s in ((12, 20), (20, 12), (12, 3, 3, 3), ())] == [True, False, True, False]


def test_shapes_that_cannot_be() -> None:
    one = made("beft", tuned(nn.Linear(20, 12), BeftConfig(), "beft_"), "beft_")
    for tensors, said in (
        ({"weight": torch.ones(3)}, "counterpart bias is missing"),
        ({"bias": torch.ones(2, 12)}, "no bias"),
        ({"bias": torch.ones(0)}, "no bias"),
    ):
        with pytest.raises(BrokenAdapter, match=said):
            BEFT.check(replace(one, tensors={role: lazy(t) for role, t in tensors.items()}))
