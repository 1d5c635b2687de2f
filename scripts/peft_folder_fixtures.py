"""PEFT's folders among the fixtures: its own `save_pretrained` of tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fixture_tools import fill, settle, values
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)


class SmallNet(nn.Module):
    """A base that no library knows, with every kind of layer that LoRA adapts."""

    __module__ = "__main__"  # peft records where a model's class stands: in a script, as people's own do

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.conv1 = nn.Conv1d(16, 24, 3)
        self.conv2 = nn.Conv2d(24, 32, (3, 5))
        self.conv3 = nn.Conv3d(32, 16, 2)
        self.linear = nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)


class Base(NamedTuple):
    """A tiny model of a class."""

    build: Callable[[Any], PreTrainedModel]
    config: PretrainedConfig
    architecture: str


LLAMA = Base(
    LlamaForCausalLM,
    LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    ),
    "LlamaForCausalLM",
)
BERT = Base(
    BertForSequenceClassification,
    BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    ),
    "BertForSequenceClassification",
)
GPT2 = Base(
    GPT2LMHeadModel,
    GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
    "GPT2LMHeadModel",
)
BASES = {"llama": LLAMA, "bert": BERT, "gpt2": GPT2}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
FOLDERS: dict[str, tuple[Base, dict[str, Any]]] = {
    "peft-llama": (
        LLAMA,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": PROJECTIONS,
            "rank_pattern": {"layers.0.mlp.down_proj": 2, "k_proj": 6},
            "alpha_pattern": {"layers.0.mlp.down_proj": 3, "layers.1.self_attn.q_proj": 16},
        },
    ),
    "peft-rslora-bias": (
        LLAMA,
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "use_rslora": True, "lora_bias": True},
    ),
    "peft-trainable-tokens": (
        LLAMA,
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["gate_proj"],
            "trainable_token_indices": {"embed_tokens": [3, 64, 127]},
        },
    ),
    "peft-dora": (LLAMA, {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "peft-bert-classifier": (
        BERT,
        {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    ),
    "peft-gpt2-bin": (
        GPT2,
        {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
}
"""The folders of language models, and the fields of their configs."""


def tiny(build: Callable[[Any], PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    model = build(config)
    fill(model)
    return model


def save_peft(folder: Path, model: nn.Module, config: LoraConfig, *, safe: bool = True) -> None:
    """get_peft_model and save_pretrained; without the model card, which is prose."""
    wrapped: PeftModel = get_peft_model(model, config)
    fill(wrapped, only="lora_")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_magnitude" in name:  # its start is the norm of the base weight; training moves it
                parameter.mul_(1 + values(parameter.shape, name, 0.1))
            if "modules_to_save" in name or "token_adapter" in name or name.endswith(("lora_A", "lora_B")):
                parameter.copy_(values(parameter.shape, name))
    wrapped.save_pretrained(folder, safe_serialization=safe, save_embedding_layers=False)
    (folder / "README.md").unlink()
    if safe:
        settle(folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text())
    for key in ("target_modules", "modules_to_save"):  # sets, written in a new order every time
        if isinstance(fields[key], list):
            fields[key].sort()
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def peft_folders(folder: Path) -> None:
    for name, base in BASES.items():
        base.config.architectures = [base.architecture]
        (folder / "bases" / name).mkdir(parents=True)
        (folder / "bases" / name / "config.json").write_text(base.config.to_json_string())
    for name, (base, fields) in FOLDERS.items():
        task = "SEQ_CLS" if base is BERT else "CAUSAL_LM"
        save_peft(
            folder / name, tiny(base.build, base.config), LoraConfig(task_type=task, **fields), safe="-bin" not in name
        )
    net = SmallNet()
    fill(net)
    targets = ["embed", "conv1", "conv2", "conv3", "linear"]
    save_peft(
        folder / "peft-embedding-conv",
        net,
        LoraConfig(r=3, lora_alpha=5, target_modules=targets, modules_to_save=["head"]),
    )
