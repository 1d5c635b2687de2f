"""Models with stacked experts, and LoRA that peft puts on them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft_models as pm
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from adapterops.architectures import Architecture, Component
from adapterops.architectures.listing import list_modules, list_parameters

BOTH = ["experts.gate_up_proj", "experts.down_proj"]


class Experts(nn.Module):
    """Stacked experts, (E, out, in) or (E, in, out)."""

    def __init__(self, hidden: int, inner: int, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (hidden, 2 * inner), (inner, hidden)
        self.gate_up_proj = nn.Parameter(torch.zeros(3, *(up if is_transposed else up[::-1])))
        self.down_proj = nn.Parameter(torch.zeros(3, *(down if is_transposed else down[::-1])))

    def forward(self, x: Tensor) -> Tensor:
        order = "eti,eio->eto" if self.is_transposed else "eti,eoi->eto"
        hidden = torch.einsum(order, x.expand(3, -1, -1), self.gate_up_proj)
        hidden = hidden[..., ::2].tanh() * hidden[..., 1::2]
        return torch.einsum(order, hidden, self.down_proj).mean(0)


class Layer(nn.Module):
    def __init__(self, hidden: int = 6, inner: int = 10, is_transposed: bool = False) -> None:
        super().__init__()
        self.q_proj, self.experts = nn.Linear(hidden, hidden), Experts(hidden, inner, is_transposed)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(self.q_proj(x))


class Model(nn.Module):
    def __init__(self, **sizes: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(**sizes) for _ in range(2))
        self.config = {"model_type": "experts"}

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def model(**sizes: Any) -> nn.Module:
    return pm.fill(Model(**sizes), 7)


def qwen() -> nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, moe_intermediate_size=12, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
    )  # fmt: skip
    return pm.fill(Qwen3MoeForCausalLM(config), 7)


def base_of(base: nn.Module) -> Architecture:
    """As `--base` makes it."""
    modules = list_modules(base)
    bare = frozenset(name for name, _ in base.named_modules() if name not in modules)
    component = Component("model", modules, "tests.Model", {}, bare, parameters=list_parameters(base))
    return Architecture("custom", "custom", {"model": component}, builtin=False)


def tuned(base: nn.Module, folder: Path, **config: Any) -> tuple[Any, Path]:
    settings = LoraConfig(**{"r": 2, "lora_alpha": 5, "target_modules": [], **config})
    adapted = pm.trained(base, settings)
    return adapted, pm.saved(adapted, folder)


def loaded(base: nn.Module, folder: Path) -> nn.Module:
    """By peft itself.  It warns of patterns of ranks that it does apply to parameters, since it looks for modules."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*did not match any targeted module.*")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return PeftModel.from_pretrained(base, str(folder)).eval()
