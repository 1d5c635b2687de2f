"""Sound adapters for several base models, and the ways in which tests make loaders stumble over them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sound import Tensors, edit

import adapterops as ao
from adapterops import architectures

MODULES = {
    "sd1": (
        "unet",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
    ),
    "sdxl": ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.attentions.0.proj_in"),
    "sd3": ("transformer", "transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.ff.net.0.proj"),
    "sd35_medium": ("transformer", "transformer_blocks.0.attn2.to_out.0", "transformer_blocks.12.norm1.linear"),
    "flux": ("transformer", "transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.proj_out"),
    "qwen_image": ("transformer", "transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_k"),
    "chroma": ("transformer", "transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.proj_out"),
    "flux2_klein_4b": ("transformer", "transformer_blocks.0.attn.to_out.0", "single_transformer_blocks.0.attn.to_out"),
    "hunyuan_video": ("transformer", "transformer_blocks.19.attn.to_out.0", "single_transformer_blocks.39.proj_out"),
    "hunyuan_video_1_5": ("transformer", "transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2"),
    "ltx_2b": ("transformer", "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.0.proj"),
    "wan_1_3b": ("transformer", "blocks.0.attn1.to_q", "blocks.0.ffn.net.2"),
    "z_image": ("transformer", "layers.0.feed_forward.w1", "layers.1.feed_forward.w2"),
    "pixart_sigma": ("transformer", "transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.ff.net.2"),
}
"""For each base model a component and two modules that every spelling has whole."""
RANK = 4


def diffusers_lora(path: Path, arch: str, *more: str, alpha: float | None = None) -> Path:
    """A LoRA of rank 4 on the two modules (and on `more`), as diffusers saves it; with an alpha the header says it."""
    component, *modules = MODULES[arch]
    specs = architectures.load(arch).components[component].modules
    tensors: Tensors = {}
    for at, module in enumerate([*modules, *more]):
        generator = torch.Generator().manual_seed(at)
        out, inputs, *kernel = specs[module].shape
        ones = [1] * len(kernel)
        stem = f"{component}.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, inputs, *kernel, generator=generator) * 0.05
        tensors[f"{stem}.lora_B.weight"] = torch.randn(out, RANK, *ones, generator=generator) * 0.05
    strings = {"format": "pt"}
    if alpha is not None:
        names = sorted([*modules, *more])
        fields = {"r": RANK, "lora_alpha": alpha, "target_modules": names, "peft_type": "LORA"}
        strings["lora_adapter_metadata"] = json.dumps({f"{component}.{k}": v for k, v in fields.items()})
    save_file(tensors, path, strings)
    return path


def converted(tmp_path: Path, arch: str, to: str, *more: str, alpha: float | None = None) -> Path:
    """The same in another dialect."""
    source = diffusers_lora(tmp_path / "source.safetensors", arch, *more, alpha=alpha)
    out = tmp_path / ("folder" if to == "peft" else "lora.safetensors")
    ao.convert(source, to, out, arch=arch)
    source.unlink()
    return out


def with_method(path: Path, stem: str, suffixes: Mapping[str, tuple[int, ...]], alpha: float | None = None) -> Path:
    """A file with one more module, which has these tensors."""

    def add(tensors: Tensors) -> None:
        for at, (suffix, shape) in enumerate(suffixes.items()):
            values = torch.randn(shape, generator=torch.Generator().manual_seed(700 + at)) * 0.05
            tensors[f"{stem}{suffix}"] = values.to(torch.float16)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float16)

    return edit(path, add)


def renamed(path: Path, old: str, new: str) -> Path:
    """A file in which `old` is written `new` in every key."""
    return edit(path, lambda tensors: {key.replace(old, new): value for key, value in tensors.items()})


def mlx_folder(tmp_path: Path, layers: tuple[int, ...] = (2, 3), **config: Any) -> Path:
    """An adapter as mlx-lm saves it, for the last two of four layers; the path of its weights."""
    folder = tmp_path / "mlx"
    folder.mkdir()
    tensors: Tensors = {}
    for layer in layers:
        stem = f"model.layers.{layer}.self_attn.q_proj"
        tensors[f"{stem}.lora_a"] = torch.randn(64, 4, generator=torch.Generator().manual_seed(layer))
        tensors[f"{stem}.lora_b"] = torch.randn(4, 64, generator=torch.Generator().manual_seed(layer + 9))
    save_file(tensors, folder / "adapters.safetensors")
    fields = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return folder / "adapters.safetensors"


__all__ = ["converted", "diffusers_lora", "mlx_folder", "renamed", "with_method"]
