"""PEANuT against peft's layer, and its activations against transformers'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import lazy
from odd_layers import base_of, factors_agree, made, outputs_agree, tuned
from peft import PeanutConfig
from torch import nn
from transformers.activations import ACT2CLS, ACT2FN

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.peanut import Peanut, activations

PEANUT = Peanut()


def peanut(**fields: Any) -> tuple[Update, Any]:
    config = PeanutConfig(**{"r": 4, "scaling": 1.5, **fields})
    model = tuned(nn.Linear(20, 12), config, "peanut_")
    return made("peanut", model, "peanut_", act_fn=config.act_fn, scaling=config.scaling), model


@pytest.mark.parametrize("act", ["relu", "gelu_new", "silu", "tanh"])
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_change_is_pefts(depth: int, act: str) -> None:
    one, model = peanut(depth=depth, act_fn=act)
    own = base_of(model)
    outputs_agree(one, model, own)
    factors_agree(one, own)
    assert PEANUT.depth(one) == depth
    change = PEANUT.change(one, own).weight
    assert change is not None
    assert int(torch.linalg.matrix_rank(change, rtol=1e-5)) <= PEANUT.rank(one) == 4
    model.base_model.model.layer.merge()
    torch.testing.assert_close(change.double(), base_of(model).weight - own.weight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", sorted(ACT2CLS))
def test_activations_are_those_of_transformers(name: str) -> None:
    x = torch.linspace(-12, 12, 401).double()
    found = activations().get(name)
    if name == "xielu":  # its parameters are learned
        assert found is None
        return
    assert found is not None
    with torch.no_grad():
        torch.testing.assert_close(found(x), ACT2FN[name].double()(x), rtol=1e-6, atol=1e-6)


def test_what_is_missing_is_named() -> None:
    one, model = peanut()
    own = base_of(model)
    with pytest.raises(CannotRepresent, match="--base-weights"):
        PEANUT.delta(one)
    with pytest.raises(CannotRepresent, match="--base-weights"):
        PEANUT.change(one)
    for name in ("act_fn", "scaling"):
        with pytest.raises(CannotRepresent, match=f"--set {name}"):
            PEANUT.change(replace(one, options={k: v for k, v in one.options.items() if k != name}), own)
    with pytest.raises(CannotRepresent, match="'xielu' is not computed"):
        PEANUT.change(replace(one, options={**one.options, "act_fn": "xielu"}), own)
    with pytest.raises(BrokenAdapter, match="another model's"):
        PEANUT.change(one, Own(torch.zeros(13, 20)))
    assert [PEANUT.fits(one, s) for s in ((12, 20), (12, 7), (20, 12), (12,))] == [True, True, False, False]
    assert not PEANUT.is_nothing(one)
    assert PEANUT.is_nothing(replace(one, tensors={**one.tensors, "B": lazy(torch.zeros(12, 4))}))


def test_shapes_that_cannot_be() -> None:
    one, _ = peanut(depth=2)
    for change, said in (
        ({"A": None}, "counterpart A is missing"),
        ({"B": torch.ones(12, 5)}, "PEANuT's are"),
        ({"decoders.0": torch.ones(4, 5)}, r"it must be \[4, 4\]"),
        ({"decoders.1": None}, "come in pairs"),
        ({"encoders.0": None}, "come in pairs"),
    ):
        tensors = dict(one.tensors) | {role: t if t is None else lazy(t, role) for role, t in change.items()}
        with pytest.raises(BrokenAdapter, match=said):
            PEANUT.check(replace(one, tensors={role: t for role, t in tensors.items() if t is not None}))
