"""HiRA against peft's layers: linear, Conv1D, convolutions, embeddings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from block_layers import DTYPES, TOLERANCE, adapted, base_of, check_forward, check_narrow, made, merged_change
from method_updates import lazy, perturbed, update
from peft import HiraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.hira import Hira

HIRA = Hira()
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(14, 10), (4, 5, 14)),
    "without bias": (lambda: nn.Linear(14, 10, bias=False), (4, 14)),
    "Conv1D": (lambda: Conv1D(10, 14), (4, 5, 14)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 9)),
    "conv1d 1": (lambda: nn.Conv1d(6, 8, 1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, (3, 2), stride=2), (2, 6, 7, 7)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(3, 4, (1, 2, 3), dilation=2), (1, 3, 7, 7, 7)),
}


def hira(layer: nn.Module, r: int = 3) -> Any:
    return adapted(layer, HiraConfig(r=r))


def embedding(model: Any) -> Update:
    return made("hira", model, "hira_embedding_", kind="embedding")


@pytest.mark.parametrize("kind", LAYERS)
def test_it_does_what_pefts_layer_does(kind: str) -> None:
    layer, sizes = LAYERS[kind]
    model = hira(layer())
    one = made("hira", model, "hira_")
    assert HIRA.rank(one) == 3
    change = check_forward(one, model, torch.randn(sizes, dtype=torch.double))
    torch.testing.assert_close(merged_change(model), change.double(), **TOLERANCE)


def test_embeddings() -> None:
    model = hira(nn.Embedding(12, 7))
    one = embedding(model)
    change = check_forward(one, model, torch.arange(12).reshape(3, 4))
    torch.testing.assert_close(merged_change(model), change.double(), **TOLERANCE)


def test_peft_cannot_run_flat_kernels_of_three_dimensions() -> None:
    """The maths is there all the same: that of a kernel of any other size."""
    model = hira(nn.Conv3d(3, 4, (1, 1, 2)))
    one, own = made("hira", model, "hira_"), base_of(model)
    with pytest.raises(RuntimeError, match="must match"):
        model(torch.randn(1, 3, 2, 2, 4, dtype=torch.double))
    b, a = (one.tensors[role].torch() for role in "BA")
    wanted = own.weight * torch.einsum("or,ri...->oi...", b.reshape(4, 3), a)
    torch.testing.assert_close(HIRA.change(one, own).weight, wanted.float())


def test_peft_leaves_the_rank_pattern_out_of_account() -> None:
    """So a config with one does not contradict tensors of rank r."""
    model = adapted(nn.Linear(14, 10), HiraConfig(r=3, rank_pattern={"layer": 2}))
    assert HIRA.rank(made("hira", model, "hira_")) == 3


def test_it_needs_the_base() -> None:
    one = made("hira", hira(nn.Linear(14, 10)), "hira_")
    assert HIRA.norm(one) is HIRA.exact_rank(one) is HIRA.low_rank(one) is HIRA.weight_shape(one) is None
    for missing in (HIRA.delta, HIRA.change):
        with pytest.raises(CannotRepresent, match=r"mid.to_q.*base.*weight.*--base-weights"):
            missing(one)
    with pytest.raises(BrokenAdapter, match=r"'x.[AB]'.*mid.to_q.*\[14, 10\].*another model"):
        HIRA.change(one, Own(torch.zeros(14, 10)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_types(dtype: torch.dtype) -> None:
    model = hira(nn.Conv2d(6, 8, 3))
    check_narrow(made("hira", model, "hira_"), dtype, base_of(model))


@pytest.mark.parametrize("size", [1e-2, 1e-10])
def test_the_error_is_that_of_the_product(size: float) -> None:
    one = made("hira", hira(nn.Linear(14, 10)), "hira_")
    assert HIRA.error(one, one) == 0.0
    assert 0.1 * size < HIRA.error(one, perturbed(one, "B", size)) < 10 * size
    moved = {"A": lazy(one.tensors["A"].torch() * 4), "B": lazy(one.tensors["B"].torch() / 4)}
    assert HIRA.error(one, replace(one, tensors=moved)) < 1e-12
    assert HIRA.error(one, made("hira", hira(nn.Linear(14, 9)), "hira_")) == float("inf")


def test_rows_stand_alone() -> None:
    model = hira(nn.Linear(14, 10))
    one, own = made("hira", model, "hira_"), base_of(model)
    part = replace(one, tensors=HIRA.take_rows(one, [(7, 10), (2, 4)]))
    HIRA.check(part)
    pick = [7, 8, 9, 2, 3]
    whole, taken = HIRA.change(one, own).weight, HIRA.change(part, Own(own.weight[pick])).weight
    assert whole is not None
    torch.testing.assert_close(taken, whole[pick])


def test_nothing_is_a_second_factor_of_zeros() -> None:
    assert HIRA.is_nothing(update("hira", {"A": torch.ones(2, 4), "B": torch.zeros(3, 2)}))
    assert not HIRA.is_nothing(update("hira", {"A": torch.ones(2, 4), "B": torch.ones(3, 2)}))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((3,), (10, 3), "'x.A'.*no low-rank factor"),
        ((3, 14), (10, 4), "'x.B'.*rank 4.*rank 3"),
        ((3, 14, 3, 3), (10, 3, 3, 3), "'x.B'.*1×1 kernel"),
    ],
)
def test_shapes_that_no_hira_has(a: tuple[int, ...], b: tuple[int, ...], message: str) -> None:
    with pytest.raises(BrokenAdapter, match=message):
        HIRA.check(update("hira", {"A": torch.ones(a), "B": torch.ones(b)}))
    with pytest.raises(BrokenAdapter, match="B is missing"):
        HIRA.check(update("hira", {"A": torch.ones(a)}))


def test_what_it_fits() -> None:
    linear = update("hira", {"A": torch.ones(3, 14), "B": torch.ones(10, 3)})
    conv = update("hira", {"A": torch.ones(3, 14, 3, 2), "B": torch.ones(10, 3, 1, 1)})
    embedding = replace(linear, options={"kind": "embedding"})
    shapes = [(10, 14), (14, 10), (10, 14, 3, 2), (10, 14, 2, 3)]
    assert [HIRA.fits(linear, s) for s in shapes] == [True, False, False, False]
    assert [HIRA.fits(conv, s) for s in shapes] == [False, False, True, False]
    assert [HIRA.fits(embedding, s) for s in shapes] == [False, True, False, False]
