"""GraLoRA against peft's layers, with and without the LoRA beside it."""

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
from peft import GraloraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.gralora import Gralora

GRALORA = Gralora()
CASES = [{"gralora_k": 2}, {"gralora_k": 2, "hybrid_r": 3}, {"gralora_k": 4}, {"gralora_k": 1, "hybrid_r": 1}]
ALPHA = 6.0


def gralora(fields: dict[str, Any], layer: nn.Module | None = None, r: int = 4) -> Any:
    layer = nn.Linear(24, 20) if layer is None else layer
    return adapted(layer, GraloraConfig(r=r, alpha=int(ALPHA), **fields))


@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_it_does_what_pefts_layer_does(fields: dict[str, Any], kind: str) -> None:
    model = gralora(fields, Conv1D(20, 24) if kind == "Conv1D" else None)
    one = made("gralora", model, "gralora_", ALPHA)
    assert GRALORA.scale(one) == ALPHA / (4 + fields.get("hybrid_r", 0))
    change = check_forward(one, model, torch.randn(2, 3, 24, dtype=torch.double))
    torch.testing.assert_close(merged_change(model), change.double(), **TOLERANCE)


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_its_blocks_make_plain_factors(fields: dict[str, Any]) -> None:
    one = made("gralora", gralora(fields), "gralora_", ALPHA)
    check_low_rank(one)
    assert GRALORA.exact_rank(one) == 4 * fields["gralora_k"] + fields.get("hybrid_r", 0)
    # No fewer would do.
    assert torch.linalg.matrix_rank(GRALORA.delta(one).double(), rtol=1e-6) == GRALORA.exact_rank(one)


def test_no_factors_where_the_rank_is_not_below_the_sizes() -> None:
    one = made("gralora", gralora({"gralora_k": 4}, r=8), "gralora_", ALPHA)
    assert GRALORA.exact_rank(one) is None
    assert GRALORA.low_rank(one) is None
    torch.testing.assert_close(torch.tensor(GRALORA.norm(one)), GRALORA.delta(one).norm())


@pytest.mark.parametrize("fields", CASES[:2], ids=str)
def test_the_scale_can_be_folded(fields: dict[str, Any]) -> None:
    one = made("gralora", gralora(fields), "gralora_", ALPHA)
    tensors = {role: t.torch() for role, t in GRALORA.folded(one, None).items()}
    plain = update("gralora", tensors, float(GRALORA.rank(one)))
    assert GRALORA.error(one, plain) < 1e-12


def test_without_alpha_there_is_no_delta() -> None:
    one = made("gralora", gralora(CASES[0]), "gralora_")
    assert GRALORA.scale(one) is None
    for missing in (GRALORA.delta, GRALORA.matrix, GRALORA.norm):
        with pytest.raises(CannotRepresent, match=r"mid.to_q.*scale is unknown.*--alpha"):
            missing(one)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_types(dtype: torch.dtype) -> None:
    model = gralora(CASES[1])
    check_narrow(made("gralora", model, "gralora_", ALPHA), dtype, base_of(model))


@pytest.mark.parametrize("size", [1e-2, 1e-10])
def test_the_error_is_that_of_the_delta(size: float) -> None:
    one = made("gralora", gralora(CASES[0]), "gralora_", ALPHA)
    assert GRALORA.error(one, one) == 0.0
    assert 0.1 * size < GRALORA.error(one, perturbed(one, "B", size)) < 10 * size
    other = made("gralora", gralora(CASES[0]), "gralora_", ALPHA * (1 + size))
    assert GRALORA.error(one, other) == pytest.approx(size, rel=1e-4)


def test_nothing_is_a_second_factor_of_zeros() -> None:
    ones, zeros = torch.ones(2, 3, 4), torch.zeros(2, 4, 5)
    assert GRALORA.is_nothing(update("gralora", {"A": ones, "B": zeros}))
    general = {"A_general": torch.ones(1, 6), "B_general": torch.ones(10, 1)}
    assert not GRALORA.is_nothing(update("gralora", {"A": ones, "B": zeros, **general}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"A": (6, 4)}, "'x.A'.*three axes"),
        ({"B": (2, 4, 0)}, "'x.B'.*three axes"),
        ({"B": (3, 4, 5)}, "'x.B'.*3 blocks of rank 4.*2 of rank 4"),
        ({"B": (2, 6, 5)}, "'x.B'.*2 blocks of rank 6"),
        ({"A": (2, 3, 5), "B": (2, 5, 5)}, "'x.A'.*rank 5.*2 blocks"),
        ({"A_general": None}, "'x.A'.*A_general is missing"),
        ({"A_general": (1, 7)}, r"'x.A_general'.*\(hybrid_r, 6\)"),
        ({"B_general": (10, 2)}, r"'x.B_general'.*\[10, 1\]"),
    ],
    ids=str,
)
def test_shapes_that_no_gralora_has(changed: dict[str, tuple[int, ...] | None], message: str) -> None:
    shapes = {"A": (2, 3, 4), "B": (2, 4, 5), "A_general": (1, 6), "B_general": (10, 1), **changed}
    tensors = {role: torch.ones(shape) for role, shape in shapes.items() if shape is not None}
    with pytest.raises(BrokenAdapter, match=message):
        GRALORA.check(update("gralora", tensors))


def test_what_it_fits() -> None:
    one = update("gralora", {"A": torch.ones(2, 3, 4), "B": torch.ones(2, 4, 5)})
    assert [GRALORA.fits(one, s) for s in [(10, 6), (6, 10), (10, 6, 1, 1)]] == [True, False, False]
