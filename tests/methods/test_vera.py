"""VeRA and PVeRA against peft's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import lazy, relative
from peft import PveraConfig, VeraConfig
from shared_models import LINEAR, Saved, made, saved

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods import METHODS
from adapterops.methods.shared import largest

CONFIGS: dict[str, Any] = {"vera": VeraConfig, "pvera": PveraConfig}


def adapter(method: str, **fields: Any) -> Saved:
    return saved(CONFIGS[method], r=4, target_modules=list(LINEAR), **fields)


def update(one: Saved, method: str, name: str, projections: bool = True, **options: Any) -> Update:
    whole = {f"{method}_A": "A", f"{method}_B": "B"} if projections else {}
    options = {"shape": tuple(one.own(name).weight.shape)} | options
    return made(method, name, one.tensors(f"{method}_", name, whole), **options)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", LINEAR)
def test_saved_projections_give_the_delta(method: str, name: str) -> None:
    one = adapter(method)
    change = update(one, method, name)
    METHODS[method].check(change)
    assert METHODS[method].fits(change, change.options["shape"])
    assert METHODS[method].rank(change) == METHODS[method].exact_rank(change) == 4
    assert relative(one.effect(name), METHODS[method].delta(change)) < 1e-5


@pytest.mark.parametrize("seed", [0, 17])
@pytest.mark.parametrize("method", CONFIGS)
def test_the_seed_draws_what_peft_draws(method: str, seed: int) -> None:
    one = adapter(method, projection_prng_key=seed, save_projection=False)
    assert not [key for key in one.state if key.startswith(f"base_model.{method}_")]
    size = largest([tuple(one.own(name).weight.shape) for name in LINEAR])
    assert size == (24, 32)
    kept = adapter(method, projection_prng_key=seed)
    for name in LINEAR:
        change = update(one, method, name, projections=False, projection=size, projection_prng_key=seed)
        METHODS[method].check(change)
        assert relative(one.effect(name), METHODS[method].delta(change)) < 1e-5
        a, b = METHODS[method].projections(change)  # type: ignore[attr-defined]
        assert torch.equal(kept.state[f"base_model.{method}_A"].double(), torch.from_numpy(a))
        assert torch.equal(kept.state[f"base_model.{method}_B"].double(), torch.from_numpy(b))
        assert METHODS[method].error(update(kept, method, name), change) < 1e-12


def test_facts_that_no_tensor_holds() -> None:
    one = adapter("vera", save_projection=False)
    vera = METHODS["vera"]
    change = update(one, "vera", "tall", projections=False, projection=(24, 32))
    with pytest.raises(CannotRepresent, match="--set projection_prng_key=VALUE"):
        vera.delta(change)
    with pytest.raises(CannotRepresent, match=r"largest module.*--base"):
        vera.delta(replace(change, options={"shape": (24, 12), "projection_prng_key": 0}))
    with pytest.raises(CannotRepresent, match="--base-weights"):
        vera.delta(replace(change, options={"projection": (24, 32), "projection_prng_key": 0}))
    assert vera.norm(change) is None
    assert vera.error(change, change) == 0.0
    twice = replace(change, tensors={**change.tensors, "lambda_b": lazy(2 * change.tensors["lambda_b"].torch())})
    assert vera.error(change, twice) == pytest.approx(1.0)


def test_noise_at_inference_is_no_weight() -> None:
    one = adapter("pvera")
    with pytest.raises(CannotRepresent, match="sample_at_inference=false"):
        METHODS["pvera"].delta(update(one, "pvera", "tall", sample_at_inference=True))
    quiet = update(one, "pvera", "tall", sample_at_inference=False)
    assert relative(one.effect("tall"), METHODS["pvera"].delta(quiet)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_narrow_numbers(dtype: torch.dtype) -> None:
    change = update(adapter("vera"), "vera", "wide")
    narrow = {role: t.torch().to(dtype) for role, t in change.tensors.items()}
    change, wide = (
        replace(change, tensors={role: lazy(t.to(kind)) for role, t in narrow.items()})
        for kind in (dtype, torch.float64)
    )
    assert METHODS["vera"].error(wide, change) < 1e-12
    assert METHODS["vera"].delta(change).dtype is torch.float32


def test_the_norm_and_what_is_nothing() -> None:
    change = update(adapter("vera"), "vera", "wide")
    vera = METHODS["vera"]
    assert vera.norm(change) == pytest.approx(float(vera.delta(change).norm()), rel=1e-6)
    assert not vera.is_nothing(change)
    assert vera.is_nothing(replace(change, tensors={**change.tensors, "lambda_b": lazy(torch.zeros(8))}))
    assert vera.is_nothing(replace(change, tensors={**change.tensors, "lambda_d": lazy(torch.zeros(4))}))


@pytest.mark.parametrize(
    ("role", "shape", "message"),
    [
        ("lambda_b", (8, 1), "vector of numbers"),
        ("lambda_d", (0,), "vector of numbers"),
        ("lambda_b", (25,), "too few for the 25 outputs"),
        ("lambda_d", (5,), "4 rows; they are not of one adapter"),
        ("A", (4, 3, 2), "2 axes"),
        ("A", (5, 32), "5 rows; they are not of one adapter"),
        ("B", (24, 5), "rank 5, but 'A'.*rank 4"),
    ],
)
def test_shapes_that_do_not_belong_together(role: str, shape: tuple[int, ...], message: str) -> None:
    change = update(adapter("vera"), "vera", "wide")
    with pytest.raises(BrokenAdapter, match=message):
        METHODS["vera"].check(replace(change, tensors={**change.tensors, role: lazy(torch.ones(shape), role)}))


def test_half_an_update_and_another_base() -> None:
    change = update(adapter("pvera"), "pvera", "wide")
    for role in ("lambda_b", "lambda_d", "A", "B"):
        with pytest.raises(BrokenAdapter, match=f"counterpart {role} is missing"):
            METHODS["pvera"].check(replace(change, tensors={k: t for k, t in change.tensors.items() if k != role}))
    with pytest.raises(BrokenAdapter, match="an odd count"):
        METHODS["pvera"].check(replace(change, tensors={**change.tensors, "lambda_d": lazy(torch.ones(7))}))
    fits = METHODS["pvera"].fits
    assert [fits(change, shape) for shape in [(8, 32), (8, 33), (9, 32), (8,), (8, 4, 1)]] == [True, *[False] * 4]
    with pytest.raises(BrokenAdapter, match="another base"):
        METHODS["pvera"].delta(replace(change, options={"shape": (8, 40)}))
