"""SD 1.x, 2.x and SDXL on the meta device, built by diffusers and transformers, as pipelines that load LoRA files."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "sample_size": 96,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def build(architecture: str) -> dict[str, torch.nn.Module]:
    """The components of a base model, without storage."""
    with torch.device("meta"):
        models: dict[str, torch.nn.Module] = {"unet": UNet2DConditionModel(**_UNETS[architecture])}
        if architecture != "sd2":
            models["text_encoder"] = CLIPTextModel(CLIPTextConfig(**_CLIP_L))
        if architecture == "sdxl":
            models["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**_CLIP_G))
    return models


@functools.cache
def module_names(architecture: str) -> tuple[tuple[str, str], ...]:
    """(component, published name) of every module; transformers 5's CLIPTextModel lost `text_model.`."""
    out = []
    for component, model in build(architecture).items():
        lost = "text_model." if type(model) is CLIPTextModel else ""
        out += [(component, lost + name) for name, _ in model.named_modules() if name]
    return tuple(out)


def adapted_by_diffusers(architecture: str, path: str) -> dict[tuple[str, str], float]:
    """The modules that diffusers puts a LoRA on when it loads a file, and the scale of each."""
    models = build(architecture)
    none = dict.fromkeys(("vae", "tokenizer", "scheduler"))
    pipe: Any
    if architecture == "sdxl":
        pipe = StableDiffusionXLPipeline(**none, tokenizer_2=None, add_watermarker=False, **models)
    else:
        models = {"text_encoder": None, **models}  # type: ignore[dict-item]
        pipe = StableDiffusionPipeline(
            **none, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **models
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(path, adapter_name="x", low_cpu_mem_usage=True)
    return {key: layer.scaling["x"] for c, m in models.items() if m is not None for key, layer in adapted(c, m).items()}


def adapted(component: str, model: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """The tuner layers in a model by (component, published name)."""
    lost = "text_model." if type(model) is CLIPTextModel else ""
    return {(component, lost + n): m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
