"""Adapters with which nothing at all is wrong, and how tests break them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import adapterops as ao
from adapterops.validation.report import Report

Tensors = dict[str, torch.Tensor]

CARD = """---
base_model: meta-llama/Llama-3.2-1B
library_name: peft
license: apache-2.0
pipeline_tag: text-generation
tags:
- lora
- base_model:adapter:meta-llama/Llama-3.2-1B
---
# A sound adapter

Trained to be looked at.
"""
CONFIG: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "meta-llama/Llama-3.2-1B",
    "bias": "none",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q_proj", "v_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}


def _random(*shape: int, seed: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    seed[0] += 1
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed[0])) * 0.1).to(dtype)


def peft_folder(tmp_path: Path, layers: int = 2, name: str = "sound") -> Path:
    """A LoRA of rank 4 on q_proj and v_proj of a small Llama's layers, as peft 0.21 saves it, with a model card."""
    folder, seed = tmp_path / name, [0]
    folder.mkdir(parents=True)
    tensors: Tensors = {}
    for layer in range(layers):
        for module, out in (("q_proj", 64), ("v_proj", 32)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{stem}.lora_A.weight"] = _random(4, 64, seed=seed)
            tensors[f"{stem}.lora_B.weight"] = _random(out, 4, seed=seed)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG, indent=2, sort_keys=True))
    (folder / "README.md").write_text(CARD)
    return folder


_SD1 = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (320, 320),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
    "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_v": (640, 640),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0": (1280, 1280),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
}


def kohya_file(tmp_path: Path, name: str = "sound.safetensors") -> Path:
    """A LoRA of rank 4, alpha 2, on modules of Stable Diffusion 1.5, as sd-scripts saves it, hashes and all."""
    seed = [100]
    tensors: Tensors = {}
    for stem, (out, inputs) in _SD1.items():
        tensors[f"{stem}.alpha"] = torch.tensor(2.0, dtype=torch.float16)
        tensors[f"{stem}.lora_down.weight"] = _random(4, inputs, seed=seed, dtype=torch.float16)
        tensors[f"{stem}.lora_up.weight"] = _random(out, 4, seed=seed, dtype=torch.float16)
    metadata = {
        "ss_base_model_version": "sd_v1",
        "ss_network_alpha": "2.0",
        "ss_network_dim": "4",
        "ss_network_module": "networks.lora",
        "ss_output_name": "sound",
        "ss_v2": "False",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.title": "sound",
    }
    path = tmp_path / name
    save_file(tensors, path, metadata)
    return rehash(path)


def diffusers_file(tmp_path: Path, name: str = "pytorch_lora_weights.safetensors") -> Path:
    """A LoRA on the UNet of Stable Diffusion 1.5, as diffusers saves it today."""
    seed = [200]
    tensors: Tensors = {}
    for block, out in ((0, 320), (1, 640)):
        stem = f"unet.down_blocks.{block}.attentions.0.transformer_blocks.0.attn1.to_q"
        tensors[f"{stem}.lora_A.weight"] = _random(4, out, seed=seed)
        tensors[f"{stem}.lora_B.weight"] = _random(out, 4, seed=seed)
    path = tmp_path / name
    save_file(tensors, path, {"format": "pt"})
    return path


def load(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and the header's strings of a safetensors file, read by safetensors itself."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def edit(
    path: Path,
    tensors: Callable[[Tensors], Tensors | None] | None = None,
    metadata: Mapping[str, str | None] | None = None,
    hashes: bool = True,
) -> Path:
    """Change a safetensors file (or the one in a PEFT folder): its tensors by a function, entries of its header (None: out).

    Hashes that the header holds are made right again unless `hashes` is false.
    """
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    values, strings = load(file)
    if tensors is not None:
        changed = tensors(values)
        values = values if changed is None else changed
    for key, value in (metadata or {}).items():
        if value is None:
            strings.pop(key, None)
        else:
            strings[key] = value
    save_file({key: t.contiguous() for key, t in values.items()}, file, strings)
    if hashes and "sshs_model_hash" in strings:
        rehash(file)
    return path


def set_config(folder: Path, *, remove: tuple[str, ...] = (), **fields: Any) -> Path:
    """Change fields of a PEFT folder's config."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}, indent=2, sort_keys=True))
    return folder


def rehash(path: Path) -> Path:
    """Write the hash of the bytes behind the header into it, as sd-scripts does (`library/train_util.py`)."""
    values, strings = load(path)
    raw = path.read_bytes()
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    save_file(values, path, strings | {"sshs_model_hash": hashlib.sha256(body).hexdigest()})
    return path


def codes(path: Path | str, **options: Any) -> list[str]:
    """The codes of all that validation finds, one a finding."""
    return [finding.code for finding in found(path, **options)]


def found(path: Path | str, **options: Any) -> Report:
    """What validation finds."""
    return ao.validate(path, **options)
