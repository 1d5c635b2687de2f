"""A tiny language model, and what peft saves for it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM


def llama() -> LlamaForCausalLM:
    """Two layers of width 32, four heads, two of them for keys and values."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            use_cache=False,
        )
    )


def adapted(config: PeftConfig, draw: bool = False) -> Any:
    """The tiny model with an adapter; `draw` fills what is trained with numbers of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(llama(), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if draw and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def saved_by_peft(config: PeftConfig) -> dict[str, torch.Tensor]:
    """The tensors that peft writes, under its keys."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {key: t.detach() for key, t in get_peft_model_state_dict(adapted(config)).items()}
