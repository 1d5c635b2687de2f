"""Files as trainers write them by default: their keys, shapes, types and headers, of real base models' modules.

Each function names the code that saves such a file.  Few modules stand for all; shapes are the base's own, as adapters
are recognised by them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Shape = tuple[int, int]
Modules = Mapping[str, Shape]
"""Names and the shapes of their weights."""

FLUX: Modules = {
    "transformer_blocks.0.attn.to_out.0": (3072, 3072),
    "transformer_blocks.18.ff.net.0.proj": (12288, 3072),
    "single_transformer_blocks.37.proj_out": (3072, 15360),
}
"""Modules of Flux.1 by diffusers' names: those that the authors' code base keeps apart, too."""
QWEN: Modules = {
    "transformer_blocks.0.attn.to_q": (3072, 3072),
    "transformer_blocks.0.attn.add_k_proj": (3072, 3072),
    "transformer_blocks.59.img_mlp.net.2": (3072, 12288),
}
"""Modules of Qwen-Image."""
CLIP: Modules = {
    "encoder.layers.0.self_attn.q_proj": (768, 768),
    "encoder.layers.11.mlp.fc1": (3072, 768),
}
"""Modules of CLIP ViT-L behind `text_model.`, which transformers 5 leaves out."""
WAN: Modules = {"blocks.0.self_attn.q": (5120, 5120), "blocks.39.ffn.2": (5120, 13824)}
"""Modules of Wan 2.1 14B by its authors' names."""

_numbers = torch.Generator()


def some(*shape: int, of: str = "") -> torch.Tensor:
    """Small random numbers; the same for the same shape and the same end of a module's name."""
    _numbers.manual_seed(crc32(".".join(of.split(".")[-4:]).encode()) + sum(shape))
    return (torch.randn(shape, generator=_numbers) / 8).to(torch.bfloat16)


def number(value: float) -> torch.Tensor:
    """An alpha, rounded to the factors' type as trainers do."""
    return torch.tensor(value, dtype=torch.bfloat16)


AB = (".lora_A.weight", ".lora_B.weight")
DOWN_UP = (".lora_down.weight", ".lora_up.weight")
DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")


def pairs(
    modules: Modules,
    prefix: str = "",
    ends: tuple[str, str] = AB,
    alpha: float | None = None,
    flat: bool = False,
    rank: int = 4,
) -> Tensors:
    """Two factors a module, and an alpha where there is one."""
    out: Tensors = {}
    for name, (rows, columns) in modules.items():
        stem = prefix + (name.replace(".", "_") if flat else name)
        out[stem + ends[0]], out[stem + ends[1]] = some(rank, columns, of=name), some(rows, rank, of=name)
        if alpha is not None:
            out[f"{stem}.alpha"] = number(alpha)
    return out


def comfy(modules: Modules) -> Tensors:
    """As Comfy reads it: ostris/ai-toolkit `extensions_built_in/diffusion_models/*` (`convert_lora_weights_before_save`),
    tdrussell/diffusion-pipe `models/base.py` (`ComfyPipeline.save_adapter`)."""
    return pairs(modules, "diffusion_model.")


def musubi(modules: Modules, rank: int = 4) -> Tensors:
    """kohya-ss/musubi-tuner `networks/lora.py` (and `lora_wan.py`, `lora_zimage.py`, `lora_flux_2.py` …)."""
    return pairs(modules, "lora_unet_", DOWN_UP, 1.0, flat=True, rank=rank)


def lokr(modules: Modules, prefix: str, factor: int, rank: int | None, alpha: float) -> Tensors:
    """LoKr: two whole factors, or the second one decomposed."""
    out: Tensors = {}
    for name, (rows, columns) in modules.items():
        stem = prefix + name
        out[f"{stem}.lokr_w1"], out[f"{stem}.alpha"] = some(factor, factor, of=name), number(alpha)
        if rank is None:
            out[f"{stem}.lokr_w2"] = some(rows // factor, columns // factor, of=name)
        else:
            out[f"{stem}.lokr_w2_a"] = some(rows // factor, rank, of=name)
            out[f"{stem}.lokr_w2_b"] = some(rank, columns // factor, of=name)
    return out


def loha(modules: Modules, prefix: str, alpha: float) -> Tensors:
    """LoHa of rank 4."""
    out: Tensors = {}
    for name, (rows, columns) in modules.items():
        for n in "12":
            out[f"{prefix}{name}.hada_w{n}_a"] = some(rows, 4, of=f"{name}{n}")
            out[f"{prefix}{name}.hada_w{n}_b"] = some(4, columns, of=f"{name}{n}")
        out[f"{prefix}{name}.alpha"] = number(alpha)
    return out


def ai_toolkit(path: Path, tensors: Tensors) -> Path:
    """The header of ostris/ai-toolkit `toolkit/metadata.py` (`get_meta_for_safetensors`, `add_model_hash_to_meta`)."""
    software = {"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit", "version": "0.1.0"}
    training = {"step": 2000, "epoch": 3}
    return write(
        path,
        tensors,
        format="pt",
        name="style",
        version="1.0",
        software=json.dumps(software),
        training_info=json.dumps(training),
        sshs_model_hash="ab",
        sshs_legacy_hash="cd",
    )


def write(path: Path, tensors: Tensors, **header: str) -> Path:
    """A safetensors file."""
    save_file(tensors, path, header or None)
    return path


def clip(prefix: str, beginning: str = "text_model.") -> dict[str, Shape]:
    """CLIP's modules under a prefix."""
    return {f"{prefix}{beginning}{name}": shape for name, shape in CLIP.items()}
