"""What (IA)³ changes in a base's weight and bias, against peft's and LyCORIS' layers."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from lycoris.modules.ia3 import IA3Module
from method_updates import update
from peft import IA3Config
from torch import nn
from transformers.pytorch_utils import Conv1D
from turned_layers import changed, inputs_of, outputs_agree, own_of, randomise, update_of, wrapped

from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.ia3 import Ia3

IA3 = Ia3()
BASES: dict[str, Any] = {
    "linear": lambda: nn.Linear(10, 6),
    "square": lambda: nn.Linear(6, 6),
    "no bias": lambda: nn.Linear(10, 6, bias=False),
    "conv2": lambda: nn.Conv2d(10, 6, 3, padding=1),
    "conv3": lambda: nn.Conv3d(4, 6, 3, padding=1),
    "groups": lambda: nn.Conv2d(10, 6, 3, groups=2),
    "transposed": lambda: Conv1D(6, 10),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_outputs_are_pefts(kind: str, on_input: bool) -> None:
    base = BASES[kind]()
    if base.bias is not None:
        randomise(base, "bias", 1.0)
    config = IA3Config(feedforward_modules=["0"] if on_input else [], fan_in_fan_out=kind == "transposed")
    model = wrapped(base, config)
    one = update_of(model, "ia3", "ia3_", on_input=on_input, initial=1)
    one = update("ia3", {"vector": one.tensors["l"].torch()}, options=one.options)
    outputs_agree(IA3, one, base, model)
    assert (IA3.change(one, own_of(base)).bias is None) is (on_input or base.bias is None)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv2", "conv3"])
def test_outputs_are_those_of_lycoris(kind: str, on_input: bool) -> None:
    """Which multiplies the weight alone, so that a bias stays as it is."""
    base = BASES[kind]()
    module = IA3Module("x", deepcopy(base), train_on_input=on_input)
    randomise(module, "weight")
    one = update("ia3", {"vector": module.weight}, options={"on_input": on_input, "initial": 0})
    change = IA3.change(one, own_of(base))
    assert change.bias is None
    module.apply_to()
    inputs = inputs_of(base)
    with torch.no_grad():
        torch.testing.assert_close(changed(base, change)(inputs), module(inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("on_input", [False, True])
def test_both_spellings_change_the_weight_alike(on_input: bool) -> None:
    base = nn.Linear(10, 6)
    vector = torch.randn(10 if on_input else 6, generator=torch.Generator().manual_seed(0))
    zero, one = (
        IA3.change(update("ia3", {"vector": vector + n}, options={"on_input": on_input, "initial": n}), own_of(base))
        for n in (0, 1)
    )
    assert zero.weight is not None
    assert one.weight is not None
    torch.testing.assert_close(zero.weight, one.weight)


def test_vectors_of_norms() -> None:
    norm = nn.LayerNorm(6)
    randomise(norm, "weight")
    one = update("ia3", {"vector": torch.full((6,), 1.5)}, options={"on_input": False, "initial": 1})
    change = IA3.change(one, own_of(norm))
    torch.testing.assert_close(change.weight, norm.weight.detach() / 2)
    torch.testing.assert_close(change.bias, norm.bias.detach() / 2)


def test_the_base_is_needed_and_must_be_the_right_one() -> None:
    one = update("ia3", {"vector": torch.ones(6)}, options={"on_input": False, "initial": 1})
    with pytest.raises(CannotRepresent, match=r"(?s)mid.to_q.*--base-weights"):
        IA3.change(one)
    with pytest.raises(BrokenAdapter, match="another model"):
        IA3.change(one, own_of(nn.Linear(6, 7)))


def test_groups_are_told_from_linear_modules() -> None:
    one = update("ia3", {"vector": torch.ones(1, 10, 1, 1)}, options={"on_input": True, "initial": 1})
    shapes = [(6, 10, 3, 3), (6, 5, 3, 3), (7, 5, 3, 3), (6, 5), (6, 3, 3, 3), (6, 10)]
    assert [IA3.fits(one, shape) for shape in shapes] == [True, True, False, False, False, True]
