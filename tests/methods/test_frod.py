"""FRoD against peft's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import lazy, relative
from peft import FrodConfig
from peft.tuners.frod.model import _category_from_key
from shared_models import LINEAR, Saved, made, saved

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.frod import Frod, category

FROD = Frod()


def adapter(edit: Any = None, **fields: Any) -> Saved:
    sizes = {"target_modules": list(LINEAR), "sparse_rate": 0.1, "progressbar": False}
    return saved(FrodConfig, edit, **(sizes | fields))


def update(one: Saved, name: str, projections: bool = True) -> Update:
    whole = {f"frod_{role}.{category(name)}": role for role in ("V", "s_indices", "s_size")} if projections else {}
    return made("frod", name, one.tensors("frod_", name, whole))


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_the_change_is_pefts(name: str, rate: float) -> None:
    one = adapter(sparse_rate=rate)
    change = update(one, name)
    FROD.check(change)
    assert FROD.fits(change, tuple(one.own(name).weight.shape))
    assert not FROD.fits(change, (4, 5))
    found = FROD.change(change, one.own(name))
    assert found.bias is None
    assert found.weight is not None
    assert found.weight.dtype is torch.float32
    assert relative(one.effect(name), found.weight) < 2e-5


def test_an_untrained_one_changes_nothing() -> None:
    """λ₀ is the length of the columns of W · V⁻ᵀ: with it, and no sparse part, W' is W."""
    one = adapter()
    change, own = update(one, "tall"), one.own("tall")
    basis = one.state["base_model.frod_V.tall"].double()
    start = torch.linalg.solve(basis, own.weight.double().T).T.norm(dim=0)
    values = {"lambda_l": lazy(start.float()), "lambda_s_values": lazy(0 * change.tensors["lambda_s_values"].torch())}
    found = FROD.change(replace(change, tensors={**change.tensors, **values}), own).weight
    assert found is not None
    assert float(found.norm() / own.weight.norm()) < 1e-6


def test_a_basis_of_other_signs_is_the_same_adapter() -> None:
    """Only where U belongs to the saved basis: peft 0.21 keeps the U of the one that it has made anew."""

    def flip(state: dict[str, torch.Tensor]) -> None:
        signs = torch.ones(12)
        signs[::2] = -1
        state["base_model.frod_V.tall"] *= signs
        rows, columns = state["base_model.frod_s_indices.tall"]
        state["base_model.model.tall.frod_lambda_s_values"] *= signs[rows] * signs[columns]

    one, other = adapter(), adapter(flip)
    own = one.own("tall")
    kept, flipped = (FROD.change(update(which, "tall"), own).weight for which in (one, other))
    assert kept is not None
    assert flipped is not None
    assert relative(kept, flipped) < 1e-6
    assert relative(one.effect("tall"), kept) < 2e-5
    assert relative(other.effect("tall"), flipped) > 0.1


def test_without_its_basis_or_its_base() -> None:
    one = adapter(save_projection=False)
    assert not [key for key in one.state if "frod_V" in key]
    FROD.check(update(one, "tall", projections=False))
    with pytest.raises(CannotRepresent, match=r"not saved.*save_projection=True"):
        FROD.change(update(one, "tall", projections=False), one.own("tall"))
    change = update(adapter(), "tall")
    with pytest.raises(CannotRepresent, match="--base-weights"):
        FROD.change(change)
    with pytest.raises(CannotRepresent, match="--base-weights"):
        FROD.delta(change)
    with pytest.raises(BrokenAdapter, match="another base"):
        FROD.change(change, Own(torch.ones(24, 13)))
    assert not FROD.is_nothing(change)
    assert FROD.error(change, change) == 0.0


def test_a_singular_basis_has_a_pseudo_inverse() -> None:
    change, own = update(adapter(), "tall"), adapter().own("tall")
    basis = torch.zeros(12, 12)
    basis[:6, :6] = torch.eye(6)
    values = {"V": lazy(basis), "lambda_l": lazy(torch.ones(12)), "lambda_s_values": lazy(torch.zeros(14))}
    found = FROD.change(replace(change, tensors={**change.tensors, **values}), own).weight
    assert found is not None
    unit = own.weight[:, :6] / own.weight[:, :6].norm(dim=0)
    torch.testing.assert_close(found + own.weight, torch.cat([unit, torch.zeros(24, 6)], dim=1))


@pytest.mark.parametrize(
    "name",
    [
        "dense",
        "output.dense",
        "layer.0.output.dense",
        "attention.output.dense",
        "output.attention.dense",
        "encoder.layer.0.attention.output.dense",
        "a.attention.self.query",
        "model.layers.3.self_attn.q_proj",
        "blocks.0",
    ],
)
def test_the_category_of_a_module(name: str) -> None:
    assert category(name) == _category_from_key(name)


@pytest.mark.parametrize(
    ("role", "tensor", "message"),
    [
        ("lambda_l", torch.ones(12, 1), "vector of numbers"),
        ("lambda_l", torch.ones(11), r"11 numbers; the basis of that module is \(11, 11\)"),
        ("lambda_s_values", torch.ones(14, 1), "vector of numbers"),
        ("lambda_s_values", torch.ones(13), "the 13 numbers"),
        ("V", torch.ones(144), "2 axes"),
        ("s_indices", torch.ones(2, 14), "positions are integers"),
        ("s_size", torch.ones(3, dtype=torch.int64), "a size of 2 numbers"),
        ("s_size", torch.tensor([12, 13]), r"\[12, 13\] is not \[12, 12\]"),
        ("s_indices", torch.full((2, 14), 12), "positions outside"),
        ("s_indices", torch.full((2, 14), -1), "positions outside"),
    ],
)
def test_tensors_that_do_not_belong_together(role: str, tensor: torch.Tensor, message: str) -> None:
    one = adapter()
    change = update(one, "tall")
    broken = replace(change, tensors={**change.tensors, role: lazy(tensor, role)})
    with pytest.raises(BrokenAdapter, match=message):
        [FROD.check(broken), FROD.change(broken, one.own("tall"))]


def test_half_an_update() -> None:
    change = update(adapter(), "tall")
    for role in change.tensors:
        with pytest.raises(BrokenAdapter, match=f"counterpart {role} is missing"):
            FROD.check(replace(change, tensors={k: t for k, t in change.tensors.items() if k != role}))
