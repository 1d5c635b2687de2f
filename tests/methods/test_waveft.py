"""WaveFT and its wavelets against peft's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from method_updates import lazy, relative
from peft import WaveFTConfig
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.layer import WaveFTLinear
from peft.tuners.waveft.wavelet import Wavelet
from shared_models import LINEAR, Saved, made, saved
from torch import nn

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.waveft import WaveFt
from adapterops.methods.wavelets import families, low_pass, synthesise

WAVE = WaveFt()


def adapter(count: int = 40, **fields: Any) -> Saved:
    return saved(WaveFTConfig, n_frequency=count, target_modules=list(LINEAR), **fields)


def update(one: Saved, name: str, **options: Any) -> Update:
    facts = {"random_loc_seed": 777, "scaling": 25.0, "wavelet_family": "db1", "use_idwt": True}
    facts["shape"] = tuple(one.own(name).weight.shape)
    return made("waveft", name, one.tensors("waveft_", name, {}), **(facts | options))


@pytest.mark.parametrize("family", families())
def test_the_delta_is_pefts_for_every_wavelet(family: str) -> None:
    one = adapter(wavelet_family=family)
    for name in LINEAR:
        change = update(one, name, wavelet_family=family)
        WAVE.check(change)
        assert WAVE.weight_shape(change) == change.options["shape"]
        assert relative(one.effect(name), WAVE.delta(change)) < 1e-5


@pytest.mark.parametrize("idwt", [False, True])
@pytest.mark.parametrize("count", [1, 4, 256])
@pytest.mark.parametrize("name", LINEAR)
def test_few_coefficients_have_exact_factors(name: str, count: int, idwt: bool) -> None:
    one = adapter(count, use_idwt=idwt, wavelet_family="sym4", scaling=2.0, random_loc_seed=3)
    change = update(one, name, use_idwt=idwt, wavelet_family="sym4", scaling=2.0, random_loc_seed=3)
    delta = WAVE.delta(change)
    assert relative(one.effect(name), delta) < 1e-5
    factors = WAVE.low_rank(change)
    assert (factors is not None) == (count <= 4) == (WAVE.exact_rank(change) is not None)
    if factors is not None:
        assert factors[0].shape[1] == factors[1].shape[0] == WAVE.exact_rank(change) == count
        assert relative(delta, factors[0] @ factors[1]) < 1e-6


@pytest.mark.parametrize("sizes", [(7, 9), (8, 9), (7, 10)])
@pytest.mark.parametrize("family", ["db1", "db2", "coif1"])
def test_odd_sizes(sizes: tuple[int, int], family: str) -> None:
    config = WaveFTConfig(n_frequency=20, wavelet_family=family, init_weights=False)
    layer = WaveFTLinear(nn.Linear(*sizes), "default", config, n_frequency=20)
    facts = {"random_loc_seed": 777, "scaling": 25.0, "wavelet_family": family, "use_idwt": True}
    spectrum = {"spectrum": lazy(layer.waveft_spectrum["default"])}
    change = made("waveft", "x", spectrum, shape=sizes[::-1], **facts)
    assert relative(layer.get_delta_weight("default").detach(), WAVE.delta(change)) < 1e-5


@pytest.mark.parametrize("missing", ["random_loc_seed", "scaling", "shape", "use_idwt", "wavelet_family"])
def test_facts_that_no_tensor_holds(missing: str) -> None:
    change = update(adapter(2), "tall")
    change = replace(change, options={k: v for k, v in change.options.items() if k != missing})
    message = "--base" if missing == "shape" else f"--set {missing}=VALUE"
    with pytest.raises(CannotRepresent, match=message):
        WAVE.delta(change)


def test_the_wavelet_does_not_matter_without_a_transform() -> None:
    one = adapter(use_idwt=False)
    change = update(one, "tall", use_idwt=False)
    change = replace(change, options={k: v for k, v in change.options.items() if k != "wavelet_family"})
    assert relative(one.effect("tall"), WAVE.delta(change)) < 1e-5


def test_the_filters_are_pefts() -> None:
    for family in families():
        peft = Wavelet(family)
        low = low_pass(family)
        assert low is not None
        assert low == pytest.approx(peft.rec_lo, abs=1e-15)
        assert WAVELET_REDUCTIONS[family] == (len(low) - 2, len(low) - 2)
        # An orthogonal wavelet is so to its own shifts by two.
        shifts = [np.dot(low[: len(low) - at], low[at:]) for at in range(0, len(low), 2)]
        if family != "coif4":
            np.testing.assert_allclose(shifts, [1.0] + [0.0] * (len(shifts) - 1), atol=1e-11)
        made = synthesise(np.eye(40), low)
        assert made.shape == (42 - len(low), 40)


@pytest.mark.parametrize("family", ["coif5", "db11", "coif17", "haar", "0.7071067811865476"])
def test_wavelets_that_pefts_layers_cannot_use(family: str) -> None:
    assert low_pass(family) is None
    with pytest.raises(CannotRepresent, match=rf"no filter of the wavelet '{family}'.*--set wavelet_family=NAME"):
        WAVE.delta(update(adapter(), "tall", wavelet_family=family))


@pytest.mark.parametrize(("family", "error"), [("coif5", RuntimeError), ("db11", ValueError)])
def test_peft_fails_for_these_too(family: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        adapter(wavelet_family=family).effect("tall")


def test_tensors_that_are_no_spectrum() -> None:
    change = update(adapter(), "tall")
    with pytest.raises(BrokenAdapter, match="vector of numbers"):
        WAVE.check(replace(change, tensors={"spectrum": lazy(torch.ones(40, 1))}))
    with pytest.raises(BrokenAdapter, match=r"289 coefficients.*another base"):
        WAVE.delta(replace(change, tensors={"spectrum": lazy(torch.ones(289))}))
    assert WAVE.is_nothing(replace(change, tensors={"spectrum": lazy(torch.zeros(40))}))
    assert not WAVE.is_nothing(change)
