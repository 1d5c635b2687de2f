"""RandLoRA against peft's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import lazy, relative
from peft import RandLoraConfig
from shared_models import LINEAR, Saved, made, saved

from adapterops.adapter import Certainty, Fact, Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.randlora import RandLora

RANDLORA = RandLora()
KINDS: dict[str, dict[str, Any]] = {"dense": {}, "sparse": {"sparse": True}, "very sparse": {"very_sparse": True}}


def adapter(r: int = 3, **fields: Any) -> Saved:
    return saved(RandLoraConfig, r=r, randlora_alpha=7, target_modules=list(LINEAR), **fields)


def update(one: Saved, name: str, **options: Any) -> Update:
    """The update of a module; a model without projections of its own has none in its modules either."""
    options = {"shape": tuple(one.own(name).weight.shape)} | options
    change = made("randlora", name, one.tensors("randlora_", name, {}), **options)
    return replace(change, alpha=Fact(7.0, Certainty.READ))


@pytest.mark.parametrize("r", [1, 3, 8, 40])
@pytest.mark.parametrize("name", LINEAR)
def test_saved_projections_give_the_delta(name: str, r: int) -> None:
    one = adapter(r)
    change = update(one, name)
    RANDLORA.check(change)
    assert RANDLORA.fits(change, change.options["shape"])
    assert RANDLORA.rank(change) == r
    assert RANDLORA.scale(change) == 7 / r
    assert RANDLORA.low_rank(change) is None
    delta = RANDLORA.delta(change)
    assert relative(one.effect(name), delta) < 1e-5
    assert RANDLORA.norm(change) == pytest.approx(float(delta.norm()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 17])
def test_the_seed_draws_what_peft_draws(kind: str, seed: int) -> None:
    fields = {"projection_prng_key": seed, **KINDS[kind]}
    one, kept = adapter(save_projection=False, **fields), adapter(**fields)
    assert not [key for key in one.state if "randlora_A" in key]
    for name in LINEAR:
        change = update(one, name, projection=(24, 32), **fields)
        RANDLORA.check(change)
        assert relative(one.effect(name), RANDLORA.delta(change)) < 1e-5
        for key, values in zip("AB", RANDLORA.projections(change), strict=True):
            assert torch.equal(kept.state[f"base_model.randlora_{key}"].double(), torch.from_numpy(values))
            assert torch.equal(kept.state[f"base_model.model.{name}.randlora_{key}"].double(), torch.from_numpy(values))


def test_facts_that_no_tensor_holds() -> None:
    one = adapter(save_projection=False)
    change = update(one, "tall", projection=(24, 32))
    with pytest.raises(CannotRepresent, match="--set projection_prng_key=VALUE"):
        RANDLORA.delta(change)
    with pytest.raises(CannotRepresent, match=r"largest module.*--base"):
        RANDLORA.delta(update(one, "tall", projection_prng_key=0))
    with pytest.raises(CannotRepresent, match="--alpha"):
        RANDLORA.delta(replace(update(adapter(), "tall"), alpha=None))
    assert RANDLORA.norm(change) is None
    assert RANDLORA.error(change, change) == 0.0
    twice = replace(change, tensors={**change.tensors, "gamma": lazy(2 * change.tensors["gamma"].torch())})
    assert RANDLORA.error(change, twice) == pytest.approx(1.0)


def test_the_scale_folds_into_lambda() -> None:
    change = update(adapter(), "wide")
    folded = replace(change, tensors=RANDLORA.folded(change, "F32"), alpha=Fact(3.0, Certainty.DERIVED))
    assert RANDLORA.scale(folded) == 1.0
    assert RANDLORA.error(change, folded) < 1e-6
    assert RANDLORA.error(change, replace(change, alpha=Fact(14.0, Certainty.READ))) == pytest.approx(1.0)


def test_narrow_numbers_and_nothing() -> None:
    change = update(adapter(), "conv1d")
    narrow = replace(change, tensors={role: lazy(t.torch().bfloat16()) for role, t in change.tensors.items()})
    assert RANDLORA.delta(narrow).dtype is torch.float32
    assert 1e-4 < RANDLORA.error(change, narrow) < 1e-2
    assert not RANDLORA.is_nothing(change)
    assert RANDLORA.is_nothing(replace(change, tensors={**change.tensors, "lambda": lazy(torch.zeros(3, 6))}))


@pytest.mark.parametrize(
    ("role", "shape", "message"),
    [
        ("lambda", (3, 6, 1), "2 axes"),
        ("lambda", (3, 5), "rank 3 and 5 bases.*16 channels has 6"),
        ("gamma", (6, 19), "19 channels has 7"),
        ("A", (3, 24), "3 axes"),
        ("A", (4, 1, 24), "rank 4, but 'lambda'"),
        ("A", (3, 1, 15), "too small"),
        ("B", (32, 8, 2), "rank 2, but 'lambda'"),
        ("B", (32, 5, 3), "too small"),
    ],
)
def test_shapes_that_do_not_belong_together(role: str, shape: tuple[int, ...], message: str) -> None:
    change = update(adapter(), "conv1d")
    with pytest.raises(BrokenAdapter, match=message):
        RANDLORA.check(replace(change, tensors={**change.tensors, role: lazy(torch.ones(shape), role)}))


def test_half_an_update_and_another_base() -> None:
    change = update(adapter(), "conv1d")
    for role in ("lambda", "gamma", "A", "B"):
        with pytest.raises(BrokenAdapter, match=f"counterpart {role} is missing"):
            RANDLORA.check(replace(change, tensors={k: t for k, t in change.tensors.items() if k != role}))
    shapes = [(20, 16), (16, 20), (16, 16), (15, 16), (16, 33), (16, 16, 1)]
    assert [RANDLORA.fits(change, shape) for shape in shapes] == [True, True, True, False, False, False]
    with pytest.raises(BrokenAdapter, match="another base"):
        RANDLORA.delta(replace(change, options={"shape": (20, 17)}))
