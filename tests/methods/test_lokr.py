"""LoKr against lycoris-lora and peft."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lycoris.modules.lokr import LokrModule
from method_updates import doubled, effect, lazy, lycoris, perturbed, randomise, relative, update
from peft import LoKrConfig
from peft.tuners.lokr.layer import Conv1d, Conv2d, Linear
from torch import nn

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.lokr import Lokr, kronecker

LOKR = Lokr()
BASES: dict[str, Any] = {
    "linear": lambda: nn.Linear(64, 48),
    "conv3": lambda: nn.Conv2d(64, 48, 3),
    "conv1": lambda: nn.Conv2d(64, 48, 1),
    "conv1d": lambda: nn.Conv1d(64, 48, 5),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "w2 decomposed": {"factor": 8},
    "both decomposed": {"factor": 8, "decompose_both": True},
    "both whole": {"factor": 8, "full_matrix": True},
    "w1 decomposed": {"factor": 16, "decompose_both": True, "unbalanced_factorization": True},
    "tucker": {"factor": 8, "use_tucker": True, "decompose_both": True},
    "tucker, w1 whole": {"factor": 8, "use_tucker": True},
    "scalar": {"factor": 8, "use_scalar": True},
    "scalar, both": {"factor": 8, "use_scalar": True, "decompose_both": True},
    "dora": {"factor": 8, "weight_decompose": True},
    "dora per input": {"factor": 8, "weight_decompose": True, "wd_on_out": False},
    "rslora": {"factor": 8, "rs_lora": True},
}


def made(base: str = "linear", variant: str = "both decomposed", alpha: float = 5) -> tuple[Update, torch.Tensor]:
    """An update and the delta that lycoris trains it with."""
    layer = BASES[base]()
    module = LokrModule("x", layer, 1.0, 2, alpha, **VARIANTS[variant])
    randomise(module)
    return lycoris("lokr", module, "lokr_"), effect(module, layer)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", BASES)
def test_the_delta_is_lycoris_own(base: str, variant: str) -> None:
    one, wanted = made(base, variant)
    LOKR.check(one)
    assert LOKR.fits(one, tuple(wanted.shape))
    torch.testing.assert_close(LOKR.delta(one).reshape(wanted.shape), wanted, rtol=1e-6, atol=1e-6)


def test_the_variants_cover_every_combination_of_factors() -> None:
    found = {frozenset(made("conv3", variant)[0].tensors) - {"magnitude"} for variant in VARIANTS}
    one = lycoris("lokr", LokrModule("x", nn.Linear(8, 512), 1.0, 3, 1, factor=8, decompose_both=True), "lokr_")
    found.add(frozenset(one.tensors))
    assert found == {
        frozenset(roles.split())
        for roles in ("w1 w2", "w1 w2_a w2_b", "w1_a w1_b w2_a w2_b", "w1 w2_a w2_b t2", "w1_a w1_b w2_a w2_b t2")
    }


def test_w1_decomposed_beside_a_whole_w2() -> None:
    a, b, w2 = torch.randn(6, 3), torch.randn(3, 5), torch.randn(4, 2, 3, 3)
    one = update("lokr", {"w1_a": a, "w1_b": b, "w2": w2}, 2.0)
    LOKR.check(one)
    assert LOKR.scale(one) == pytest.approx(2 / 3)
    wanted = torch.kron((a @ b)[:, :, None, None].double(), w2.double()).float() * (2 / 3)
    torch.testing.assert_close(LOKR.delta(one), wanted, rtol=1e-5, atol=1e-5)


def test_a_kernel_behind_the_inputs_of_w2_b() -> None:
    """lycoris's functional form keeps the kernel as axes of its own; its modules flatten it."""
    w1, a, b = torch.randn(3, 2).double(), torch.randn(4, 2).double(), torch.randn(2, 5, 3, 3).double()
    one = update("lokr", {"w1": w1, "w2_a": a, "w2_b": b}, 2.0)
    LOKR.check(one)
    wanted = torch.kron(w1[:, :, None, None], (a @ b.reshape(2, -1)).reshape(4, 5, 3, 3)).float()
    torch.testing.assert_close(LOKR.delta(one), wanted)
    flat = replace(one, tensors={**one.tensors, "w2_b": lazy(b.reshape(2, -1))})
    torch.testing.assert_close(LOKR.delta(flat), wanted.reshape(12, -1))
    assert LOKR.error(one, flat) == 0.0
    assert LOKR.fits(one, (12, 10, 3, 3))
    assert not LOKR.fits(one, (12, 15, 3, 2))
    assert LOKR.fits(flat, (12, 10, 3, 3))


PEFT: dict[str, tuple[Any, Any]] = {
    "linear": (Linear, lambda: nn.Linear(64, 48)),
    "conv2d": (Conv2d, lambda: nn.Conv2d(64, 48, 3)),
    "conv1d": (Conv1d, lambda: nn.Conv1d(64, 48, 5)),
}


@pytest.mark.parametrize(
    ("kind", "option"),
    [(k, o) for k in PEFT for o in ("plain", "effective", "both", "whole") if (k, o) != ("conv1d", "whole")],
)
def test_the_delta_is_pefts(kind: str, option: str) -> None:
    one, weight = of_peft(kind, option)
    LOKR.check(one)
    assert LOKR.fits(one, tuple(weight.shape))
    torch.testing.assert_close(LOKR.delta(one).reshape(weight.shape), weight, rtol=1e-6, atol=1e-6)


def test_peft_multiplies_a_whole_w2_of_a_1d_convolution_along_the_wrong_axes() -> None:
    one, weight = of_peft("conv1d", "whole")
    w1, w2 = (one.tensors[role].torch() * factor for role, factor in (("w1", 7 / 40), ("w2", 1)))
    torch.testing.assert_close(torch.kron(w1[None], w2).reshape(weight.shape).float(), weight)
    torch.testing.assert_close(torch.kron(w1[:, :, None], w2).float(), LOKR.delta(one))


def of_peft(kind: str, option: str) -> tuple[Update, torch.Tensor]:
    """An update and the delta that peft computes of it."""
    layer, base = PEFT[kind]
    config = LoKrConfig(use_effective_conv2d=option == "effective", decompose_both=option == "both", decompose_factor=8)
    rank = 40 if option == "whole" else 3
    tuned = layer(base(), "default", config=config, r=rank, alpha=7)
    randomise(tuned)
    tensors = {k.split(".")[0].removeprefix("lokr_"): t for k, t in tuned.state_dict().items() if "lokr" in k}
    assert ("w2" in tensors) == (option == "whole")
    one = update("lokr", tensors, 7.0, options={"rank": rank})
    return one, tuned.get_delta_weight("default").detach().float()


def test_alpha_of_two_whole_factors() -> None:
    one = replace(made("linear", "both whole")[0])
    assert LOKR.rank(one) is None
    for alpha in (None, replace(one.alpha, value=77.0), replace(one.alpha, value=None)):  # type: ignore[type-var]
        assert LOKR.scale(replace(one, alpha=alpha)) == 1.0
    stated = replace(one, options={"rank": 4}, alpha=replace(one.alpha, value=3.0))  # type: ignore[type-var]
    assert LOKR.scale(stated) == 0.75
    assert LOKR.scale(replace(stated, rslora=True)) == 1.5
    assert LOKR.scale(replace(stated, alpha=None)) is None
    with pytest.raises(CannotRepresent, match="--alpha"):
        LOKR.delta(replace(stated, alpha=None))


@pytest.mark.parametrize("role", ["w1_a", "w1_b", "w2_a", "w2_b", "t2"])
@pytest.mark.parametrize("size", [1e-1, 1e-6, 1e-12])
def test_the_error_is_that_of_the_deltas(role: str, size: float) -> None:
    one = doubled(made("conv3", "tucker")[0])
    other = perturbed(one, role, size)
    assert LOKR.error(one, one) == 0.0
    assert LOKR.error(one, replace(one, tensors=dict(one.tensors))) == 0.0
    whole = [torch.from_numpy(kronecker(*LOKR._factors(u)).at(0, 48)) for u in (one, other)]
    wanted = relative(*whole)
    assert 0.05 * size < wanted < 20 * size
    assert LOKR.error(one, other) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_errors_in_both_factors_add_up(size: float) -> None:
    one = doubled(made("conv3", "both whole")[0])
    other = perturbed(perturbed(one, "w1", size), "w2", size, seed=2)
    wanted = relative(*(torch.from_numpy(kronecker(*LOKR._factors(u)).at(0, 48)) for u in (one, other)))
    assert LOKR.error(one, other) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("moved", [-3.7, 1e8])
def test_a_number_moved_from_one_factor_to_the_other_is_no_error(moved: float) -> None:
    one = doubled(made("linear", "both whole")[0])
    tensors = {"w1": one.tensors["w1"].mapped("F64", moved), "w2": one.tensors["w2"].mapped("F64", 1 / moved)}
    assert LOKR.error(one, replace(one, tensors=tensors)) < 1e-15
    assert LOKR.error(one, perturbed(replace(one, tensors=tensors), "w2", 1e-12)) == pytest.approx(1e-12, rel=1e-2)


def test_factors_of_other_shapes_are_compared_as_matrices() -> None:
    eye, small = torch.eye(2).double(), torch.randn(3, 2).double()
    one = update("lokr", {"w1": torch.kron(eye, eye), "w2": small}, 1.0)
    other = update("lokr", {"w1": eye, "w2": torch.kron(eye, small)}, 1.0)
    assert LOKR.error(one, other) == 0.0
    assert 0 < LOKR.error(one, perturbed(other, "w2", 1e-9)) < 1e-8
    assert LOKR.error(one, update("lokr", {"w1": eye, "w2": small}, 1.0)) == float("inf")


@pytest.mark.parametrize("zero", ["w1", "w2"])
def test_errors_of_nothing(zero: str) -> None:
    one = made("linear", "both whole")[0]
    nothing = replace(one, tensors={**one.tensors, zero: lazy(torch.zeros(one.tensors[zero].shape))})
    assert LOKR.error(nothing, nothing) == 0.0
    assert LOKR.error(one, nothing) == pytest.approx(1.0)
    delta = kronecker(*LOKR._factors(one)).at(0, 48)
    assert LOKR.error(nothing, one) == pytest.approx(float((delta**2).sum() ** 0.5))
    assert LOKR.is_nothing(nothing) == (zero == "w1")
    assert not LOKR.is_nothing(one)


def test_errors_of_magnitudes() -> None:
    one, _ = made("linear", "dora")
    louder = replace(one, tensors={**one.tensors, "magnitude": one.tensors["magnitude"].mapped("F64", 1.25)})
    assert LOKR.error(one, louder) == pytest.approx(0.25)
    without = replace(one, tensors={r: t for r, t in one.tensors.items() if r != "magnitude"})
    assert LOKR.error(one, without) == LOKR.error(without, one) == float("inf")


@pytest.mark.parametrize("variant", ["both decomposed", "w2 decomposed", "both whole"])
def test_folding_leaves_scale_one(variant: str) -> None:
    one, _ = made("linear", variant)
    if variant == "both whole":
        one = replace(one, options={"rank": 4}, alpha=replace(one.alpha, value=3.0))  # type: ignore[type-var]
    wanted, rank = LOKR.delta(one), LOKR.rank(one)
    assert rank
    folded = replace(one, tensors=LOKR.folded(one, None), alpha=replace(one.alpha, value=float(rank)))  # type: ignore[type-var]
    torch.testing.assert_close(LOKR.delta(folded), wanted, rtol=1e-6, atol=1e-6)
    assert [r for r in one.tensors if one.tensors[r].read() != folded.tensors[r].read()] in (["w1"], ["w1_a"])


@pytest.mark.parametrize("variant", ["both decomposed", "both whole", "dora"])
def test_whole_blocks_of_rows_can_be_taken(variant: str) -> None:
    one, wanted = made("linear", variant)
    assert [t.shape[0] for r, t in one.tensors.items() if r in ("w1", "w1_a")] == [6]
    pieces = [(40, 48), (8, 24)]
    part = replace(one, tensors=LOKR.take_rows(one, pieces))
    LOKR.check(part)
    torch.testing.assert_close(LOKR.delta(part), torch.cat([wanted[40:48], wanted[8:24]]), rtol=1e-6, atol=1e-6)
    if variant == "dora":
        magnitude = one.tensors["magnitude"].torch()
        assert torch.equal(part.tensors["magnitude"].torch(), torch.cat([magnitude[40:48], magnitude[8:24]]))


@pytest.mark.parametrize("piece", [(0, 12), (4, 8), (44, 48)])
def test_a_block_is_not_cut(piece: tuple[int, int]) -> None:
    message = rf"(?s)mid.to_q.*blocks of 8 rows.*rows {piece[0]} to {piece[1]}.*Kronecker.*--to kohya, --to comfy"
    with pytest.raises(CannotRepresent, match=message):
        LOKR.take_rows(made()[0], [(0, 8), piece])


def test_magnitudes_per_input_are_not_split() -> None:
    with pytest.raises(CannotRepresent, match=r"(?s)mid.to_q.*DoRA.*--to kohya"):
        LOKR.take_rows(made("linear", "dora per input")[0], [(0, 8)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w1_b": None}, "w1_b is missing"),
        ({"w2_a": None}, "w2_a is missing"),
        ({"w1_a": None, "w1_b": None}, "w1_a and w1_b is missing"),
        ({"w1": torch.ones(6, 8)}, "whole and again as w1_a and w1_b"),
        ({"w2_a": None, "w2_b": None, "w2": torch.ones(8, 8), "t2": torch.ones(2, 2, 3, 3)}, "whole and again as t2"),
        ({"t1": torch.ones(2, 2, 3, 3)}, "no writer defines"),
        ({"w1_a": torch.ones(6, 3), "w1_b": torch.ones(3, 8)}, r"3 by w1_b \[3, 8\], 2 by w2_b \[2, 8\]"),
        ({"w1_b": torch.ones(3, 8)}, "(?s)rank 2.*rank 3"),
        ({"w2_b": torch.ones(2)}, "no low-rank factor"),
        ({"w1_a": None, "w1_b": None, "w1": torch.ones(6)}, "no factor of a Kronecker product"),
        ({"w1_a": None, "w1_b": None, "w1": torch.ones(6, 8, 3, 3)}, "has no kernel"),
        ({"t2": torch.ones(2, 2, 3, 3)}, "rank 8"),
        ({"w2_a": torch.ones(2, 8), "t2": torch.ones(2, 3, 3, 3)}, r"no core.*\(2, 2, kernel\)"),
        ({"magnitude": torch.ones(7)}, "48 elements"),
    ],
)
def test_tensors_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    one, _ = made()
    tensors = {**one.tensors, **{role: t if t is None else lazy(t, f"x.{role}") for role, t in changes.items()}}
    broken = {role: t for role, t in tensors.items() if t is not None}
    with pytest.raises(BrokenAdapter, match=message):
        LOKR.check(replace(one, tensors=broken, options={"dora_axis": "out"}))


def test_a_config_of_another_rank_is_a_contradiction() -> None:
    with pytest.raises(BrokenAdapter, match=r"(?s)2 by w1_b.*2 by w2_b.*5 by its config"):
        LOKR.check(replace(made()[0], options={"rank": 5}))


@pytest.mark.parametrize(
    ("base", "variant", "shape", "fits"),
    [
        ("linear", "both whole", (48, 64), True),
        ("linear", "both whole", (48, 64, 1, 1), True),
        ("linear", "both whole", (64, 48), False),
        ("linear", "both whole", (48,), False),
        ("conv3", "both whole", (48, 64, 3, 3), True),
        ("conv3", "both whole", (48, 576), False),
        ("conv3", "both decomposed", (48, 64, 3, 3), True),
        ("conv3", "both decomposed", (48, 64, 5, 5), False),
    ],
)
def test_what_it_fits(base: str, variant: str, shape: tuple[int, ...], fits: bool) -> None:
    assert LOKR.fits(made(base, variant)[0], shape) is fits


def test_half_an_update_is_left_to_the_check() -> None:
    one, _ = made()
    half = replace(one, tensors={"w1_a": one.tensors["w1_a"]})
    assert LOKR.fits(half, (1, 1))
    with pytest.raises(BrokenAdapter, match="w1_b is missing"):
        LOKR.check(half)
