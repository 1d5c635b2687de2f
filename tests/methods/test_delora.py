"""DeLoRA against peft's layers."""

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
from method_updates import lazy, perturbed, update
from peft import DeloraConfig
from torch import nn

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.delora import Delora

DELORA = Delora()
INPUT = torch.randn(4, 5, 14, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def delora(r: int = 3, bias: bool = True) -> Any:
    return adapted(nn.Linear(14, 10, bias=bias), DeloraConfig(r=r, delora_lambda=7))


@pytest.mark.parametrize("r", [1, 3, 16])
def test_it_does_what_pefts_layer_does(r: int) -> None:
    model = delora(r)
    one = made("delora", model, "delora_")
    change = check_forward(one, model, INPUT)
    torch.testing.assert_close(merged_change(model), change.double(), **TOLERANCE)
    check_low_rank(one)
    assert DELORA.exact_rank(one) == DELORA.rank(one) == r


def test_the_saved_norms_are_used_not_those_of_the_base() -> None:
    model = delora()
    one = made("delora", model, "delora_")
    own = base_of(model)
    stated = one.tensors["w_norm"].torch()
    # `adapted` drew the base anew after peft had taken its norms.
    assert not torch.allclose(stated, own.weight.norm(dim=0), rtol=0.1)
    check_forward(one, model, INPUT)


def test_short_vectors_count_as_a_ten_thousandth() -> None:
    model = delora()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "delora_A" in name:
                parameter[1] *= 1e-7
            if "delora_B" in name:
                parameter[:, 2] = 0
    one = made("delora", model, "delora_")
    check_forward(one, model, INPUT)
    check_low_rank(one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_types(dtype: torch.dtype) -> None:
    check_narrow(made("delora", delora(), "delora_"), dtype)


@pytest.mark.parametrize("size", [1e-2, 1e-10])
def test_the_error_is_that_of_the_delta(size: float) -> None:
    one = made("delora", delora(), "delora_")
    assert DELORA.error(one, one) == 0.0
    assert DELORA.error(one, perturbed(one, "lambda", size)) == pytest.approx(size, rel=1e-4)
    assert 0.05 * size < DELORA.error(one, perturbed(one, "A", size)) < 20 * size


def test_the_length_of_a_factor_is_no_effect() -> None:
    one = made("delora", delora(), "delora_")
    longer = {**one.tensors, "B": lazy(one.tensors["B"].torch() * 3)}
    assert DELORA.error(one, Update(one.component, one.module, "delora", longer)) < 1e-12


def test_parts_of_a_fused_projection_cannot_be_cut_out() -> None:
    """Their columns of B would have other lengths."""
    with pytest.raises(CannotRepresent, match="fused projection"):
        DELORA.take_rows(made("delora", delora(), "delora_"), [(0, 5)])


def test_nothing_is_a_zero_in_b_or_in_the_bound() -> None:
    one = made("delora", delora(), "delora_")
    tensors = {role: t.torch() for role, t in one.tensors.items()}
    assert not DELORA.is_nothing(one)
    for role in ("B", "lambda"):
        assert DELORA.is_nothing(update("delora", {**tensors, role: torch.zeros_like(tensors[role])}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"A": (3,)}, "'x.A'.*no low-rank factor"),
        ({"B": (10, 3, 1, 1)}, "'x.B'.*no low-rank factor"),
        ({"B": (10, 4)}, "'x.B'.*rank 4.*rank 3"),
        ({"lambda": (3,)}, "'x.lambda'.*one number"),
        ({"w_norm": (10,)}, r"'x.w_norm'.*\[14\]"),
        ({"w_norm": None}, "w_norm is missing"),
    ],
    ids=str,
)
def test_shapes_that_no_delora_has(changed: dict[str, tuple[int, ...] | None], message: str) -> None:
    shapes = {"A": (3, 14), "B": (10, 3), "lambda": (1,), "w_norm": (14,), **changed}
    tensors = {role: torch.ones(shape) for role, shape in shapes.items() if shape is not None}
    with pytest.raises(BrokenAdapter, match=message):
        DELORA.check(update("delora", tensors))


def test_what_it_fits() -> None:
    one = made("delora", delora(), "delora_")
    assert [DELORA.fits(one, s) for s in [(10, 14), (14, 10), (10, 14, 1)]] == [True, False, False]
