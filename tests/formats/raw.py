"""Reading adapter files without adapterops: what the tests hold its results against.

Written from the formats' own sources (named in formats/*.py) and the module lists of diffusers' and transformers'
classes on the meta device; nothing here imports adapterops.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

Deltas = dict[tuple[str, str], torch.Tensor]
"""(component, canonical module) to ΔW·X in float64, X a fixed random matrix of a few columns.

Two deltas that agree on random columns are the same delta (with probability one), at a hundredth of the memory.
"""
COLUMNS = 4

_DOTTED = re.compile(
    r"^(?:(unet|text_encoder|text_encoder_2)\.)?(.+?)"
    r"(?:\.lora_(A|B)\.weight|\.lora\.(down|up)\.weight|\.lora_linear_layer\.(down|up)\.weight"
    r"|\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight)$"
)


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The state dict in a file."""
    if path.suffix == ".safetensors":
        return load_file(path)
    loaded: dict[str, torch.Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def _product(up: torch.Tensor, down: torch.Tensor, scale: float) -> torch.Tensor:
    flat = down.double().flatten(1)
    return up.double().flatten(1) @ (flat @ probe(flat.shape[1])) * scale


@functools.cache
def probe(inputs: int) -> torch.Tensor:
    """X (inputs, COLUMNS): the columns on which deltas are compared."""
    return torch.randn(inputs, COLUMNS, generator=torch.Generator().manual_seed(inputs), dtype=torch.float64)


def dotted_deltas(path: Path) -> Deltas:
    """Deltas of a diffusers file of any generation; alpha from the header where there is one, else scale 1."""
    halves: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for key, tensor in load_tensors(path).items():
        match = _DOTTED.match(key)
        assert match, key
        component, module, role, *rest = match.groups()
        half = role or next(r for r in (rest[0], rest[1], rest[3]) if r)
        if rest[2]:
            module += "." + {"to_out": "to_out.0"}.get(rest[2], rest[2])
        halves.setdefault((component or "unet", module), {})["A" if half in ("A", "down") else "B"] = tensor
    settings: dict[str, object] = {}
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    out = {}
    for (component, module), pair in halves.items():
        rank = pair["A"].shape[0]
        assert not settings.get(f"{component}.alpha_pattern")
        alpha = settings.get(f"{component}.lora_alpha", rank)
        assert isinstance(alpha, (int, float))
        out[component, module] = _product(pair["B"], pair["A"], alpha / rank)
    return out


def kohya_deltas(path: Path, names: dict[str, tuple[str, str]]) -> Deltas:
    """Deltas of a Kohya file; `names` maps the part before the first dot to (component, canonical module)."""
    tensors = load_tensors(path)
    out = {}
    for stem in {key.split(".", 1)[0] for key in tensors}:
        down, up = tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"]
        rank = down.shape[0]
        alpha = float(tensors.get(f"{stem}.alpha", torch.tensor(float(rank))))
        out[names[stem]] = _product(up, down, alpha / rank)
    return out


def peft_deltas(folder: Path) -> Deltas:
    """Deltas of a PEFT folder or of one with a subfolder a component."""
    parts = {f.parent: f for f in folder.glob("**/adapter_model.safetensors")}
    out = {}
    for part, file in parts.items():
        component = part.name if part != folder else "unet"
        config = json.loads((part / "adapter_config.json").read_text())
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
        tensors = load_tensors(file)
        for key in tensors:
            if key.endswith(".lora_A.weight"):
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                a, b = tensors[key], tensors[key.replace(".lora_A.", ".lora_B.")]
                assert a.shape[0] == config["r"]
                out[component, module] = _product(b, a, config["lora_alpha"] / config["r"])
    return out


def flat_names(modules: Iterable[tuple[str, str]], prefixes: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Kohya's names for modules that it spells as diffusers and transformers do."""
    return {f"{prefixes[c]}_{name.replace('.', '_')}": (c, name) for c, name in modules}


def sgm(name: str) -> str:
    """The original repository's name of a module inside an SDXL attention block, by counting blocks.

    SDXL has two resnets a down block and three an up block; sgm numbers input blocks after the first convolution,
    with a downsampler after each level (https://github.com/Stability-AI/generative-models, openaimodel.py).
    """
    parts = name.split(".")
    if parts[0] == "down_blocks":
        head = ["input_blocks", str(1 + 3 * int(parts[1]) + int(parts[3])), "1"]
        return ".".join(head + parts[4:])
    if parts[0] == "mid_block":
        return ".".join(["middle_block", "1", *parts[3:]])
    return ".".join(["output_blocks", str(3 * int(parts[1]) + int(parts[3])), "1", *parts[4:]])
