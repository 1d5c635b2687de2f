"""FourierFT against peft's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import lazy, relative
from peft import FourierFTConfig
from shared_models import LINEAR, Saved, made, saved

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.fourierft import FourierFt

FOURIER = FourierFt()


def adapter(count: int = 40, **fields: Any) -> Saved:
    return saved(FourierFTConfig, n_frequency=count, target_modules=list(LINEAR), **fields)


def update(one: Saved, name: str, **options: Any) -> Update:
    facts = {"random_loc_seed": 777, "scaling": 150.0, "shape": tuple(one.own(name).weight.shape)}
    return made("fourierft", name, one.tensors("fourierft_", name, {}), **(facts | options))


@pytest.mark.parametrize("count", [1, 2, 40, 256])
@pytest.mark.parametrize("name", LINEAR)
def test_the_delta_is_pefts(name: str, count: int) -> None:
    one = adapter(count)
    change = update(one, name)
    FOURIER.check(change)
    assert FOURIER.fits(change, change.options["shape"])
    assert FOURIER.weight_shape(change) == change.options["shape"]
    delta = FOURIER.delta(change)
    assert delta.dtype is torch.float32
    assert relative(one.effect(name), delta) < 1e-5
    factors = FOURIER.low_rank(change)
    assert (factors is not None) == (count <= 2) == (FOURIER.exact_rank(change) is not None)
    if factors is not None:
        assert factors[0].shape[1] == factors[1].shape[0] == FOURIER.exact_rank(change) == 2 * count
        assert relative(delta, factors[0] @ factors[1]) < 1e-6


def test_other_seeds_and_scalings() -> None:
    one = adapter(random_loc_seed=5, scaling=2.5)
    change = update(one, "wide", random_loc_seed=5, scaling=2.5)
    assert relative(one.effect("wide"), FOURIER.delta(change)) < 1e-5
    assert relative(one.effect("wide"), FOURIER.delta(update(one, "wide", random_loc_seed=6, scaling=2.5))) > 0.5


@pytest.mark.parametrize("missing", ["random_loc_seed", "scaling", "shape"])
def test_facts_that_no_tensor_holds(missing: str) -> None:
    change = update(adapter(2), "tall")
    change = replace(change, options={k: v for k, v in change.options.items() if k != missing})
    message = "--base" if missing == "shape" else f"--set {missing}=VALUE"
    with pytest.raises(CannotRepresent, match=message):
        FOURIER.delta(change)
    assert FOURIER.norm(change) is None
    assert FOURIER.error(change, change) == 0.0


def test_narrow_numbers_and_nothing() -> None:
    change = update(adapter(), "tall")
    narrow = replace(change, tensors={"spectrum": lazy(change.tensors["spectrum"].torch().bfloat16())})
    assert 1e-4 < relative(FOURIER.delta(change), FOURIER.delta(narrow)) < 1e-2
    assert not FOURIER.is_nothing(change)
    assert FOURIER.is_nothing(replace(change, tensors={"spectrum": lazy(torch.zeros(40))}))


def test_tensors_that_are_no_spectrum() -> None:
    change = update(adapter(), "tall")
    for broken in (torch.ones(40, 1), torch.ones(0)):
        with pytest.raises(BrokenAdapter, match="vector of numbers"):
            FOURIER.check(replace(change, tensors={"spectrum": lazy(broken)}))
    with pytest.raises(BrokenAdapter, match="spectrum is missing"):
        FOURIER.check(replace(change, tensors={"other": lazy(torch.ones(3))}))
    with pytest.raises(BrokenAdapter, match=r"289 coefficients.*another base"):
        FOURIER.delta(replace(change, tensors={"spectrum": lazy(torch.ones(289))}))
    assert [FOURIER.fits(change, shape) for shape in [(4, 10), (4, 9), (40,), (4, 10, 1)]] == [
        True,
        False,
        False,
        False,
    ]
