"""Layers of peft on small modules, their tensors as updates, and what they compute."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import torch
from method_updates import update
from peft import PeftConfig, PeftType, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterops.adapter import Update
from adapterops.methods.base import Change, Method, Own


def randomise(model: nn.Module, names: str, spread: float = 0.3, centre: float = 0.0, seed: int = 0) -> None:
    """Numbers of about `spread` around `centre` in every parameter whose name holds `names`."""
    generator = torch.Generator().manual_seed(seed)
    found = [p for name, p in model.named_parameters() if names in name]
    assert found, names
    with torch.no_grad():
        for parameter in found:
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))


def wrapped(base: nn.Module, config: PeftConfig, spread: float = 0.3) -> Any:
    """A copy of the module under peft, in evaluation, with random numbers in the adapter."""
    setattr(config, "target_modules", {"0"})  # noqa: B010 (every config of a tuner has it)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(nn.Sequential(deepcopy(base)), config).eval()
    prefix = f"{PeftType(config.peft_type).value.lower()}_"
    randomise(model, prefix, spread)
    return model


def update_of(model: Any, method: str, prefix: str, **options: Any) -> Update:
    """What peft saves of the model's only module; the keys behind `prefix` are the roles."""
    tensors = {}
    for key, tensor in get_peft_model_state_dict(model).items():
        name = key.removeprefix("base_model.model.0.")
        assert name.startswith(prefix), key
        role = name.removeprefix(prefix).removesuffix(".weight")
        tensors["alphas" if role == "alpha" else role.removeprefix("R.")] = tensor
    return update(method, tensors, options=options)


def own_of(base: nn.Module) -> Own:
    weight = base.weight
    assert isinstance(weight, torch.Tensor)
    bias = base.bias if not isinstance(base, nn.Embedding) else None
    assert bias is None or isinstance(bias, torch.Tensor)
    turned = weight.detach().T if isinstance(base, Conv1D) else weight.detach()
    return Own(turned.clone(), None if bias is None else bias.detach().clone())


def changed(base: nn.Module, change: Change) -> nn.Module:
    """A copy of the module with the change added to its own parameters."""
    out = deepcopy(base)
    with torch.no_grad():
        if change.weight is not None:
            assert change.weight.dtype is torch.float32
            assert isinstance(out.weight, torch.Tensor)
            out.weight += change.weight.T if isinstance(base, Conv1D) else change.weight
        if change.bias is not None:
            assert change.bias.dtype is torch.float32
            assert isinstance(out.bias, torch.Tensor)
            out.bias += change.bias
    return out


def inputs_of(base: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    if isinstance(base, nn.Embedding):
        return torch.arange(base.num_embeddings).reshape(2, -1)
    if isinstance(base, nn.Conv2d | nn.Conv3d):
        return torch.randn(2, base.in_channels, *(6,) * len(base.kernel_size), generator=generator)
    weight = base.weight
    assert isinstance(weight, torch.Tensor)
    return torch.randn(2, 3, weight.shape[0 if isinstance(base, Conv1D) else 1], generator=generator)


def outputs_agree(method: Method, one: Update, base: nn.Module, model: Any, tolerance: float = 1e-5) -> None:
    """The module with the change does what peft's layer does, and peft's layer does something."""
    method.check(one)
    own = own_of(base)
    assert method.fits(one, tuple(own.weight.shape))
    inputs = inputs_of(base)
    with torch.no_grad():
        ours, wanted, before = changed(base, method.change(one, own))(inputs), model(inputs), base(inputs)
    effect = float((wanted - before).norm())
    assert effect > 1e-3 * float(before.norm())
    assert float((ours - wanted).norm()) < tolerance * max(effect, 0.1 * float(before.norm()))
