"""Layers that peft adapts, their own weights left as they were when peft looked at them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from block_layers import One, base_of, made
from peft import PeftConfig, get_peft_model
from torch import nn

from adapterops.adapter import Update
from adapterops.methods import METHODS
from adapterops.methods.base import Own

__all__ = ["base_of", "factors_agree", "made", "outputs_agree", "tuned"]


def tuned(layer: nn.Module, config: PeftConfig, part: str, dtype: torch.dtype = torch.float64) -> Any:
    """The layer with an adapter whose numbers are drawn: every parameter with `part` in its name."""
    config.target_modules = {"layer"}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(One(layer).to(dtype), config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name and parameter.is_floating_point():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def outputs_agree(one: Update, model: Any, own: Own) -> None:
    """Hold what the update adds to a linear layer's weight and bias against peft's forward."""
    method = METHODS[one.method]
    assert method.fits(one, tuple(own.weight.shape))
    change = method.change(one, own)
    x = torch.randn(7, own.weight.shape[1], generator=torch.Generator().manual_seed(2)).to(own.weight.dtype)
    with torch.no_grad():
        wanted = model(x) - model.base_model.model.layer.base_layer(x)
    found = torch.zeros_like(wanted)
    for part, added in ((x.double(), change.weight), (None, change.bias)):
        if added is not None:
            assert added.dtype == torch.float32
            found = found + (added.double() if part is None else part @ added.double().T)
    error = float((found - wanted).norm() / wanted.norm())
    assert error < 1e-5, error


def factors_agree(one: Update, own: Own) -> None:
    """Hold the factors that the base's weight makes exact against the change, which peft's forward was held against."""
    method = METHODS[one.method]
    found, change = method.low_rank_of(one, own), method.change(one, own)
    assert found is not None
    assert change.weight is not None
    assert change.bias is None
    b, a = found
    assert b.dtype == a.dtype == torch.float64
    torch.testing.assert_close((b @ a).float(), change.weight)
