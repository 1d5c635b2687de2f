"""Single layers that peft adapts, the updates that it saves for them, and what they do to an input."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from method_updates import update
from peft import PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from adapterops.adapter import Update
from adapterops.methods import METHODS
from adapterops.methods.base import Own

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


def adapted(layer: nn.Module, config: PeftConfig, seed: int = 0, deviation: float = 1.0) -> Any:
    """The layer with an adapter whose numbers are all drawn, those of the base too, in float64."""
    config.target_modules = {"layer"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(One(layer).double(), config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    return model


def saved(model: Any, prefix: str) -> dict[str, torch.Tensor]:
    """What peft saves for the layer, by role: the key behind the method's own prefix."""
    state = get_peft_model_state_dict(model)
    begin = f"base_model.model.layer.{prefix}"
    assert all(key.startswith(begin) for key in state), list(state)
    return {key.removeprefix(begin).removesuffix(".weight"): t.detach() for key, t in state.items()}


def base_of(model: Any) -> Own:
    """The base's own parameters, the weight as (out, in)."""
    base = model.base_model.model.layer.get_base_layer()
    weight = base.weight.detach().clone()
    bias = getattr(base, "bias", None)
    return Own(weight.T if isinstance(base, Conv1D) else weight, None if bias is None else bias.detach().clone())


def forward(model: Any, own: Own, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The base layer's output with another weight."""
    base = model.base_model.model.layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return F.embedding(x, weight)
    if weight.dim() > 2:
        run = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
        return run(x, weight, own.bias, base.stride, base.padding, base.dilation, base.groups)
    return F.linear(x, weight, own.bias)


def made(method: str, model: Any, prefix: str, alpha: float | None = None, **options: Any) -> Update:
    """The update that peft saved, checked."""
    one = update(method, saved(model, prefix), alpha, options=options)
    METHODS[method].check(one)
    return one


def check_forward(one: Update, model: Any, x: torch.Tensor) -> torch.Tensor:
    """Hold the change of weight against the outputs of peft's layer, and give it back."""
    own, method = base_of(model), METHODS[one.method]
    change = method.change(one, own)
    assert change.bias is None
    assert change.weight is not None
    assert change.weight.dtype == torch.float32
    assert change.weight.shape == own.weight.shape
    assert method.fits(one, tuple(own.weight.shape))
    with torch.no_grad():
        wanted = model(x)
    found = forward(model, own, own.weight + change.weight.double(), x)
    error = float((found - wanted).norm() / (wanted - forward(model, own, own.weight, x)).norm())
    assert error < 1e-5, error
    return change.weight


def merged_change(model: Any) -> torch.Tensor:
    """What peft's merge adds to the weight, as (out, in)."""
    own = base_of(model)
    model.base_model.model.layer.merge()
    after = base_of(model).weight
    return after - own.weight


def check_low_rank(one: Update) -> None:
    """Hold the factors against the delta: shapes, the stated rank, the product."""
    method = METHODS[one.method]
    found, delta = method.low_rank(one), method.delta(one).double()
    assert found is not None
    b, a = (factor.double() for factor in found)
    assert b.shape[1] == a.shape[0] == method.exact_rank(one)
    scale = method.scale(one) if method.scaled else 1.0
    assert scale is not None
    torch.testing.assert_close(b @ a * scale, delta.reshape(len(delta), -1), **TOLERANCE)
    assert method.weight_shape(one) == tuple(delta.shape)
    torch.testing.assert_close(torch.tensor(method.norm(one)).double(), delta.norm(), rtol=1e-5, atol=0)
    rows = method.matrix(one)
    torch.testing.assert_close(rows.dense().double(), delta.reshape(len(delta), -1), **TOLERANCE)


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]


def cast(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floats in another type."""
    return {role: t.to(dtype) if t.is_floating_point() else t for role, t in tensors.items()}


def check_narrow(one: Update, dtype: torch.dtype, own: Own | None = None) -> None:
    """An update in a narrow type does what the same numbers do in float64."""
    tensors = {role: t.torch() for role, t in one.tensors.items()}
    alpha = None if one.alpha is None else one.alpha.value
    narrow = cast(tensors, dtype)
    wide = cast(narrow, torch.float64)
    changes = [
        METHODS[one.method].change(update(one.method, t, alpha, options=one.options), own).weight
        for t in (narrow, wide)
    ]
    torch.testing.assert_close(*changes, **TOLERANCE)
