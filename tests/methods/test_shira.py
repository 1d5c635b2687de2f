"""SHiRA against peft's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_layers import DTYPES, TOLERANCE, adapted, base_of, check_forward, check_narrow, made, merged_change
from method_updates import perturbed, update
from peft import ShiraConfig
from torch import nn

from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.shira import Shira

SHIRA = Shira()


def shira(r: int = 2, **fields: Any) -> Any:
    return adapted(nn.Linear(14, 10), ShiraConfig(r=r, random_seed=3, **fields))


def pair(places: list[tuple[int, int]], numbers: list[float]) -> dict[str, torch.Tensor]:
    return {"weight": torch.tensor(numbers), "indices": torch.tensor(places, dtype=torch.int32).T}


@pytest.mark.parametrize("r", [1, 2, 5])
def test_it_does_what_pefts_layer_does(r: int) -> None:
    model = shira(r)
    one = made("shira", model, "shira_", shape=(10, 14))
    assert one.tensors["indices"].shape == (2, 24 * r)
    assert SHIRA.budget(one) == r
    change = check_forward(one, model, torch.randn(4, 5, 14, dtype=torch.double))
    torch.testing.assert_close(merged_change(model), change.double(), **TOLERANCE)
    torch.testing.assert_close(SHIRA.delta(one), change)
    torch.testing.assert_close(torch.tensor(SHIRA.norm(one)), change.norm())
    assert int((change != 0).sum()) == 24 * r


def test_a_mask_of_ones_own() -> None:
    with pytest.warns(UserWarning, match="not recognized"):
        config = ShiraConfig(r=1, mask_type="corner")

    def corner(base: nn.Linear, r: int, **_: Any) -> torch.Tensor:
        mask = torch.zeros(base.weight.shape)
        mask[:4, :6] = 1
        return mask

    config.mask_fn = corner
    model = adapted(nn.Linear(14, 10), config)
    change = check_forward(made("shira", model, "shira_"), model, torch.randn(3, 14, dtype=torch.double))
    assert change[:4, :6].all()
    assert int((change != 0).sum()) == 24


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32], ids=str)
def test_places_in_the_types_that_files_have(dtype: torch.dtype) -> None:
    """peft saves float32 on Windows."""
    one = made("shira", shira(), "shira_", shape=(10, 14))
    tensors = {role: t.torch() for role, t in one.tensors.items()}
    other = update("shira", {**tensors, "indices": tensors["indices"].to(dtype)}, options={"shape": (10, 14)})
    SHIRA.check(other)
    assert SHIRA.error(one, other) == 0.0
    torch.testing.assert_close(SHIRA.delta(one), SHIRA.delta(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_types(dtype: torch.dtype) -> None:
    model = shira()
    check_narrow(made("shira", model, "shira_"), dtype, base_of(model))


def test_numbers_at_one_place_add_up() -> None:
    """As in torch's sparse tensors, which peft adds to the weight."""
    one = update("shira", pair([(0, 1), (2, 0), (0, 1)], [1.0, 2.0, 4.0]), options={"shape": (3, 3)})
    indices, weight = (one.tensors[role].torch() for role in ("indices", "weight"))
    torch.testing.assert_close(
        SHIRA._dense(one, (3, 3)), torch.sparse_coo_tensor(indices, weight, (3, 3), check_invariants=True).to_dense()
    )
    other = update("shira", pair([(2, 0), (0, 1)], [2.0, 5.0]))
    assert SHIRA.error(one, other) == 0.0
    assert SHIRA.norm(one) == pytest.approx(29**0.5)


@pytest.mark.parametrize("size", [1e-2, 1e-10])
def test_the_error_is_that_of_the_delta(size: float) -> None:
    one = made("shira", shira(), "shira_")
    assert SHIRA.error(one, perturbed(one, "weight", size)) == pytest.approx(size, rel=1e-4)


def test_other_places_are_another_delta() -> None:
    one, two = update("shira", pair([(0, 1)], [3.0])), update("shira", pair([(1, 0)], [4.0]))
    assert SHIRA.error(one, two) == pytest.approx(5 / 3)


def test_the_shape_has_to_be_known() -> None:
    one = made("shira", shira(), "shira_")
    assert SHIRA.weight_shape(one) is None
    for missing in (SHIRA.delta, SHIRA.change, SHIRA.budget):
        with pytest.raises(CannotRepresent, match=r"mid.to_q.*--arch NAME, --base CONFIG"):
            missing(one)


def test_nothing_is_numbers_of_zero() -> None:
    assert SHIRA.is_nothing(update("shira", pair([(0, 1)], [0.0])))
    assert not SHIRA.is_nothing(update("shira", pair([(0, 0)], [1.0])))


def test_bases_that_it_does_not_belong_to() -> None:
    one = made("shira", shira(), "shira_")
    with pytest.raises(BrokenAdapter, match=r"'x.weight'.*48 numbers.*mid.to_q.*\[10, 15\].*another base"):
        SHIRA.change(one, Own(torch.zeros(10, 15)))
    with pytest.raises(BrokenAdapter, match=r"'x.indices'.*outside of mid.to_q.*\[14, 10\]"):
        SHIRA.change(one, Own(torch.zeros(14, 10)))
    with pytest.raises(BrokenAdapter, match=r"'x.weight'.*48 numbers"):
        SHIRA.check(made("shira", shira(), "shira_", shape=(12, 13)))


@pytest.mark.parametrize(
    ("weight", "indices", "message"),
    [
        ((4, 2), (2, 8), r"'x.weight'.*\[4, 2\]"),
        ((4,), (2, 5), r"'x.indices'.*\[2, 4\]"),
        ((4,), (4, 2), r"'x.indices'.*\[2, 4\]"),
    ],
)
def test_shapes_that_no_shira_has(weight: tuple[int, ...], indices: tuple[int, ...], message: str) -> None:
    with pytest.raises(BrokenAdapter, match=message):
        SHIRA.check(update("shira", {"weight": torch.ones(weight), "indices": torch.ones(indices, dtype=torch.int32)}))


def test_places_that_are_none() -> None:
    cut = {"weight": torch.ones(2), "indices": torch.ones(2, 2).half()}
    with pytest.raises(BrokenAdapter, match=r"'x.indices'.*F16.*cast"):
        SHIRA.check(update("shira", cut))
    for place in (-1.0, 0.5):
        broken = {"weight": torch.ones(2), "indices": torch.tensor([[0.0, place], [0, 1]])}
        with pytest.raises(BrokenAdapter, match=r"'x.indices'.*whole numbers"):
            SHIRA.norm(update("shira", broken))
    with pytest.raises(BrokenAdapter, match="indices is missing"):
        SHIRA.check(update("shira", {"weight": torch.ones(2)}))
