"""Tiny pipelines with random weights, adapters for them in every format, and the same change fused in by hand."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

logging.getLogger("transformers").setLevel(logging.ERROR)

KINDS = ("sd1", "sdxl", "flux")
Key = tuple[str, str]

TARGETS = {
    "unet": (
        "attn1.to_q",
        "attn2.to_v",
        "attn1.to_out.0",
        "ff.net.0.proj",
        "proj_in",
        "resnets.0.conv1",
        "time_emb_proj",
    ),
    "transformer": (
        "attn.to_q",
        "attn.add_k_proj",
        "attn.to_out.0",
        "ff.net.2",
        "proj_mlp",
        "norm1.linear",
        "x_embedder",
    ),
    "text_encoder": ("self_attn.q_proj", "mlp.fc1"),
    "text_encoder_2": ("self_attn.v_proj", "mlp.fc2"),
}
"""The ends of the names of adapted modules: linear layers, and convolutions with kernels of one and of three."""

_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_CLIP = {
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 100,
    "projection_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def unet(**more: Any) -> UNet2DConditionModel:
    """Two resolutions of it."""
    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 8,
        "cross_attention_dim": 8,
        "norm_num_groups": 2,
        "attention_head_dim": 4,
    }
    return UNet2DConditionModel(**{**config, **_BLOCKS, **more})


def pipeline(kind: str, seed: int = 0) -> Any:
    """A pipeline of that kind without tokenizers, VAE and scheduler."""
    torch.manual_seed(seed)
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=8, **_CLIP)).eval()
    none: dict[str, Any] = dict.fromkeys(("vae", "tokenizer", "scheduler"))
    if kind == "sd1":
        none |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return StableDiffusionPipeline(text_encoder=clip, unet=unet().eval(), **none)
    if kind == "sdxl":
        second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=16, **_CLIP)).eval()
        time = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "transformer_layers_per_block": (1, 2),
        }
        model = unet(projection_class_embeddings_input_dim=32, use_linear_projection=True, **time)
        return StableDiffusionXLPipeline(
            text_encoder=clip, text_encoder_2=second, unet=model.eval(), tokenizer_2=None, add_watermarker=False, **none
        )
    transformer = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    t5 = T5EncoderModel(T5Config(d_model=8, d_ff=16, d_kv=4, num_heads=2, num_layers=1, vocab_size=100))
    return FluxPipeline(
        transformer=transformer.eval(), text_encoder=clip, text_encoder_2=t5.eval(), tokenizer_2=None, **none
    )


def models(pipe: Any) -> dict[str, torch.nn.Module]:
    """The models that the pipeline manages adapters of."""
    return {name: getattr(pipe, name) for name in pipe._lora_loadable_modules if getattr(pipe, name) is not None}


@torch.no_grad()
def outputs(pipe: Any) -> dict[str, torch.Tensor]:
    """What each of the models makes of fixed inputs, in float32."""
    out = {}
    generator = torch.Generator().manual_seed(7)
    for name, model in models(pipe).items():
        dtype = next(model.parameters()).dtype

        def noise(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        if name == "unet":
            added = {"text_embeds": noise(1, 8), "time_ids": torch.ones(1, 6)}
            conditions = added if model.config.addition_embed_type else None
            sample = model(noise(1, 4, 8, 8), 3, noise(1, 5, 8), added_cond_kwargs=conditions).sample
        elif name == "transformer":
            ids = torch.arange(12.0).reshape(4, 3)
            sample = model(
                hidden_states=noise(1, 4, 8),
                encoder_hidden_states=noise(1, 3, 8),
                pooled_projections=noise(1, 8),
                timestep=torch.tensor([0.5]).to(dtype),
                img_ids=ids,
                txt_ids=ids[:3],
            ).sample
        else:
            sample = model(torch.tensor([[0, 5, 9, 2]])).last_hidden_state
        out[name] = sample.float()
    return out


def assert_close(
    found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    """Within `tolerance` of the largest value."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= tolerance * tensor.abs().max(), name


def assert_differ(found: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], names: Iterable[str]) -> None:
    """By more than rounding could, in each of the components named."""
    for name in names:
        assert (found[name] - other[name]).abs().max() > 1e-3 * other[name].abs().max(), name


def equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@dataclass
class Raw:
    """A LoRA of one module as plain tensors."""

    a: torch.Tensor
    b: torch.Tensor
    alpha: float
    magnitude: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    root: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.root else self.rank)


def adapter(pipe: Any, seed: int = 1, only: Iterable[str] | None = None, **kinds: bool) -> dict[Key, Raw]:
    """Factors for every target of the pipeline; ranks and alphas differ by module.

    `dora`, `bias` and `root` (rsLoRA) add what they say.
    """
    generator = torch.Generator().manual_seed(seed)
    out: dict[Key, Raw] = {}
    for component, model in models(pipe).items():
        if only is not None and component not in only:
            continue
        for name, module in model.named_modules():
            if not name.endswith(TARGETS[component]):
                continue
            shape, rank = module.weight.shape, 2 + len(out) % 3
            a = torch.randn(rank, *shape[1:], generator=generator) / 2
            b = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator) / 2
            raw = Raw(a, b, alpha=1.0 + len(out) % 2, root=kinds.get("root", False))
            if kinds.get("dora"):
                raw.magnitude = 0.5 + torch.rand(shape[0], generator=generator)
            if kinds.get("bias"):
                raw.bias = torch.randn(shape[0], generator=generator)
            out[component, name] = raw
    return out


def published(component: str, name: str) -> str:
    """A module's name in published checkpoints: transformers 5's CLIPTextModel lost a beginning."""
    return f"text_model.{name}" if component == "text_encoder" and not name.startswith("text_model.") else name


def write_kohya(raw: Mapping[Key, Raw], path: Path, two_encoders: bool) -> Path:
    """As sd-scripts spells it, with diffusers' names of modules."""
    prefixes = {
        "unet": "lora_unet",
        "text_encoder": "lora_te1" if two_encoders else "lora_te",
        "text_encoder_2": "lora_te2",
    }
    tensors = {}
    for (component, name), update in raw.items():
        stem = f"{prefixes[component]}_{published(component, name).replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = update.a, update.b
        tensors[f"{stem}.alpha"] = torch.tensor(update.alpha)
        if update.magnitude is not None:
            tensors[f"{stem}.dora_scale"] = update.magnitude.reshape(-1, *(1,) * (update.a.ndim - 1))
    save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    return path


def _config(raw: Mapping[str, Raw]) -> dict[str, Any]:
    some = next(iter(raw.values()))
    return {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": list(raw),
        "rank_pattern": {f"^{name}": update.rank for name, update in raw.items()},
        "alpha_pattern": {f"^{name}": update.alpha for name, update in raw.items()},
        "use_dora": some.magnitude is not None,
        "lora_bias": some.bias is not None,
        "use_rslora": some.root,
    }


def _tensors(raw: Mapping[str, Raw]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, update in raw.items():
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = update.a, update.b
        if update.magnitude is not None:
            shape = (1, -1, 1, 1) if update.a.ndim == 4 else (-1,)
            tensors[f"{name}.lora_magnitude_vector"] = update.magnitude.reshape(shape)
        if update.bias is not None:
            tensors[f"{name}.lora_B.bias"] = update.bias
    return tensors


def _components(raw: Mapping[Key, Raw]) -> dict[str, dict[str, Raw]]:
    out: dict[str, dict[str, Raw]] = {}
    for (component, name), update in raw.items():
        out.setdefault(component, {})[published(component, name)] = update
    return out


def write_diffusers(raw: Mapping[Key, Raw], path: Path) -> Path:
    """As diffusers saves it, with its header."""
    tensors, header = {}, {}
    for component, own in _components(raw).items():
        tensors |= {f"{component}.{key}": t for key, t in _tensors(own).items()}
        header |= {f"{component}.{key}": value for key, value in _config(own).items()}
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, {"lora_adapter_metadata": json.dumps(header)})
    return path


def write_peft(raw: Mapping[Key, Raw], folder: Path) -> Path:
    """As peft saves it, a folder a component."""
    for component, own in _components(raw).items():
        place = folder / component
        place.mkdir(parents=True)
        tensors = {f"base_model.model.{key}": t.contiguous() for key, t in _tensors(own).items()}
        save_file(tensors, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(_config(own)))
    return folder


WRITERS = {
    "kohya": lambda raw, path, pipe: write_kohya(raw, path / "kohya.safetensors", hasattr(pipe, "text_encoder_2")),
    "diffusers": lambda raw, path, pipe: write_diffusers(raw, path / "diffusers.safetensors"),
    "peft": lambda raw, path, pipe: write_peft(raw, path / "peft"),
}


def product(raw: Raw) -> torch.Tensor:
    """ΔW of the factors, scaled: B·A over the rank, in float64."""
    b, a = raw.b.double().flatten(1), raw.a.double().flatten(1)
    return (raw.scale * (b @ a)).reshape(raw.b.shape[0], *raw.a.shape[1:])


@torch.no_grad()
def fused(pipe: Any, *weighted: tuple[Mapping[Key, Raw], float]) -> dict[str, torch.Tensor]:
    """The outputs of a copy of the pipeline's models, the deltas added to their weights by hand."""
    twin = copy.copy(pipe)
    for name, model in models(pipe).items():
        object.__setattr__(twin, name, copy.deepcopy(model).float())
    for raws, weight in weighted:
        for (component, name), raw in raws.items():
            module: Any = getattr(twin, component).get_submodule(name)
            changed = module.weight.double() + weight * product(raw)
            if raw.magnitude is not None:
                norm = changed.flatten(1).norm(dim=1)
                changed *= (raw.magnitude.double() / norm).reshape(-1, *(1,) * (changed.ndim - 1))
            if raw.bias is not None:
                module.bias.add_(weight * raw.scale * raw.bias)
            module.weight.copy_(changed)
    return outputs(twin)
