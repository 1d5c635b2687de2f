"""VB-LoRA against peft's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import lazy, relative
from peft import VBLoRAConfig
from shared_models import LINEAR, Saved, made, saved

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.vblora import Vblora

VBLORA = Vblora()


def adapter(topk: int = 2, few: bool = False, **fields: Any) -> Saved:
    sizes = {"r": 3, "num_vectors": 10, "vector_length": 4, "target_modules": list(LINEAR)}
    return saved(VBLoRAConfig, topk=topk, save_only_topk_weights=few, **(sizes | fields))


def update(one: Saved, name: str, **options: Any) -> Update:
    return made("vblora", name, one.tensors("vblora_", name, {"vblora_vector_bank": "bank"}), **options)


@pytest.mark.parametrize("topk", [1, 2, 5, 10])
@pytest.mark.parametrize("name", LINEAR)
def test_logits_give_the_delta(name: str, topk: int) -> None:
    one = adapter(topk)
    change = update(one, name, topk=topk)
    VBLORA.check(change)
    shape = tuple(one.own(name).weight.shape)
    assert VBLORA.weight_shape(change) == shape
    assert VBLORA.fits(change, shape)
    assert not VBLORA.fits(change, (shape[0] + 4, shape[1]))
    assert VBLORA.rank(change) == VBLORA.exact_rank(change) == 3
    assert relative(one.effect(name), VBLORA.delta(change)) < 1e-5


@pytest.mark.parametrize("topk", [1, 2, 5])
@pytest.mark.parametrize("name", LINEAR)
def test_weights_of_the_topk_give_the_delta(name: str, topk: int) -> None:
    one = adapter(topk, few=True)
    change = update(one, name)
    assert set(change.tensors) == {
        "bank",
        *(f"logits_{f}_topk_{kind}" for f in "AB" for kind in ("indices", "weights")),
    }
    VBLORA.check(change)
    assert VBLORA.weight_shape(change) == tuple(one.own(name).weight.shape)
    assert VBLORA.topk(change) == topk
    assert relative(one.effect(name), VBLORA.delta(change)) < 1e-5
    assert VBLORA.error(update(adapter(topk), name, topk=topk), change) < 1e-6


def test_topk_is_in_no_tensor() -> None:
    change = update(adapter(), "tall")
    with pytest.raises(CannotRepresent, match="--set topk=VALUE"):
        VBLORA.delta(change)
    assert VBLORA.norm(change) is None
    assert VBLORA.error(change, change) == 0.0
    with pytest.raises(BrokenAdapter, match="10 vectors, of which topk=11"):
        VBLORA.check(replace(change, options={"topk": 11}))


def test_many_vectors_have_wider_indices() -> None:
    one = adapter(3, few=True, num_vectors=300)
    change = update(one, "tall")
    assert change.tensors["logits_A_topk_indices"].dtype == "I16"
    assert relative(one.effect("tall"), VBLORA.delta(change)) < 1e-5


def test_a_last_weight_below_zero_is_none() -> None:
    change = update(adapter(2, few=True), "tall")
    weights = {role: lazy(torch.ones(t.shape) * 1.000001) for role, t in change.tensors.items() if "weights" in role}
    exact = {role: lazy(torch.ones(t.shape)) for role, t in weights.items()}
    over, sharp = (replace(change, tensors={**change.tensors, **values}) for values in (weights, exact))
    assert VBLORA.error(sharp, over) < 1e-12


def test_narrow_numbers_and_nothing() -> None:
    change = update(adapter(few=True), "square")
    kinds = {role: t.torch() for role, t in change.tensors.items()}
    narrow = {role: lazy(t.bfloat16() if t.is_floating_point() else t) for role, t in kinds.items()}
    assert 1e-5 < VBLORA.error(change, replace(change, tensors=narrow)) < 2e-2
    assert not VBLORA.is_nothing(change)
    assert VBLORA.is_nothing(replace(change, tensors={**change.tensors, "bank": lazy(torch.zeros(10, 4))}))


@pytest.mark.parametrize(
    ("role", "tensor", "message"),
    [
        ("bank", torch.ones(10), "2 axes"),
        ("logits_A", torch.ones(3, 4), "3 axes"),
        ("logits_A", torch.ones(3, 4, 9), "9 vectors, but the bank"),
        ("logits_B", torch.ones(4, 2, 10), "rank 2, but 'logits_A' has rank 3"),
    ],
)
def test_shapes_that_do_not_belong_together(role: str, tensor: torch.Tensor, message: str) -> None:
    change = update(adapter(), "square")
    with pytest.raises(BrokenAdapter, match=message):
        VBLORA.check(replace(change, tensors={**change.tensors, role: lazy(tensor, role)}))


@pytest.mark.parametrize(
    ("role", "tensor", "message"),
    [
        ("indices", torch.ones(3, 4, 2), "positions are integers"),
        ("indices", torch.ones(3, 4, dtype=torch.int64), "3 axes"),
        ("weights", torch.ones(3, 4, 2), "one weight less"),
        ("indices", torch.full((3, 4, 2), 10), "outside of the 10 vectors"),
        ("indices", torch.full((3, 4, 2), -1), "outside of the 10 vectors"),
    ],
)
def test_topk_tensors_that_do_not_belong_together(role: str, tensor: torch.Tensor, message: str) -> None:
    change = update(adapter(few=True), "square")
    broken = replace(change, tensors={**change.tensors, f"logits_A_topk_{role}": lazy(tensor, role)})
    with pytest.raises(BrokenAdapter, match=message):
        [VBLORA.check(broken), VBLORA.delta(broken)]


@pytest.mark.parametrize("few", [False, True])
def test_half_an_update(few: bool) -> None:
    change = update(adapter(few=few), "square")
    for role in change.tensors:
        with pytest.raises(BrokenAdapter, match=f"counterpart {role} is missing"):
            VBLORA.check(replace(change, tensors={k: t for k, t in change.tensors.items() if k != role}))
