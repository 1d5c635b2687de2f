"""Small adapter files, and a reader of them that owes adapterops nothing.

Formulas from peft `tuners/lora/layer.py` and LyCORIS `lycoris/functional`; names of Kohya's files from kohya-ss/sd-scripts
`networks/lora.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

Array = npt.NDArray[np.float64]
Tensors = dict[str, torch.Tensor]

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
"""A linear layer (320, 320) of SD 1.x in Kohya's spelling."""
OUT = Q.replace("_to_q", "_to_out_0")
"""Like `Q`, with a bias."""
CONV = "lora_unet_conv_in"
"""A convolution (320, 4, 3, 3) of it."""
NORM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1"
"""A norm (320,) of it."""
DOTTED = {
    Q: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    OUT: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0",
    CONV: "conv_in",
    NORM: "down_blocks.0.attentions.0.transformer_blocks.0.norm1",
}


class Numbers:
    """Seeded random tensors."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self._generator, self._dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=self._generator) / 2).to(self._dtype)


def lora(seed: int, stem: str = Q, rank: int = 4, alpha: float = 2.0, sizes: tuple[int, int] = (320, 320)) -> Tensors:
    """A LoRA on a linear layer in Kohya's names."""
    numbers = Numbers(seed)
    return {
        f"{stem}.lora_down.weight": numbers(rank, sizes[1]),
        f"{stem}.lora_up.weight": numbers(sizes[0], rank),
        f"{stem}.alpha": torch.tensor(alpha),
    }


def file(
    path: Path, *groups: Tensors, metadata: dict[str, str] | None = None, dtype: torch.dtype | None = None
) -> Path:
    """A safetensors file of all tensors."""
    tensors = {key: t for group in groups for key, t in group.items()}
    if dtype is not None:
        tensors = {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata)
    return path


def peft(folder: Path, tensors: Tensors, alpha: float = 8, dtype: torch.dtype | None = None, **config: Any) -> Path:
    """A PEFT folder; the keys are given without `base_model.model.`, and every LoRA has the rank of the first."""
    rank = next((len(t) for key, t in tensors.items() if re.search(r"lora(_embedding)?_A", key)), 8)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **config}
    file(
        folder / "adapter_model.safetensors",
        {f"base_model.model.{key}": t for key, t in tensors.items()},
        dtype=dtype,
    )
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return folder


def pair(seed: int, module: str = "l.0.q", rank: int = 4, sizes: tuple[int, int] = (12, 10)) -> Tensors:
    """A LoRA on a linear layer in peft's names."""
    numbers = Numbers(seed)
    return {f"{module}.lora_A.weight": numbers(rank, sizes[1]), f"{module}.lora_B.weight": numbers(sizes[0], rank)}


_ROLE = re.compile(
    r"\.(lora_(?:down|up|mid|A|B)\.weight|lora_(?:embedding_[AB])|lora_B\.bias|lora_magnitude_vector(?:\.weight)?|alpha|"
    r"dora_scale|hada_\w+|lokr_\w+|diff_b|diff|w_norm|b_norm|on_input|bias_(?:indices|values|size)|ia3_l|weight|bias|"
    r"token_adapter\.trainable_tokens_delta)$"
)
_SAME = {
    "lora_A.weight": "down", "lora_B.weight": "up", "lora_down.weight": "down", "lora_up.weight": "up",
    "lora_mid.weight": "mid", "lora_embedding_A": "down", "lora_embedding_B": "up", "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude", "dora_scale": "magnitude", "lora_B.bias": "lora_bias",
    "token_adapter.trainable_tokens_delta": "tokens",
}  # fmt: skip


def weights_of(path: Path) -> Path:
    """The safetensors file of a file or a PEFT folder."""
    return path / "adapter_model.safetensors" if path.is_dir() else path


def header(path: Path) -> dict[str, str]:
    """A file's metadata."""
    with safe_open(weights_of(path), "pt") as opened:
        return dict(opened.metadata() or {})


def read(path: Path) -> dict[str, dict[str, Array]]:
    """Module, as spelled, to role to numbers in float64; `scale` is the LoRA's of a PEFT config."""
    out: dict[str, dict[str, Array]] = {}
    for key, tensor in load_file(weights_of(path)).items():
        match = _ROLE.search(key)
        assert match, key
        module = key[: match.start()].removeprefix("base_model.model.")
        out.setdefault(module, {})[_SAME.get(match[1], match[1])] = tensor.double().numpy()
    for module, got in out.items():
        component = "" if path.is_dir() else module.partition(".")[0]
        config = _config(path, component)
        if config and "down" in got:
            name = module.removeprefix(f"{component}.")
            got["scale"] = np.asarray(_scale(config, name, len(got["down"])))
    return out


def _config(path: Path, component: str) -> dict[str, Any]:
    """The PEFT config beside the weights, or a component's in the header of diffusers' files."""
    if path.is_dir():
        config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
        return config
    stated = json.loads(header(path).get("lora_adapter_metadata", "{}"))
    return {k.removeprefix(f"{component}."): v for k, v in stated.items() if k.startswith(f"{component}.")}


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    def looked_up(name: str, usual: float) -> float:
        found = [v for k, v in (config.get(name) or {}).items() if re.match(rf"(.*\.)?({k})$", module)]
        return float(found[0]) if found else usual

    assert looked_up("rank_pattern", config["r"]) == rank, module
    alpha = looked_up("alpha_pattern", config["lora_alpha"])
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def delta(got: Mapping[str, Array]) -> Array:
    """ΔW of a module as a matrix (out, everything else); an embedding's is (dim, tokens)."""
    out: Array
    if "down" in got:
        rank = got["up"].shape[1]
        scale = got["scale"] if "scale" in got else got.get("alpha", rank) / rank
        up, down = got["up"].reshape(len(got["up"]), -1), got["down"]
        if "mid" in got:
            core = np.einsum("or,rs...->os...", up, got["mid"])
            out = np.einsum("os...,si->oi...", core, down.reshape(len(down), -1)).reshape(len(up), -1) * scale
        else:
            out = up @ down.reshape(len(down), -1) * scale
    elif "hada_w1_a" in got:
        rank = got["hada_w1_b"].shape[0]
        product = (got["hada_w1_a"] @ got["hada_w1_b"]) * (got["hada_w2_a"] @ got["hada_w2_b"])
        out = product * (got["alpha"] / rank)
    elif "lokr_w2" in got or "lokr_w2_a" in got:
        halves, rank = [], None
        for n in "12":
            if f"lokr_w{n}" in got:
                halves.append(got[f"lokr_w{n}"])
            else:
                rank = got[f"lokr_w{n}_b"].shape[0]
                halves.append(got[f"lokr_w{n}_a"] @ got[f"lokr_w{n}_b"])
        out = np.kron(*halves) * (1.0 if rank is None else got["alpha"] / rank)
    else:
        out = got["diff"].reshape(len(got["diff"]), -1)
    if "bias_indices" in got:
        out = out.copy()
        rows, columns = got["bias_indices"].astype(int)
        np.add.at(out, (rows, columns), got["bias_values"])
    return out


def deltas(path: Path) -> dict[str, Array]:
    """ΔW of every module that has one."""
    having = {"down", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff"}
    return {module: delta(got) for module, got in read(path).items() if having & set(got)}


def close(one: Array, two: Array, tolerance: float = 1e-5) -> bool:
    """Whether ‖one − two‖ ≤ tolerance · ‖two‖."""
    return one.shape == two.shape and bool(np.linalg.norm(one - two) <= tolerance * np.linalg.norm(two))


def added(parts: Iterable[Array]) -> Array:
    """Their sum."""
    out: Array = np.sum(list(parts), axis=0)
    return out


def best(matrix: Array, rank: int) -> Array:
    """The best approximation of that rank (Eckart and Young, 1936)."""
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    out: Array = u[:, :rank] * s[:rank] @ vh[:rank]
    return out
