"""MiSS against peft's layers: standard, mini and bat, also where r does not divide the inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_layers import (
    DTYPES,
    TOLERANCE,
    adapted,
    base_of,
    check_forward,
    check_low_rank,
    check_narrow,
    made,
    merged_change,
)
from method_updates import perturbed, update
from peft import MissConfig
from torch import nn

from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.miss import Miss

MISS = Miss()
KINDS: dict[str, dict[str, Any]] = {
    "standard": {"init_weights": True},
    "random": {"init_weights": False},
    "mini": {"init_weights": "mini", "mini_r": 3},
    "wide mini": {"init_weights": "mini", "mini_r": 6},
    "whole mini": {"init_weights": "mini", "mini_r": 12},
    "bat": {"init_weights": "bat"},
}
SIZES = [(8, 12), (20, 12), (18, 12), (6, 12)]
"""in and out, for r = 4: multiples of r, and not."""


def miss(kind: str, inputs: int = 20, out: int = 12, bias: bool = True) -> Any:
    return adapted(nn.Linear(inputs, out, bias=bias), MissConfig(r=4, **KINDS[kind]))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_does_what_pefts_layer_does(kind: str, sizes: tuple[int, int]) -> None:
    if kind == "bat" and sizes[0] % 4:
        with pytest.raises(ValueError, match="divisible"):
            miss(kind, *sizes)
        return
    model = miss(kind, *sizes)
    x = torch.randn(5, 3, sizes[0], dtype=torch.double)
    told = made("miss", model, "miss_", **KINDS[kind], shape=sizes[::-1])
    untold = made("miss", model, "miss_")
    change = check_forward(told, model, x)
    torch.testing.assert_close(check_forward(untold, model, x), change)
    torch.testing.assert_close(merged_change(model), change.double(), **TOLERANCE)
    assert MISS.rank(told) == 4
    assert MISS.error(told, untold) == 0.0


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bat"])
def test_all_but_bat_are_of_low_rank(kind: str, sizes: tuple[int, int]) -> None:
    model = miss(kind, *sizes)
    one = made("miss", model, "miss_", **KINDS[kind], shape=sizes[::-1])
    check_low_rank(one)
    assert MISS.exact_rank(one) == (3 if kind == "mini" else 4)
    torch.testing.assert_close(MISS.delta(one), MISS.change(one, base_of(model)).weight)


def test_bat_needs_the_base() -> None:
    model = miss("bat", bias=False)
    one = made("miss", model, "miss_", shape=(12, 20))
    assert MISS.low_rank(one) is None
    assert MISS.exact_rank(one) is MISS.norm(one) is MISS.weight_shape(one) is None
    for missing in (lambda: MISS.delta(one), lambda: MISS.change(one)):
        with pytest.raises(CannotRepresent, match=r"mid.to_q.*base.*weight.*--base-weights"):
            missing()
    with pytest.raises(BrokenAdapter, match=r"block.*\[3, 4, 4\].*bat.*\[16, 20\].*another base"):
        MISS.change(one, Own(torch.zeros(16, 20)))


@pytest.mark.parametrize("kind", ["standard", "mini"])
def test_the_shape_has_to_be_known(kind: str) -> None:
    one = made("miss", miss(kind), "miss_")
    assert MISS.exact_rank(one) == min(one.tensors["block"].shape)
    assert MISS.weight_shape(one) is MISS.norm(one) is None
    for missing in (lambda: MISS.delta(one), lambda: MISS.low_rank(one), lambda: MISS.change(one)):
        with pytest.raises(CannotRepresent, match=r"mid.to_q.*--arch NAME, --base CONFIG"):
            missing()


def test_bone_may_have_a_rank_above_the_inputs() -> None:
    """peft 0.21 refuses it; Bone's layers padded the input, so the rows behind the inputs do nothing."""
    block = torch.arange(24.0).reshape(8, 3)
    one = update("miss", {"block": block}, options={"shape": (3, 5)})
    MISS.check(one)
    torch.testing.assert_close(MISS.delta(one), block[:5].T)
    check_low_rank(one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["standard", "mini", "bat"])
def test_narrow_types(kind: str, dtype: torch.dtype) -> None:
    model = miss(kind)
    one = made("miss", model, "miss_", shape=(12, 20))
    check_narrow(one, dtype, base_of(model))
    if kind != "bat":
        narrow = update("miss", {"block": one.tensors["block"].torch().to(dtype)}, options={"shape": (12, 20)})
        check_low_rank(narrow)


@pytest.mark.parametrize("size", [1e-2, 1e-10])
@pytest.mark.parametrize("kind", ["standard", "bat"])
def test_the_error_is_that_of_the_block(kind: str, size: float) -> None:
    one = made("miss", miss(kind), "miss_")
    assert MISS.error(one, perturbed(one, "block", size)) == pytest.approx(size, rel=1e-4)


def test_blocks_of_other_shapes_are_other_updates() -> None:
    one, two = (made("miss", miss(kind), "miss_") for kind in ("standard", "bat"))
    assert MISS.error(one, two) == float("inf")


def test_nothing_is_a_block_of_zeros() -> None:
    assert MISS.is_nothing(update("miss", {"block": torch.zeros(2, 4)}))
    assert not MISS.is_nothing(update("miss", {"block": torch.ones(2, 4)}))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4,), {}, "no block of MiSS"),
        ((4, 0), {}, "no block of MiSS"),
        ((3, 4, 2), {}, "square"),
        ((4, 12), {"init_weights": "bat"}, "2 axes.*'bat'"),
        ((3, 4, 4), {"init_weights": True}, "3 axes.*True"),
        ((3, 4, 4), {"init_weights": "mini"}, "3 axes.*'mini'"),
        ((4, 3), {"init_weights": "mini", "mini_r": 6}, "mini_r is 6"),
        ((4, 5), {"init_weights": "mini", "shape": (12, 20)}, r"mini.*mid.to_q.*\[12, 20\]"),
        ((4, 6), {"init_weights": True, "shape": (12, 20)}, r"MiSS for mid.to_q.*\[12, 20\]"),
        ((3, 4, 4), {"shape": (12, 18)}, r"bat.*\[12, 18\].*another base"),
        ((4, 12), {"shape": (12, 4, 3, 3)}, r"\[12, 4, 3, 3\]"),
    ],
    ids=str,
)
def test_shapes_that_no_miss_has(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(BrokenAdapter, match=rf"tensor 'x.block'.*{message}"):
        MISS.check(update("miss", {"block": torch.ones(shape)}, options=options))


def test_a_block_has_to_be_there() -> None:
    with pytest.raises(BrokenAdapter, match="block is missing"):
        MISS.check(update("miss", {"other": torch.ones(2)}))


def test_what_it_fits() -> None:
    standard, bat = update("miss", {"block": torch.ones(4, 12)}), update("miss", {"block": torch.ones(3, 4, 4)})
    shapes = [(12, 20), (12, 18), (24, 20), (20, 12), (12, 20, 1, 1), (12,)]
    assert [MISS.fits(standard, s) for s in shapes] == [True, True, True, False, False, False]
    told = update("miss", {"block": torch.ones(4, 12)}, options={"init_weights": True})
    assert [MISS.fits(told, s) for s in shapes] == [True, True, False, False, False, False]
    assert [MISS.fits(bat, s) for s in shapes] == [True, False, False, False, False, False]
