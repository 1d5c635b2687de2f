"""TinyLoRA against peft's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import lazy, relative
from peft import TinyLoraConfig
from shared_models import Saved, made, saved

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.tinylora import Tinylora, drawn, group, indices

TINYLORA = Tinylora()
ORDER = ("words", "tall", "wide", "conv1d", "square")
"""As the model has them; the first is an embedding."""


def adapter(**fields: Any) -> Saved:
    return saved(TinyLoraConfig, **({"r": 3, "u": 5, "target_modules": list(ORDER)} | fields))


def update(one: Saved, name: str, number: int | None = None, **options: Any) -> Update:
    """The update of a module, with the vector of this number."""
    whole = {} if number is None else {f"tinylora_v.{number}": "v"}
    return made("tinylora", name, one.tensors("tinylora_", name, whole), **options)


@pytest.mark.parametrize("tying", [0.0, 0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("keep", [False, True])
def test_the_delta_is_pefts(tying: float, keep: bool) -> None:
    one = adapter(weight_tying=tying, save_projection=keep, projection_seed=9)
    groups = sum("tinylora_v" in key for key in one.state)
    assert groups == max(1, round(5 * (1 - tying)))
    for index, name in enumerate(ORDER):
        facts = {} if keep else {"index": index, "projection_seed": 9}
        change = update(one, name, group(index, 5, groups), **facts)
        assert ("P" in change.tensors) is keep
        TINYLORA.check(change)
        shape = tuple(one.own(name).weight.shape)
        assert TINYLORA.weight_shape(change) == shape
        assert TINYLORA.fits(change, shape)
        assert not TINYLORA.fits(change, (*shape, 1))
        assert TINYLORA.rank(change) == TINYLORA.exact_rank(change) == 3
        assert relative(one.effect(name), TINYLORA.delta(change)) < 1e-5


def test_an_embeddings_factors_are_a_loras() -> None:
    one = adapter()
    plain, known = update(one, "words", 0), update(one, "words", 0, kind="embedding")
    assert TINYLORA.weight_shape(known) == (12, 20)
    assert TINYLORA.fits(known, (20, 12))
    b, a = TINYLORA.low_rank(known) or (torch.empty(0), torch.empty(0))
    assert (b.shape, a.shape) == ((12, 3), (3, 20))
    assert relative(one.effect("words"), (b @ a).T) < 1e-5
    assert torch.equal(TINYLORA.delta(plain), TINYLORA.delta(known))


@pytest.mark.parametrize("rank", [3, 10, 40])
def test_the_seed_draws_what_peft_draws(rank: int) -> None:
    one = adapter(r=rank)
    for index, name in enumerate(ORDER):
        kept = one.state[f"base_model.model.{name}.tinylora_P"]
        assert kept.shape[1] == min(rank, *one.own(name).weight.shape)
        assert torch.equal(kept, drawn(42 + index, 5, kept.shape[1]))


@pytest.mark.parametrize("rank", [3, 10])
def test_saved_projections_give_the_order_back(rank: int) -> None:
    one = adapter(r=rank, projection_seed=9)
    projections = {name: lazy(one.state[f"base_model.model.{name}.tinylora_P"]) for name in sorted(ORDER)}
    assert indices(projections, 9) == {name: index for index, name in enumerate(ORDER)}
    assert indices(projections, 10) is None
    assert indices({**projections, "wide": lazy(torch.ones(5, 2, 2))}, 9) is None


def test_facts_that_no_tensor_holds() -> None:
    one = adapter(save_projection=False)
    with pytest.raises(CannotRepresent, match=r"order of the base's modules.*--base"):
        TINYLORA.delta(update(one, "tall"))
    with pytest.raises(CannotRepresent, match="--set projection_seed=VALUE"):
        TINYLORA.delta(update(one, "tall", 1, index=1))
    with pytest.raises(CannotRepresent, match=r"projections were not saved.*--base"):
        TINYLORA.delta(update(one, "tall", 1, projection_seed=42))
    assert TINYLORA.norm(update(one, "tall")) is None
    assert TINYLORA.error(update(one, "tall"), update(one, "tall")) == 0.0


def test_narrow_numbers_and_nothing() -> None:
    change = update(adapter(), "wide", 2)
    narrow = replace(change, tensors={role: lazy(t.torch().half()) for role, t in change.tensors.items()})
    assert 1e-6 < TINYLORA.error(change, narrow) < 2e-3
    assert not TINYLORA.is_nothing(change)
    assert TINYLORA.is_nothing(replace(change, tensors={**change.tensors, "v": lazy(torch.zeros(5))}))
    assert not TINYLORA.is_nothing(update(adapter(), "wide"))


@pytest.mark.parametrize(
    ("role", "shape", "message"),
    [
        ("A", (3, 32, 1), "2 axes"),
        ("B", (8, 4), "rank 4, but 'A'"),
        ("v", (5, 1), "vector of numbers"),
        ("v", (4,), "5 matrices, but 'v' weighs 4"),
        ("P", (5, 3), r"matrices \(3, 3\) stand between"),
        ("P", (5, 3, 4), r"matrices \(3, 3\) stand between"),
    ],
)
def test_shapes_that_do_not_belong_together(role: str, shape: tuple[int, ...], message: str) -> None:
    change = update(adapter(), "wide", 2)
    with pytest.raises(BrokenAdapter, match=message):
        TINYLORA.check(replace(change, tensors={**change.tensors, role: lazy(torch.ones(shape), role)}))


@pytest.mark.parametrize("role", ["A", "B"])
def test_half_an_update(role: str) -> None:
    change = update(adapter(), "wide", 2)
    with pytest.raises(BrokenAdapter, match=f"counterpart {role} is missing"):
        TINYLORA.check(replace(change, tensors={k: t for k, t in change.tensors.items() if k != role}))
