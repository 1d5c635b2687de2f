"""What every method of PEFT is tested with: a small base, a config, and what must be said without it.

Each family's cases stand in a `zoo_*.py` beside this file, as `CASES`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import peft_models as pm
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from adapterops.methods.base import Own

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6]])


class Line(nn.Module):
    """Linear layers in a row; `other` is the neighbour that must stay alone."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.tall = nn.Linear(16, 24), nn.Linear(24, 32, bias=False)
        self.square, self.norm, self.other = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 16)
        self.config = {"model_type": "line", "tie_word_embeddings": False}

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.norm(self.square(self.tall(self.wide(x).tanh()).tanh()).tanh()))


class Image(nn.Module):
    """Convolutions of two kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point, self.other = nn.Conv2d(8, 12, 3), nn.Conv2d(12, 16, 1), nn.Conv2d(16, 4, 1)
        self.config = {"model_type": "image"}

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.point(self.conv(x).tanh()).tanh())


class Signal(nn.Module):
    """A 1-d convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv1d(8, 12, 3), nn.Conv1d(12, 4, 1)
        self.config = {"model_type": "signal"}

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(x).tanh())


class Volume(nn.Module):
    """A 3-d convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv3d(4, 6, 2), nn.Conv3d(6, 4, 1)
        self.config = {"model_type": "volume"}

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(x).tanh())


class Words(nn.Module):
    """An embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.other = nn.Embedding(20, 16), nn.Linear(16, 8)
        self.config = {"model_type": "words"}

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.words(x))


def made(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A base whose weights are noise, always the same."""
    return lambda: pm.fill(kind(), 7)


LINE, IMAGE, SIGNAL, VOLUME, WORDS = (made(kind) for kind in (Line, Image, Signal, Volume, Words))


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return pm.fill(LlamaForCausalLM(config), 7)


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return pm.fill(GPT2LMHeadModel(config), 7)


def ones(*shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.linspace(-1, 1, count).view(shape)


INPUTS: Mapping[Any, Tensor] = {
    LINE: ones(3, 16),
    IMAGE: ones(1, 8, 6, 6),
    SIGNAL: ones(1, 8, 9),
    VOLUME: ones(1, 4, 4, 4, 4),
    WORDS: TOKENS,
    llama: TOKENS,
    gpt2: TOKENS,
}


@dataclass(frozen=True)
class Case:
    """One adapter on one base.

    `said` are the `--set` fields without which the tensors alone do not tell what the adapter does, `assumed` those that
    may be assumed (peft's defaults) but are other here, `alpha` what `--alpha` says; `base_needed` tells that without the
    base's modules the config cannot be made again.  `alone` is False where no config can be made from the tensors, with a
    reason in `why`.  `change` is False where no change of the base's parameters does what the adapter does, `lora` where no
    LoRA does (a norm's parameters).
    """

    base: Callable[[], nn.Module]
    config: Any
    said: Mapping[str, Any] = field(default_factory=dict)
    assumed: Mapping[str, Any] = field(default_factory=dict)
    alpha: float | None = None
    base_needed: bool = False
    alone: bool = True
    why: str = ""
    change: bool = True
    lora: bool = True
    noise: float = 0.3
    tolerance: float = 1e-5
    shape: Callable[[nn.Module], None] = lambda model: None
    """Sets what may not be any number (a norm, a mask) after the noise."""

    def outputs(self, model: nn.Module) -> pm.Outputs:
        with torch.no_grad():
            out = model(INPUTS[self.base])
        return [out if isinstance(out, Tensor) else out[0]]

    def adapter(self, folder: Path) -> tuple[Any, Path]:
        """The adapted model, its every floating parameter noise, and the folder that peft writes."""
        base = self.base()
        untouched = {id(parameter) for parameter in base.parameters()}
        model = peft.get_peft_model(base, copy.deepcopy(self.config))
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if id(parameter) not in untouched and parameter.is_floating_point():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * self.noise)
        self.shape(model)
        return model.eval(), pm.saved(model, folder, save_embedding_layers=False)


def own(module: nn.Module) -> Own:
    """A module's parameters, (out, in) also where it keeps them the other way round."""
    weight = module.weight.detach()
    bias = getattr(module, "bias", None)
    return Own(weight.T if isinstance(module, Conv1D) else weight, None if bias is None else bias.detach())


def add(module: nn.Module, change: Any) -> None:
    """Change a base's module as an update says."""
    if change.weight is not None:
        weight = change.weight.T if isinstance(module, Conv1D) else change.weight
        module.weight.data += weight.reshape(module.weight.shape)
    if change.bias is not None:
        if module.bias is None:
            module.bias = nn.Parameter(torch.zeros(change.bias.shape))
        module.bias.data += change.bias
