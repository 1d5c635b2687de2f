"""Updates made of tensors in memory, and the errors that dense deltas show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from adapterops.adapter import Certainty, Fact, Update
from adapterops.storage import LazyTensor
from adapterops.storage.tensor import TORCH_NAMES, MemorySource

DTYPES = {getattr(torch, name): dtype for dtype, name in TORCH_NAMES.items()}


def lazy(values: torch.Tensor, key: str = "t") -> LazyTensor:
    kept = values.detach().contiguous()
    data = kept.reshape(-1).view(torch.uint8).numpy().tobytes() if kept.numel() else b""
    return LazyTensor(key, DTYPES[kept.dtype], tuple(kept.shape), MemorySource(data), 0)


def update(method: str, tensors: Mapping[str, torch.Tensor], alpha: float | None = None, **rest: Any) -> Update:
    fact: Fact[float | None] | None = None if alpha is None else Fact(alpha, Certainty.READ)
    made = {role: lazy(t, f"x.{role}") for role, t in tensors.items()}
    return Update("unet", "mid.to_q", method, made, fact, **rest)


def lycoris(method: str, module: torch.nn.Module, prefix: str = "", **rest: Any) -> Update:
    """What a module of lycoris-lora saves; its keys without `prefix` are the roles."""
    state = dict(module.state_dict())
    alpha, magnitude = state.pop("alpha"), state.pop("dora_scale", None)
    assert all(key.startswith(prefix) for key in state), state.keys()
    tensors = {key.removeprefix(prefix): t for key, t in state.items()}
    options = dict(rest.pop("options", {}))
    if magnitude is not None:
        tensors["magnitude"] = magnitude.reshape(-1)
        options["dora_axis"] = "out" if module.wd_on_out else "in"
    return update(method, tensors, float(alpha), options=options, **rest)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Numbers of about one everywhere, in float64: an untrained adapter does nothing."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def effect(module: Any, base: torch.nn.Module) -> torch.Tensor:
    """What a lycoris module adds to its base's weight in forward, which is what it was trained with.

    Its merges cannot stand here: those of LoHa and LoKr apply the scale twice in lycoris-lora 4.1.3.
    """
    with torch.no_grad():
        weight = module.get_weight(base.weight.shape) * module.scalar
    assert isinstance(weight, torch.Tensor)
    return weight.float()


def perturbed(one: Update, role: str, relative: float, seed: int = 1) -> Update:
    """The same update, one tensor of it off by `relative`."""
    values = one.tensors[role].torch().double()
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    noise *= relative * values.norm() / noise.norm()
    return replace(one, tensors={**one.tensors, role: lazy(values + noise)})


def doubled(one: Update) -> Update:
    """The same update with its tensors in float64."""
    return replace(one, tensors={role: lazy(t.torch().double()) for role, t in one.tensors.items()})


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one.double() - two.double()).norm() / one.double().norm())
