"""Flux.1 adapters without adapterops: files in every spelling, and a reader of them that owes adapterops nothing.

Names are from huggingface/diffusers `scripts/convert_flux_to_diffusers.py` and `loaders/lora_conversion_utils.py`,
black-forest-labs/flux `src/flux/model.py`, kohya-ss/sd-scripts `networks/lora_flux.py`; formulas from LyCORIS
`lycoris/functional`.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from raw import load_tensors, probe
from safetensors import safe_open
from safetensors.torch import save_file

INNER = 16
CONFIG: dict[str, Any] = {
    "in_channels": 8,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": [2, 2, 4],
    "guidance_embeds": True,
}
"""A Flux.1 of two blocks of each kind; every width that can differ does."""

_DOUBLE = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_attn.norm.query_norm": ["attn.norm_q"],
    "img_attn.norm.key_norm": ["attn.norm_k"],
    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
_SINGLE = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "linear2": ["proj_out"],
    "norm.query_norm": ["attn.norm_q"],
    "norm.key_norm": ["attn.norm_k"],
}
_REST = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
_XLABS = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1",
    "proj_lora": "linear2",
}


@functools.cache
def authors(double: int = 19, single: int = 38) -> dict[str, tuple[str, ...]]:
    """The authors' name of every module to the diffusers modules whose rows it has, in order."""
    out = {name: tuple(parts) for name, parts in _REST.items()}
    for i in range(double):
        for name, parts in _DOUBLE.items():
            out[f"double_blocks.{i}.{name}"] = tuple(f"transformer_blocks.{i}.{part}" for part in parts)
    for i in range(single):
        for name, parts in _SINGLE.items():
            out[f"single_blocks.{i}.{name}"] = tuple(f"single_transformer_blocks.{i}.{part}" for part in parts)
    return out


@functools.cache
def _flat() -> dict[str, tuple[str, ...]]:
    """Every name of either kind, flattened."""
    table = authors()
    both = {**{name: (name,) for parts in table.values() for name in parts}, **table}
    return {name.replace(".", "_"): table.get(name, (name,)) for name in both}


_ENDS = re.compile(
    r"\.(lora_(?:down|up|A|B)(?:\.weight|\.bias)|lora_[AB]|lora\.(?:down|up)\.weight|(?:down|up)\.weight|alpha|dora_scale|"
    r"lora_magnitude_vector(?:\.weight)?|hada_\w+|lokr_\w+|diff|diff_b|scale|weight)$"
)


@dataclass
class Module:
    """What a file does to one module: ΔW times the probe (or dense), and everything that stands a row beside it."""

    delta: torch.Tensor | None = None
    rows: dict[str, torch.Tensor] = field(default_factory=dict)

    def nothing(self) -> bool:
        """Whether it changes nothing."""
        still = self.delta is None or not self.delta.any()
        return still and "magnitude" not in self.rows and not any(t.any() for t in self.rows.values())


def _where(stem: str) -> tuple[str, ...]:
    """The diffusers modules that the part of a key before its suffix stands for."""
    for prefix in ("lora_unet_", "lora_transformer_", "lycoris_"):
        if stem.startswith(prefix):
            return _flat()[stem.removeprefix(prefix)]
    for prefix in ("diffusion_model.", "base_model.model.", "transformer.", ""):
        if stem.startswith(prefix):
            name = stem.removeprefix(prefix)
            match = re.match(r"(.*blocks\.\d+)\.processor\.(\w+)$", name)
            if match:
                parts = authors()[f"{match[1]}.{_XLABS[match[2]]}"]
                return parts[:3] if match[2] == "qkv_lora" else parts
            return authors().get(name, (name,))
    raise AssertionError(stem)


def metadata(path: Path) -> dict[str, str]:
    """A file's header."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def _config(path: Path) -> dict[str, Any]:
    """The PEFT config beside the weights or in the header."""
    if path.is_dir():
        config: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
        return config
    own = json.loads(metadata(path).get("loralib", "{}"))
    if own:
        alphas = own["lora_alpha"]
        return {"alpha_pattern": alphas} if isinstance(alphas, dict) else {"lora_alpha": alphas}
    header = json.loads(metadata(path).get("lora_adapter_metadata", "{}"))
    return {key.removeprefix("transformer."): value for key, value in header.items()}


def _scale(config: Mapping[str, Any], name: str, rank: int, alpha: torch.Tensor | None) -> float:
    def pattern(field: str, default: float) -> float:
        for key, value in config.get(field, {}).items():
            if re.match(rf"(.*\.)?({key})$", name):
                return float(value)
        return default

    assert "r" not in config or pattern("rank_pattern", config["r"]) == rank, name
    if alpha is not None:
        return float(alpha) / rank
    value = pattern("alpha_pattern", float(config.get("lora_alpha", rank)))
    return value / (sqrt(rank) if config.get("use_rslora") else rank)


def _weight(got: Mapping[str, torch.Tensor], config: Mapping[str, Any], name: str, dense: bool) -> torch.Tensor | None:
    """ΔW, dense or times the probe, in float64."""
    alpha = got.get("alpha")
    found = {role: t.double() for role, t in got.items()}
    if "up" in found:
        up, down = found["up"].flatten(1), found["down"].flatten(1)
        scale = _scale(config, name, len(down), alpha)
        return up @ down * scale if dense else up @ (down @ probe(down.shape[1])) * scale
    if "hada_w1_a" in found:
        rank = len(found["hada_w1_b"])
        product = (found["hada_w1_a"] @ found["hada_w1_b"]) * (found["hada_w2_a"] @ found["hada_w2_b"])
        full = product * (1.0 if alpha is None else float(alpha) / rank)
    elif any(role.startswith("lokr_") for role in found):
        halves, rank = [], None
        for n in "12":
            if f"lokr_w{n}" in found:
                halves.append(found[f"lokr_w{n}"])
            else:
                rank = len(found[f"lokr_w{n}_b"])
                halves.append(found[f"lokr_w{n}_a"] @ found[f"lokr_w{n}_b"])
        full = torch.kron(*halves) * (1.0 if alpha is None or rank is None else float(alpha) / rank)
    elif "diff" in found:
        full = found["diff"]
    else:
        return None
    return full if dense else full @ probe(full.shape[1])


_ROLES = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_A": "down",
    "lora_B": "up",
    "lora_B.bias": "bias",
    "diff_b": "bias",
}


def _role(suffix: str) -> str:
    if suffix in _ROLES:
        return _ROLES[suffix]
    if suffix == "dora_scale" or suffix.startswith("lora_magnitude_vector"):
        return "magnitude"
    if suffix in ("scale", "weight"):
        return "norm"
    return re.sub(r"^lora[_.]", "", suffix).removesuffix(".weight")


def read(path: Path, dense: bool = False) -> dict[str, Module]:
    """What a file or PEFT folder, in any spelling of Flux.1, does to each of diffusers' modules."""
    config = _config(path)
    tensors = load_tensors(path / "adapter_model.safetensors" if path.is_dir() else path)
    stems: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _ENDS.search(key)
        assert match, key
        stems.setdefault(key[: match.start()], {})[_role(match[1])] = tensor
    out: dict[str, Module] = {}
    for stem, got in stems.items():
        parts = _where(stem)
        delta = _weight(got, config, parts[0], dense)
        rows = {role: got[role].double().reshape(-1) for role in ("bias", "magnitude", "norm") if role in got}
        if "bias" in rows and "up" in got:
            rows["bias"] = rows["bias"] * _scale(config, parts[0], len(got["down"]), got.get("alpha"))
        whole = {**({"delta": delta} if delta is not None else {}), **rows}
        swapped = "adaLN_modulation" in stem
        for number, part in enumerate(parts):
            made = {}
            for role, tensor in whole.items():
                inner = len(tensor) // (3 if len(parts) == 3 else 7 if len(parts) == 4 else 1)
                at = slice(number * inner, None if number == 3 else (number + 1) * inner)
                made[role] = torch.cat(tensor.chunk(2)[::-1]) if swapped else tensor[at]
            assert part not in out, part
            out[part] = Module(made.pop("delta", None), made)
    return out


def assert_same(found: Mapping[str, Module], wanted: Mapping[str, Module], tolerance: float = 1e-12) -> None:
    """The same modules, each with the same ΔW and the same rows; those that change nothing do not count."""
    some, others = ({name: m for name, m in read.items() if not m.nothing()} for read in (found, wanted))
    assert some.keys() == others.keys()
    assert others
    for name, module in others.items():
        one = some[name]
        assert (one.delta is None) == (module.delta is None), name
        assert one.rows.keys() == module.rows.keys(), name
        if module.delta is not None and one.delta is not None:
            assert one.delta.shape == module.delta.shape, name
            assert (one.delta - module.delta).norm() <= tolerance * module.delta.norm(), name
        for role, values in module.rows.items():
            assert (one.rows[role] - values).norm() <= tolerance * values.norm(), (name, role)


def base(folder: Path) -> Path:
    """The config of the tiny transformer."""
    path = folder / "tiny-flux.json"
    path.write_text(json.dumps({"_class_name": "FluxTransformer2DModel", **CONFIG}))
    return path


def transformer(**changes: Any) -> FluxTransformer2DModel:
    """The tiny transformer with random weights."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**{**CONFIG, **changes}).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too: a fresh model's say nothing
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model


def pipeline(model: FluxTransformer2DModel) -> Any:
    """A pipeline that has only a transformer."""
    none = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(transformer=model, **none)


@torch.no_grad()
def output(model: FluxTransformer2DModel) -> torch.Tensor:
    """What the transformer makes of fixed inputs."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.arange(12.0).reshape(4, 3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    sample: torch.Tensor = model(
        hidden_states=noise(1, 4, model.config.in_channels),
        encoder_hidden_states=noise(1, 3, CONFIG["joint_attention_dim"]),
        pooled_projections=noise(1, CONFIG["pooled_projection_dim"]),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([3.5]),
        img_ids=ids,
        txt_ids=ids[:3],
    ).sample
    return sample


@torch.no_grad()
def fuse(model: FluxTransformer2DModel, adapter: Mapping[str, Module]) -> None:
    """Add dense deltas to a transformer's weights by hand."""
    for name, change in adapter.items():
        module: Any = model.get_submodule(name)
        if "norm" in change.rows:
            module.weight.copy_(change.rows["norm"])
            continue
        if change.delta is not None:
            weight = module.weight.double() + change.delta
            if "magnitude" in change.rows:
                weight *= (change.rows["magnitude"] / weight.norm(dim=1))[:, None]
            module.weight.copy_(weight)
        if "bias" in change.rows:
            module.bias.add_(change.rows["bias"])


@functools.cache
def shapes() -> dict[str, tuple[int, int]]:
    """The weight of every linear module of the tiny transformer, by the authors' names."""
    model = transformer()
    out = {}
    for name, parts in authors(2, 2).items():
        weights = [model.get_parameter(f"{part}.weight") for part in parts]
        if weights[0].ndim == 2:
            out[name] = (sum(len(w) for w in weights), weights[0].shape[1])
    return out


class Numbers:
    """Seeded random tensors."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self._generator, self._dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=self._generator) / 2).to(self._dtype)


def kohya(path: Path, rank: int = 4, alpha: float | None = 2.0, only: str = "", dora: bool = False) -> Path:
    """A Kohya file with a LoRA on every linear module whose authors' name `only` finds; magnitudes where asked."""
    numbers, tensors = Numbers(), {}
    for name, (out, inputs) in shapes().items():
        if not re.search(only, name):
            continue
        stem = "lora_unet_" + name.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"] = numbers(rank, inputs)
        tensors[f"{stem}.lora_up.weight"] = numbers(out, rank)
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
        if dora:
            tensors[f"{stem}.dora_scale"] = numbers(out, 1).abs() + 0.5
    save_file(tensors, path)
    return path


def control(path: Path, rank: int = 4) -> Path:
    """A control adapter as Black Forest Labs publish them: every module with a bias, every norm, a wider `img_in`."""
    numbers, tensors = Numbers(1), {}
    for name, (out, inputs) in shapes().items():
        tensors[f"{name}.lora_A.weight"] = numbers(rank, inputs * 2 if name == "img_in" else inputs)
        tensors[f"{name}.lora_B.weight"] = numbers(out, rank)
        tensors[f"{name}.lora_B.bias"] = numbers(out)
    for name in authors(2, 2):
        if name.endswith("_norm"):
            tensors[f"{name}.scale"] = numbers(CONFIG["attention_head_dim"]) + 1
    save_file(tensors, path)
    return path


def split_qkv(path: Path, rank: int = 2, alpha: float = 1.0) -> Path:
    """A Kohya file as sd-scripts saves a network trained with `split_qkv`: down stacked, up block-diagonal, alpha as is."""
    numbers, tensors = Numbers(2), {}
    for name, (out, inputs) in shapes().items():
        if not re.search(r"blocks.*(qkv|linear1|proj)$", name):
            continue
        stem = "lora_unet_" + name.replace(".", "_")
        sizes = {3 * INNER: [INNER] * 3, 7 * INNER: [INNER] * 3 + [4 * INNER]}.get(out, [out])
        tensors[f"{stem}.lora_down.weight"] = torch.cat([numbers(rank, inputs) for _ in sizes])
        tensors[f"{stem}.lora_up.weight"] = torch.block_diag(*(numbers(size, rank) for size in sizes))
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def from_skeleton(skeleton: Path, path: Path, rank: int = 2, whole: bool = False) -> Path:
    """A skeleton's file with real numbers at a small rank, alphas half of it.

    Without `whole`, of the blocks only the first and the last of either kind.
    """
    entries = {key: value["shape"] for key, value in json.loads(skeleton.read_text())["tensors"].items()}
    numbers, tensors = Numbers(4, torch.bfloat16), {}
    for key, shape in entries.items():
        block = re.search(r"(single|double|)(?:_transformer)?_?blocks[._](\d+)[._]", key)
        if block and not whole and int(block[2]) not in (0, 37 if block[1] == "single" else 18):
            continue
        if key.endswith(".alpha"):
            tensors[key] = torch.tensor(rank / 2, dtype=torch.bfloat16)
            continue
        shape = list(shape)
        if re.search(r"lora_(A|down)\.weight$", key):
            shape[0] = rank
        elif re.search(r"lora_(B|up)\.weight$", key):
            shape[1] = rank
        tensors[key] = numbers(*shape)
    save_file(tensors, path)
    return path
