"""What `bench validate` looks at: many small adapters, and a few large ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.lora import SEED

KINDS = ("peft", "kohya", "diffusers")
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_RANK, _WIDTH = 64, 4096
LARGEST = 4 * _RANK * _WIDTH
"""Bytes of the largest tensor of the large ones."""
_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
_BLOCKS = (
    *(f"down_blocks.{block}.attentions.{at}" for block in range(3) for at in range(2)),
    *(f"up_blocks.{block}.attentions.{at}" for block in range(1, 4) for at in range(3)),
    "mid_block.attentions.0",
)
_WIDTHS = {"down_blocks.0": 320, "down_blocks.1": 640, "down_blocks.2": 1280, "up_blocks.1": 1280, "up_blocks.2": 640,
           "up_blocks.3": 320, "mid_block.": 1280}  # fmt: skip


def small(folder: Path, count: int) -> list[Path]:
    """That many adapters of 50 to 150 keys and rank 4 to 8: PEFT folders, and files of sd-scripts and of diffusers, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    random = torch.Generator().manual_seed(SEED)
    noise = torch.randn(1 << 14, generator=random) * 0.05
    return [_small(folder, at, noise) for at in range(count)]


def _small(folder: Path, at: int, noise: torch.Tensor) -> Path:
    kind, rank = KINDS[at % len(KINDS)], (4, 6, 8)[at // len(KINDS) % 3]
    modules = 25 + at * 7 % (26 if kind == "kohya" else 40)

    def made(rows: int, columns: int, module: int) -> torch.Tensor:
        start = (at * 131 + module * 17) % 4096
        return noise.roll(start)[: rows * columns].reshape(rows, columns).contiguous()

    if kind == "peft":
        path = folder / f"{at:04}-peft"
        path.mkdir(exist_ok=True)
        tensors = {}
        for module in range(modules):
            stem = f"base_model.model.model.layers.{module // 4}.self_attn.{_NAMES[module % 4]}"
            tensors[f"{stem}.lora_A.weight"] = made(rank, 256, module)
            tensors[f"{stem}.lora_B.weight"] = made(256, rank, module + 1)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(_config(rank)))
        return path
    path = folder / f"{at:04}-{kind}.safetensors"
    names = [f"{block}.transformer_blocks.0.attn{n}.to_{p}" for block in _BLOCKS for n in (1, 2) for p in "qv"]
    tensors, metadata = {}, {"format": "pt"}
    for module, name in enumerate(names[:modules]):
        width = next(width for start, width in _WIDTHS.items() if name.startswith(start))
        inputs = 768 if "attn2.to_v" in name else width
        down, up = made(rank, inputs, module), made(width, rank, module + 1)
        if kind == "kohya":
            stem = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": down.half(), f"{stem}.lora_up.weight": up.half()}
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank), dtype=torch.float16)
        else:
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    if kind == "kohya":
        metadata = {"ss_network_dim": str(rank), "ss_network_alpha": f"{rank}.0", "ss_base_model_version": "sd_v1"}
    save_file(tensors, path, metadata)
    return path


def _config(rank: int) -> dict[str, object]:
    return {
        "base_model_name_or_path": "meta-llama/Llama-3.2-1B",
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(_NAMES),
        "task_type": "CAUSAL_LM",
    }


def large(folder: Path, megabytes: int) -> list[Path]:
    """A PEFT adapter of Llama-3-8B's attention a type, of about that many MB each."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_large(folder / f"{name}.safetensors", dtype, megabytes) for name, dtype in DTYPES.items()]


def _large(path: Path, dtype: torch.dtype, megabytes: int) -> Path:
    random = torch.Generator().manual_seed(SEED)
    tensors: dict[str, torch.Tensor] = {}
    size = layer = 0
    while size < megabytes * 1_000_000:
        for name in _NAMES:
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{stem}.lora_A.weight"] = (torch.randn(_RANK, _WIDTH, generator=random) * 0.02).to(dtype)
            tensors[f"{stem}.lora_B.weight"] = (torch.randn(_WIDTH, _RANK, generator=random) * 0.01).to(dtype)
        size = sum(t.nbytes for t in tensors.values())
        layer += 1
    save_file(tensors, path, {"format": "pt"})
    return path
