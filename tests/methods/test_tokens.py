"""Trained rows of an embedding against peft's layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from block_layers import base_of, made
from odd_layers import tuned
from peft import TrainableTokensConfig
from torch import nn

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.saved import TrainableTokens

TOKENS = TrainableTokens()


def tokens(indices: list[int], dtype: torch.dtype = torch.float64) -> tuple[Update, Any]:
    model = tuned(nn.Embedding(16, 8), TrainableTokensConfig(token_indices=indices), "trainable_tokens_delta", dtype)
    return made("trainable_tokens", model, "trainable_tokens_", indices=indices), model


@pytest.mark.parametrize("indices", [[3], [5, 1, 15, 0]])
def test_the_change_is_pefts(indices: list[int]) -> None:
    one, model = tokens(indices)
    own = base_of(model)
    change = TOKENS.change(one, own)
    assert change.bias is None
    assert change.weight is not None
    assert change.weight.dtype == torch.float32
    assert change.weight.any(dim=1).nonzero().reshape(-1).tolist() == sorted(indices)
    with torch.no_grad():
        wanted = model(torch.arange(16))
    torch.testing.assert_close((own.weight + change.weight.double()), wanted, rtol=1e-5, atol=1e-6)


def test_a_narrow_embedding() -> None:
    one, model = tokens([2, 7], torch.bfloat16)
    own = base_of(model)
    change = TOKENS.change(one, own).weight
    assert change is not None
    with torch.no_grad():
        torch.testing.assert_close((own.weight.float() + change).bfloat16(), model(torch.arange(16)))


def test_what_is_missing_is_named() -> None:
    one, model = tokens([2, 7])
    own = base_of(model)
    with pytest.raises(CannotRepresent, match="base weight"):
        TOKENS.delta(one)
    with pytest.raises(CannotRepresent, match="--base-weights"):
        TOKENS.change(one)
    with pytest.raises(CannotRepresent, match="--set token_indices"):
        TOKENS.change(replace(one, options={}), own)
    for weight in (own.weight[:7], own.weight[:, :4], own.weight.reshape(-1)):
        with pytest.raises(BrokenAdapter, match=r"x.delta.*another model's"):
            TOKENS.change(one, Own(weight))


@pytest.mark.parametrize(
    ("indices", "said"), [([1], "lists 1 tokens"), ([4, 4], "a token twice"), ([-1, 3], "negative one")]
)
def test_indices_that_cannot_be(indices: list[int], said: str) -> None:
    one, _ = tokens([2, 7])
    with pytest.raises(BrokenAdapter, match=said):
        TOKENS.check(replace(one, options={"indices": indices}))
    TOKENS.check(replace(one, options={}))
