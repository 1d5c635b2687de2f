"""(IA)³ against lycoris-lora and peft."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lycoris.modules.ia3 import IA3Module
from method_updates import lazy, randomise, update
from peft import IA3Config
from peft.tuners.ia3.layer import Conv2d, Linear
from torch import nn

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.ia3 import Ia3

IA3 = Ia3()
BASES: dict[str, Any] = {"linear": lambda: nn.Linear(20, 12), "conv": lambda: nn.Conv2d(20, 12, 3)}


def ia3(vector: torch.Tensor, on_input: bool = False, initial: int = 0) -> Update:
    return update("ia3", {"vector": vector}, options={"on_input": on_input, "initial": initial})


def merged(one: Update, weight: torch.Tensor) -> torch.Tensor:
    """The weight with the update, by the docstring's formula."""
    m = one.tensors["vector"].torch().reshape(-1) + 1 - one.options["initial"]
    axis = 1 if one.options["on_input"] else 0
    out: torch.Tensor = weight * m.reshape([-1 if at == axis else 1 for at in range(weight.dim())])
    return out


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("kind", BASES)
def test_the_multiplier_is_lycoris_own(kind: str, on_input: bool) -> None:
    base = BASES[kind]().double()
    module = IA3Module("x", base, train_on_input=on_input)
    randomise(module)
    state = module.state_dict()
    assert set(state) == {"weight", "on_input"}
    assert bool(state["on_input"]) is on_input
    one = ia3(state["weight"], on_input)
    IA3.check(one)
    assert IA3.fits(one, tuple(base.weight.shape))
    wanted, bias = module.get_merged_weight()
    assert bias is None
    torch.testing.assert_close(merged(one, base.weight), wanted)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize(("kind", "layer"), [("linear", Linear), ("conv", Conv2d)])
def test_the_multiplier_is_pefts(kind: str, layer: Any, on_input: bool) -> None:
    base = BASES[kind]().double()
    before = base.weight.detach().clone()
    tuned = layer(base, "default", config=IA3Config(), is_feedforward=on_input)
    randomise(tuned.ia3_l)
    one = ia3(tuned.ia3_l["default"], on_input, initial=1)
    IA3.check(one)
    assert IA3.fits(one, tuple(before.shape))
    tuned.merge()
    torch.testing.assert_close(merged(one, before), base.weight.detach())


def test_the_delta_needs_the_base() -> None:
    with pytest.raises(CannotRepresent, match=r"mid.to_q.*base weight"):
        IA3.delta(ia3(torch.ones(4)))


@pytest.mark.parametrize("initial", [0, 1])
@pytest.mark.parametrize("size", [1e-1, 1e-6, 1e-12])
def test_the_error_is_that_of_the_effect(initial: int, size: float) -> None:
    v = torch.full((8,), 0.5).double()
    off = v + size * 0.5 * torch.tensor([1.0, -1.0]).double().repeat(4)
    one, other = ia3(v + initial, initial=initial), ia3((off + initial).reshape(1, 8, 1, 1), initial=initial)
    assert IA3.error(one, one) == 0.0
    assert IA3.error(one, other) == pytest.approx(size, rel=1e-3)


def test_vectors_of_both_beginnings_are_the_same_effect() -> None:
    v = torch.tensor([0.25, -0.5, 0.0])
    assert IA3.error(ia3(v), ia3(v + 1, initial=1)) == 0.0
    assert IA3.error(ia3(v), ia3(v, initial=1)) > 1
    assert IA3.error(ia3(v), ia3(v, on_input=True)) == float("inf")
    assert IA3.error(ia3(v), ia3(v[:2])) == float("inf")


@pytest.mark.parametrize("shape", [(12,), (12, 1), (1, 12, 1, 1)])
def test_rows_of_outputs(shape: tuple[int, ...]) -> None:
    one = ia3(torch.arange(12.0).reshape(shape), initial=1)
    part = replace(one, tensors=IA3.take_rows(one, [(9, 12), (2, 4)]))
    IA3.check(part)
    taken = part.tensors["vector"]
    assert taken.torch().reshape(-1).tolist() == [9, 10, 11, 2, 3]
    assert taken.shape == tuple(5 if n == 12 else n for n in shape)
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    whole = merged(one, weight)
    torch.testing.assert_close(
        merged(part, torch.cat([weight[9:12], weight[2:4]])), torch.cat([whole[9:12], whole[2:4]])
    )


def test_rows_on_the_input_keep_the_whole_vector() -> None:
    one = ia3(torch.randn(20), on_input=True)
    assert IA3.take_rows(one, [(0, 4)]) == dict(one.tensors)


def test_nothing_is_a_factor_of_one() -> None:
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert [IA3.is_nothing(ia3(v, initial=i)) for v in (zeros, ones) for i in (0, 1)] == [True, False, False, True]


def test_tensors_that_are_no_vector() -> None:
    for broken in (torch.ones(3, 4), torch.ones(0)):
        with pytest.raises(BrokenAdapter, match="no vector"):
            IA3.check(ia3(broken))
    IA3.check(ia3(torch.ones(1)))
    with pytest.raises(BrokenAdapter, match="vector is missing"):
        IA3.check(replace(ia3(torch.ones(3)), tensors={"other": lazy(torch.ones(3))}))


def test_what_it_fits() -> None:
    shapes = [(12, 20), (12, 20, 3, 3), (20, 12), (12,), ()]
    assert [IA3.fits(ia3(torch.ones(12)), s) for s in shapes] == [True, True, False, True, False]
    assert [IA3.fits(ia3(torch.ones(20), on_input=True), s) for s in shapes] == [True, True, False, False, False]
