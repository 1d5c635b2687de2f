"""Adapters to merge: as large as real ones, seeded, and alike enough that electing signs and trimming mean something.

Adapters of one workload share 60 % of the variance of their factors, and the columns of B get smaller, as trained ones
do.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.lora import SEED
from benchmarks.sdxl import SDXL

_HIDDEN, _HEADS, _MLP = 4096, 1024, 14336
LLAMA = {
    "self_attn.q_proj": (_HIDDEN, _HIDDEN),
    "self_attn.k_proj": (_HEADS, _HIDDEN),
    "self_attn.v_proj": (_HEADS, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN),
    "mlp.gate_proj": (_MLP, _HIDDEN),
    "mlp.up_proj": (_MLP, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _MLP),
}
"""Llama-3-8B: a layer's linear modules and their (out_features, in_features)."""
RANK, ALPHA = 16, 32.0
_SHARED = 0.6
_SIZE, _DECAY = 0.01, -0.7

Shape = tuple[int, int]


def factors(name: str, shape: Shape, rank: int, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """B (out, rank) and A (rank, in), float32, of the adapter with that number; a part of them is the same in all."""
    out, inner = shape

    def draw(who: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.Generator(np.random.SFC64([SEED, zlib.crc32(name.encode()), who]))
        return random.standard_normal((out, rank), np.float32), random.standard_normal((rank, inner), np.float32)

    common, own = draw(0), draw(number + 1)
    b, a = (_SHARED**0.5 * c + (1 - _SHARED) ** 0.5 * o for c, o in zip(common, own, strict=True))
    decay = _SIZE * np.arange(1, rank + 1, dtype=np.float32) ** _DECAY
    return torch.from_numpy((b * decay).astype(np.float32)), torch.from_numpy((a / inner**0.5).astype(np.float32))


def peft_adapter(folder: Path, modules: Mapping[str, Shape], number: int, rank: int = RANK) -> Path:
    """A PEFT folder, bfloat16, alpha twice the rank; made where it is not there yet."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, shape in modules.items():
        b, a = factors(name, shape, rank, number)
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": ALPHA / RANK * rank, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "base_model_name_or_path": None, "task_type": None,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }  # fmt: skip
    # Last: a folder that has it is whole.
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def llama(folder: Path, layers: int, count: int) -> list[Path]:
    """Adapters for so many layers of Llama-3-8B."""
    modules = {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in LLAMA.items()}
    return [peft_adapter(folder / f"llama-{layers}-{SEED}" / f"a{k}", modules, k) for k in range(count)]


def alike(folder: Path, shape: Shape, copies: int, count: int, rank: int = RANK) -> list[Path]:
    """Adapters of so many modules of one shape."""
    modules = {f"layers.{n}.proj": shape for n in range(copies)}
    place = folder / f"alike-{shape[0]}x{shape[1]}-{copies}-r{rank}-{SEED}"
    return [peft_adapter(place / f"a{k}", modules, k, rank) for k in range(count)]


def sdxl(folder: Path, count: int) -> list[Path]:
    """Files of sd-scripts, as the workload of `scripts/bench convert`."""
    paths = []
    for number in range(count):
        path = folder / f"sdxl-merge-{number}-{SEED}.safetensors"
        if not path.exists():
            tensors = {}
            for module in SDXL.modules():
                b, a = factors(module.key, (module.shape[0], module.shape[1]), SDXL.lora.rank, number)
                tensors[f"{module.key}.lora_down.weight"] = a.to(SDXL.lora.dtype)
                tensors[f"{module.key}.lora_up.weight"] = b.to(SDXL.lora.dtype)
                tensors[f"{module.key}.alpha"] = torch.tensor(SDXL.lora.alpha, dtype=SDXL.lora.dtype)
            part = path.with_suffix(".part")
            header = {"ss_network_dim": str(SDXL.lora.rank), "ss_network_alpha": str(SDXL.lora.alpha)}
            save_file(tensors, part, {**header, **SDXL.lora.metadata})
            part.replace(path)
        paths.append(path)
    return paths
