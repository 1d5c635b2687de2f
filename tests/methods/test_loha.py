"""LoHa against lycoris-lora and peft."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lycoris.modules.loha import LohaModule
from method_updates import doubled, effect, lazy, lycoris, perturbed, randomise, relative, update
from peft import LoHaConfig
from peft.tuners.loha.layer import Conv1d, Conv2d, Linear
from torch import nn

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.loha import Loha

LOHA = Loha()
BASES: dict[str, Any] = {
    "linear": lambda: nn.Linear(20, 12),
    "conv3": lambda: nn.Conv2d(10, 12, 3),
    "conv1": lambda: nn.Conv2d(10, 12, 1),
    "conv1d": lambda: nn.Conv1d(10, 12, 5),
    "groups": lambda: nn.Conv2d(10, 12, 3, groups=2),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tucker": {"use_tucker": True},
    "scalar": {"use_scalar": True},
    "dora": {"weight_decompose": True},
    "dora per input": {"weight_decompose": True, "wd_on_out": False},
    "rslora": {"rs_lora": True},
}


def made(base: str = "linear", variant: str = "plain", rank: int = 3, alpha: float = 2) -> tuple[Update, torch.Tensor]:
    """An update and the delta that lycoris trains it with."""
    layer = BASES[base]()
    module = LohaModule("x", layer, 1.0, rank, alpha, **VARIANTS[variant])
    randomise(module)
    return lycoris("loha", module, "hada_"), effect(module, layer)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_the_delta_is_lycoris_own(base: str, variant: str) -> None:
    one, wanted = made(base, variant)
    LOHA.check(one)
    assert LOHA.fits(one, tuple(wanted.shape))
    assert LOHA.rank(one) == 3
    torch.testing.assert_close(LOHA.delta(one).reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6)


def test_lycoris_merges_apply_the_scale_twice() -> None:
    """A fault of lycoris-lora 4.1.3 that is not ours: what it merges is not what it trained."""
    layer = nn.Linear(20, 12).double()
    module = LohaModule("x", layer, 1.0, 4, 1)
    randomise(module)
    merged, _ = module.get_diff_weight(1.0, layer.weight.shape)
    delta = LOHA.delta(lycoris("loha", module, "hada_"))
    torch.testing.assert_close(merged.detach().float(), delta * 0.25)
    inputs = torch.eye(20).double()
    torch.testing.assert_close((module(inputs) - layer(inputs)).detach().float().T, delta, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize(
    ("layer", "base"),
    [(Linear, nn.Linear(20, 12)), (Conv2d, nn.Conv2d(10, 12, 3)), (Conv1d, nn.Conv1d(10, 12, 5))],
)
def test_the_delta_is_pefts(layer: Any, base: nn.Module, effective: bool) -> None:
    config = LoHaConfig(use_effective_conv2d=effective)
    tuned = layer(base, "default", config=config, r=3, alpha=7)
    randomise(tuned)
    tensors = {k.split(".")[0].removeprefix("hada_"): t for k, t in tuned.state_dict().items() if "hada" in k}
    one = update("loha", tensors, 7.0)
    LOHA.check(one)
    weight = tuned.get_delta_weight("default").detach().float()
    assert LOHA.fits(one, tuple(weight.shape))
    torch.testing.assert_close(LOHA.delta(one).reshape(weight.shape), weight, rtol=1e-6, atol=1e-6)


def test_rank_stabilised_scale() -> None:
    one, _ = made()
    assert LOHA.scale(one) == pytest.approx(2 / 3)
    assert LOHA.scale(replace(one, rslora=True)) == pytest.approx(2 / 3**0.5)
    unknown = replace(one, alpha=None)
    assert LOHA.scale(unknown) is None
    for act in (LOHA.delta, lambda u: LOHA.folded(u, None)):
        with pytest.raises(CannotRepresent, match="--alpha"):
            act(unknown)


@pytest.mark.parametrize("role", ["w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"])
@pytest.mark.parametrize("size", [1e-1, 1e-6, 1e-12])
def test_the_error_is_that_of_the_deltas(role: str, size: float) -> None:
    one = doubled(made("conv3", "tucker")[0])
    other = perturbed(one, role, size)
    assert LOHA.error(one, one) == 0.0
    assert LOHA.error(one, replace(one, tensors=dict(one.tensors))) == 0.0
    whole = [LOHA._matrix(u).at(0, 12) for u in (one, other)]
    wanted = relative(*(torch.from_numpy(w) for w in whole))
    assert 0.05 * size < wanted < 20 * size
    assert LOHA.error(one, other) == pytest.approx(wanted, rel=1e-3)


def test_errors_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    one, _ = made()
    other = perturbed(one, "w2_b", 1e-3)
    whole, delta = LOHA.error(one, other), LOHA.delta(one)
    monkeypatch.setattr("adapterops.methods.products.BLOCK", 50)
    assert LOHA.error(one, other) == pytest.approx(whole, rel=1e-12)
    torch.testing.assert_close(LOHA.delta(one), delta, rtol=0, atol=0)


def test_errors_of_scales_and_magnitudes() -> None:
    one, _ = made("linear", "dora")
    assert LOHA.error(one, replace(one, alpha=replace(one.alpha, value=2.2))) == pytest.approx(0.1)  # type: ignore[type-var]
    louder = replace(one, tensors={**one.tensors, "magnitude": one.tensors["magnitude"].mapped("F64", 1.25)})
    assert LOHA.error(one, louder) == pytest.approx(0.25)
    without = replace(one, tensors={r: t for r, t in one.tensors.items() if r != "magnitude"})
    assert LOHA.error(one, without) == float("inf")
    assert LOHA.error(made("conv3")[0], made("conv1")[0]) == float("inf")


def test_folding_leaves_scale_one() -> None:
    one, wanted = made("conv3", "tucker")
    folded = replace(one, tensors=LOHA.folded(one, None), alpha=replace(one.alpha, value=3.0))  # type: ignore[type-var]
    torch.testing.assert_close(LOHA.delta(folded), wanted, rtol=1e-5, atol=1e-6)
    changed = [r for r in one.tensors if one.tensors[r].read() != folded.tensors[r].read()]
    assert changed == ["w1_a"]
    assert {t.dtype for t in LOHA.folded(one, "BF16").values()} == {"BF16"}


@pytest.mark.parametrize("variant", ["plain", "dora"])
def test_rows_are_rows_of_the_delta(variant: str) -> None:
    one, wanted = made("linear", variant)
    pieces = [(8, 10), (1, 4)]
    part = replace(one, tensors=LOHA.take_rows(one, pieces))
    LOHA.check(part)
    torch.testing.assert_close(LOHA.delta(part), torch.cat([wanted[8:10], wanted[1:4]]), rtol=1e-6, atol=1e-6)
    if variant == "dora":
        magnitude = one.tensors["magnitude"].torch()
        assert torch.equal(part.tensors["magnitude"].torch(), torch.cat([magnitude[8:10], magnitude[1:4]]))


@pytest.mark.parametrize(
    ("base", "variant", "why"), [("conv3", "tucker", "Tucker"), ("linear", "dora per input", "DoRA")]
)
def test_rows_that_cannot_be_taken(base: str, variant: str, why: str) -> None:
    with pytest.raises(CannotRepresent, match=f"(?s)mid.to_q.*{why}.*--to kohya"):
        LOHA.take_rows(made(base, variant)[0], [(0, 4)])


def test_an_update_of_zeros_is_nothing() -> None:
    one, _ = made()
    zero = {role: lazy(torch.zeros(t.shape)) for role, t in one.tensors.items() if role.endswith("_a")}
    assert LOHA.is_nothing(replace(one, tensors={**one.tensors, **zero}))
    assert not LOHA.is_nothing(one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w2_b": None}, "w2_b is missing"),
        ({"t1": torch.ones(3, 3, 3, 3)}, "t2 is missing"),
        ({"w1_b": torch.ones(2, 20)}, r"(?s)rank 3.*x.w1_b.*rank 2"),
        ({"w2_a": torch.ones(12, 2), "w2_b": torch.ones(2, 20)}, "two meanings"),
        ({"w2_b": torch.ones(3, 21)}, r"\[12, 21\].*\[12, 20\]"),
        ({"w2_a": torch.ones(12)}, "no low-rank factor"),
        ({"w2_a": torch.ones(12, 3, 3)}, "no kernel of its own"),
        (
            {"w1_a": torch.ones(3, 12), "t1": torch.ones(2, 3, 3, 3), "t2": torch.ones(3, 3, 3, 3)},
            r"x.t1.*no core.*\(3, 3, kernel\)",
        ),
        ({"magnitude": torch.ones(7)}, "12 elements"),
    ],
)
def test_tensors_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    one, _ = made()
    tensors = {**one.tensors, **{role: t if t is None else lazy(t, f"x.{role}") for role, t in changes.items()}}
    broken = {role: t for role, t in tensors.items() if t is not None}
    with pytest.raises(BrokenAdapter, match=message):
        LOHA.check(replace(one, tensors=broken, options={"dora_axis": "out"}))


@pytest.mark.parametrize(
    ("base", "shape", "fits"),
    [
        ("linear", (12, 20), True),
        ("linear", (12, 20, 1, 1), True),
        ("linear", (12, 5, 2, 2), True),
        ("linear", (12, 21), False),
        ("linear", (20, 12), False),
        ("linear", (12,), False),
        ("conv3", (12, 10, 3, 3), True),
        ("conv3", (12, 90), True),
        ("conv3", (12, 10, 5, 5), False),
    ],
)
def test_what_it_fits(base: str, shape: tuple[int, ...], fits: bool) -> None:
    assert LOHA.fits(made(base)[0], shape) is fits


def test_a_core_fits_its_own_kernel_alone() -> None:
    one, _ = made("conv3", "tucker")
    assert [LOHA.fits(one, (12, *rest)) for rest in ((10, 3, 3), (90,), (15, 3, 2))] == [True, False, False]
