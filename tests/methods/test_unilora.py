"""Uni-LoRA against peft's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import lazy, relative
from peft import UniLoraConfig
from shared_models import Model, Saved, made, saved

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.unilora import Unilora, drawn, layout

UNILORA = Unilora()
ORDER = ("tall", "wide", "conv1d", "square")
"""As the model has them."""
PARAMETERS = 3 * (24 + 12 + 8 + 32 + 20 + 16 + 16 + 16)


def adapter(**fields: Any) -> Saved:
    return saved(UniLoraConfig, **({"r": 3, "target_modules": list(ORDER), "theta_d_length": 50} | fields))


def update(one: Saved, name: str, **options: Any) -> Update:
    return made("unilora", name, one.tensors("unilora_", name, {"unilora_theta_d": "theta_d"}), **options)


def facts(one: Saved, name: str, **fields: Any) -> dict[str, Any]:
    shapes = [tuple(one.own(other).weight.shape) for other in ORDER]
    starts, total = layout(shapes, 3)
    at = ORDER.index(name)
    return {"r": 3, "proj_seed": 42, "shape": shapes[at], "offset": starts[at], "total": total} | fields


def test_the_order_is_the_models() -> None:
    named = [name for name, _ in Model().named_modules()]
    assert [name for name in named if name in ORDER] == list(ORDER)
    assert layout([(24, 12), (8, 32), (20, 16), (16, 16)], 3) == ([0, 108, 228, 336], PARAMETERS)


@pytest.mark.parametrize("name", ORDER)
def test_saved_indices_give_the_delta(name: str) -> None:
    one = adapter(save_indices=True)
    change = update(one, name)
    assert change.tensors.keys() == {"theta_d", "indices_A", "indices_B", "scales_A", "scales_B"}
    UNILORA.check(change)
    shape = tuple(one.own(name).weight.shape)
    assert UNILORA.weight_shape(change) == shape
    assert UNILORA.fits(change, shape)
    assert not UNILORA.fits(change, (shape[0] + 1, shape[1]))
    assert UNILORA.rank(change) == UNILORA.exact_rank(change) == 3
    assert relative(one.effect(name), UNILORA.delta(change)) < 1e-5


@pytest.mark.parametrize("seed", [42, 7])
@pytest.mark.parametrize("length", [50, PARAMETERS, PARAMETERS + 1, 1])
def test_the_seed_draws_what_peft_draws(length: int, seed: int) -> None:
    one = adapter(theta_d_length=length, proj_seed=seed)
    assert list(one.state) == ["base_model.unilora_theta_d"]
    kept = adapter(theta_d_length=length, proj_seed=seed, save_indices=True)
    for name in ORDER:
        change = update(one, name, **facts(one, name, proj_seed=seed))
        UNILORA.check(change)
        assert UNILORA.rank(change) == 3
        assert relative(one.effect(name), UNILORA.delta(change)) < 1e-5
        assert UNILORA.error(update(kept, name), change) < 1e-6
    indices, _ = drawn(seed, length, PARAMETERS)
    every = [kept.state[f"base_model.model.{name}.unilora_indices_{f}"].reshape(-1) for name in ORDER for f in "AB"]
    assert torch.equal(torch.cat(every), torch.from_numpy(indices))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("r", "--set r=VALUE"),
        ("proj_seed", "--set proj_seed=VALUE"),
        ("shape", "--base"),
        ("offset", "all modules before it"),
        ("total", "all modules before it"),
    ],
)
def test_facts_that_no_tensor_holds(missing: str, message: str) -> None:
    one = adapter()
    change = update(one, "wide", **{k: v for k, v in facts(one, "wide").items() if k != missing})
    with pytest.raises(CannotRepresent, match=message):
        UNILORA.delta(change)
    assert UNILORA.norm(change) is None
    assert UNILORA.error(change, change) == 0.0


def test_a_vector_without_modules() -> None:
    change = update(adapter(), "")
    UNILORA.check(change)
    with pytest.raises(CannotRepresent, match=r"only theta_d was saved.*--base"):
        UNILORA.delta(change)


def test_a_base_with_other_modules() -> None:
    one = adapter()
    with pytest.raises(CannotRepresent, match=r"end after the 300.*other modules"):
        UNILORA.delta(update(one, "square", **facts(one, "square", total=300)))


def test_narrow_numbers_and_nothing() -> None:
    change = update(adapter(save_indices=True), "tall")
    narrow = {role: lazy(t.torch().bfloat16()) if t.dtype == "F32" else t for role, t in change.tensors.items()}
    assert 1e-4 < UNILORA.error(change, replace(change, tensors=narrow)) < 2e-2
    assert not UNILORA.is_nothing(change)
    assert UNILORA.is_nothing(replace(change, tensors={**change.tensors, "theta_d": lazy(torch.zeros(50))}))


@pytest.mark.parametrize(
    ("role", "tensor", "message"),
    [
        ("theta_d", torch.ones(5, 2), "vector of numbers"),
        ("indices_A", torch.ones(3, 12), "positions are integers"),
        ("indices_A", torch.ones(12, dtype=torch.int64), "2 axes"),
        ("scales_B", torch.ones(3, 24), "every index has a scale"),
        ("indices_A", torch.full((3, 12), 50), "outside of the 50 numbers"),
        ("indices_A", torch.full((3, 12), -1), "outside of the 50 numbers"),
    ],
)
def test_tensors_that_do_not_belong_together(role: str, tensor: torch.Tensor, message: str) -> None:
    change = update(adapter(save_indices=True), "tall")
    broken = replace(change, tensors={**change.tensors, role: lazy(tensor, role)})
    with pytest.raises(BrokenAdapter, match=message):
        [UNILORA.check(broken), UNILORA.delta(broken)]


def test_half_an_update() -> None:
    change = update(adapter(save_indices=True), "tall")
    for role in change.tensors:
        with pytest.raises(BrokenAdapter, match=f"counterpart {role} is missing"):
            UNILORA.check(replace(change, tensors={k: t for k, t in change.tensors.items() if k != role}))
    lower = {role: lazy(change.tensors[role].torch()[:2]) for role in ("indices_A", "scales_A")}
    with pytest.raises(BrokenAdapter, match="not halves of one update"):
        UNILORA.check(replace(change, tensors={**change.tensors, **lower}))
