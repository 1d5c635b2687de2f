"""A model of small modules, adapted by peft, saved, loaded again, and asked what it does to each of them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from method_updates import lazy
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterops.adapter import Update
from adapterops.methods.base import Own
from adapterops.storage.tensor import LazyTensor

LINEAR = ("tall", "wide", "square", "conv1d")


class Model(nn.Module):
    """Modules of other shapes each, in an order that is not the alphabet's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(20, 12)
        self.tall = nn.Linear(12, 24)
        self.wide = nn.Linear(32, 8)
        self.conv1d = Conv1D(20, 16)  # 16 inputs
        self.square = nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Saved(NamedTuple):
    """The tensors of an adapter by the keys that peft saves them under, and the model that has loaded them."""

    state: dict[str, torch.Tensor]
    model: Any

    def layer(self, name: str) -> Any:
        return getattr(self.model.base_model.model, name)

    def own(self, name: str) -> Own:
        """The base's parameters of a module, a Conv1D's as (out, in)."""
        base = self.layer(name).get_base_layer()
        weight = base.weight.detach()
        return Own(weight.T if isinstance(base, Conv1D) else weight, getattr(base, "bias", None))

    def effect(self, name: str) -> torch.Tensor:
        """ΔW as the module's forward shows it."""
        layer = self.layer(name)
        base = layer.get_base_layer()
        with torch.no_grad():
            if isinstance(base, nn.Embedding):
                every = torch.arange(base.num_embeddings)
                return layer(every) - base(every)
            every = torch.eye(self.own(name).weight.shape[1])
            return (layer(every) - base(every)).T

    def tensors(self, prefix: str, name: str, whole: Mapping[str, str]) -> dict[str, LazyTensor]:
        """Roles and tensors of one module: its own keys behind `prefix`, and those of the whole model (key to role)."""
        start = f"base_model.model.{name}.{prefix}"
        own = {key.removeprefix(start): t for key, t in self.state.items() if key.startswith(start)}
        shared = {role: self.state[f"base_model.{key}"] for key, role in whole.items()}
        return {role: lazy(t, role) for role, t in (own | shared).items()}


def saved(kind: Any, edit: Any = None, **fields: Any) -> Saved:
    """The adapter of a config with random numbers in all that can be trained, saved and loaded into another model.

    `edit` may change the tensors before they are loaded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of each config that this tests
        config = kind(**fields)
        model = get_peft_model(Model(), copy.deepcopy(config))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter + torch.randn(parameter.shape, generator=generator))
        state = {key: t.detach().clone() for key, t in get_peft_model_state_dict(model).items()}
        if edit is not None:
            edit(state)
        again = get_peft_model(Model(), copy.deepcopy(config))
        result = set_peft_model_state_dict(again, dict(state))
    assert not result.unexpected_keys
    return Saved(state, again.eval())


def made(method: str, name: str, tensors: Mapping[str, LazyTensor], **options: Any) -> Update:
    """An update of a module."""
    return Update("model", name, method, dict(tensors), options=options)
