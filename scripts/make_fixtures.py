#!/usr/bin/env python3
"""Writes the small adapter files in fixtures/ with the tools that write such files elsewhere.

    .venv/bin/python scripts/make_fixtures.py [FOLDER]

Base models stand on the meta device (or are tiny), values are drawn from a seed, nothing is downloaded, and a second
run writes the same bytes. fixtures/README.md says which tool wrote which file, and what this script did by itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_unet_state_dict_to_peft,
)
from fixture_tools import PublishedClip, fill, settle, training_metadata, values
from lycoris.kohya import LycorisNetworkKohya
from lycoris_fixtures import lycoris_folders
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from peft_folder_fixtures import peft_folders
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

Tensors = dict[str, Tensor]

# The published configs, as far as they decide names and shapes.
SD15_UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL_UNET = {
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
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}

SD15_ATTENTION = [
    f"{block}.transformer_blocks.0.{layer}"
    for block in ("down_blocks.0.attentions.0", "up_blocks.3.attentions.2")
    for layer in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_k", "attn2.to_v")
] + [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v",
]
SD15_FEED_FORWARD = [
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
]
SD15_CONVOLUTIONS = [
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.attentions.0.proj_out",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv_shortcut",
    "up_blocks.2.upsamplers.0.conv",
]
CLIP_MODULES = [
    "text_model.encoder.layers.0.self_attn.q_proj",
    "text_model.encoder.layers.0.self_attn.out_proj",
    "text_model.encoder.layers.0.mlp.fc1",
    "text_model.encoder.layers.11.self_attn.v_proj",
]
# SDXL's modules, each with the name that the authors' code (sgm), and so sd-scripts, gives it.
SDXL_MODULES = {
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks.1.0.emb_layers.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.attentions.0.proj_in": "input_blocks.4.1.proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": "input_blocks.4.1.transformer_blocks.1.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": "input_blocks.4.1.transformer_blocks.1.attn2.to_k",
    "down_blocks.2.attentions.1.transformer_blocks.9.attn1.to_out.0": (
        "input_blocks.8.1.transformer_blocks.9.attn1.to_out.0"
    ),
    "mid_block.attentions.0.transformer_blocks.5.attn2.to_v": "middle_block.1.transformer_blocks.5.attn2.to_v",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.attentions.2.proj_out": "output_blocks.2.1.proj_out",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": "output_blocks.3.1.transformer_blocks.0.ff.net.2",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.2.conv_shortcut": "output_blocks.8.0.skip_connection",
}


def on_meta(build: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    with torch.device("meta"):
        return build(*arguments, **options)


def save_lycoris(
    path: Path,
    *,
    rank: int,
    alpha: float,
    unet: nn.Module,
    unet_names: list[str],
    text_encoder: nn.Module | None = None,
    text_encoder_names: list[str] | None = None,
    conv_rank: int = 0,
    conv_alpha: float = 0.0,
    **options: Any,
) -> None:
    """As a training script does it: the network, its preset, apply_to, save_weights."""
    LycorisNetworkKohya.apply_preset(
        {
            "enable_conv": True,
            "unet_target_module": [],
            "unet_target_name": unet_names,
            "text_encoder_target_module": [],
            "text_encoder_target_name": text_encoder_names or [],
        }
    )
    network = LycorisNetworkKohya(
        text_encoder,
        unet,
        lora_dim=rank,
        alpha=alpha,
        conv_lora_dim=conv_rank or rank,
        conv_alpha=conv_alpha or alpha,
        network_module="lora",
        **options,
    )
    network.apply_to(text_encoder, unet, text_encoder is not None, True)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(values(parameter.shape, name))
    arguments = {"algo": "lora", "conv_dim": conv_rank or rank, "conv_alpha": conv_alpha or alpha, **options}
    metadata = training_metadata(
        "lycoris.kohya", rank, alpha, "sd_v1", ss_network_args=json.dumps({k: str(v) for k, v in arguments.items()})
    )
    network.save_weights(str(path), torch.float16, metadata)
    settle(path)


def kohya_sd15(folder: Path) -> None:
    save_lycoris(
        folder / "kohya-sd15.safetensors",
        rank=4,
        alpha=2.0,
        conv_rank=2,
        conv_alpha=1.5,
        unet=on_meta(UNet2DConditionModel, **SD15_UNET),
        unet_names=SD15_ATTENTION + SD15_FEED_FORWARD + SD15_CONVOLUTIONS,
        text_encoder=PublishedClip(on_meta(CLIPTextModel, CLIPTextConfig(**CLIP_L))),
        text_encoder_names=CLIP_MODULES,
    )


def kohya_dora_sd15(folder: Path) -> None:
    """DoRA needs the weights that it adapts: those few modules become real ones."""
    names = ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "down_blocks.0.resnets.0.conv1"]
    for axis, on_output in (("output", True), ("input", False)):
        unet = on_meta(UNet2DConditionModel, **SD15_UNET)
        for name in names:
            module = unet.get_submodule(name)
            module.to_empty(device="cpu")
            fill(module)
        path = folder / f"kohya-dora-{axis}-sd15.safetensors"
        save_lycoris(path, rank=2, alpha=1.0, unet=unet, unet_names=names, weight_decompose=True, wd_on_out=on_output)


def kohya_sdxl(folder: Path) -> None:
    """Spelled here, since sd-scripts is no package; then read by diffusers, which must find the same modules."""
    rank, alpha = 2, 1.0
    unet = on_meta(UNet2DConditionModel, **SDXL_UNET)
    te1 = PublishedClip(on_meta(CLIPTextModel, CLIPTextConfig(**CLIP_L)))
    te2 = on_meta(CLIPTextModelWithProjection, CLIPTextConfig(**CLIP_G))
    te2_names = [name.replace("layers.11.", "layers.31.") for name in CLIP_MODULES]
    parts: list[tuple[str, nn.Module, dict[str, str]]] = [
        ("lora_unet", unet, SDXL_MODULES),
        ("lora_te1", te1, {name: name for name in CLIP_MODULES}),
        ("lora_te2", te2, {name: name for name in te2_names}),
    ]
    tensors: Tensors = {}
    for prefix, model, names in parts:
        for name, original in names.items():
            # CLIPTextModelWithProjection lost `text_model.` too, in some versions of transformers.
            bare = name.removeprefix("text_model.")
            weight = model.get_submodule(name if name.split(".")[0] in dict(model.named_children()) else bare).weight
            key = f"{prefix}_{original.replace('.', '_')}"
            outputs, inputs, *kernel = weight.shape
            down, up = [rank, inputs, *kernel], [outputs, rank, *(1 for _ in kernel)]
            tensors[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
            tensors[f"{key}.lora_down.weight"] = values(down, f"{key}.lora_down.weight").half()
            tensors[f"{key}.lora_up.weight"] = values(up, f"{key}.lora_up.weight").half()

    config = on_meta(UNet2DConditionModel, **SDXL_UNET).config
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), config)
    converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    converted = convert_unet_state_dict_to_peft({key: t for key, t in converted.items() if key.startswith("unet.")})
    found = {key.partition(".lora")[0] for key in converted}
    if found != (expected := {f"unet.{name}" for name in SDXL_MODULES}):
        raise SystemExit(f"diffusers reads other SDXL modules than were meant:\n{sorted(found ^ expected)}")

    path = folder / "kohya-sdxl.safetensors"
    save_file(tensors, path)
    content = path.read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    hashes = {"sshs_model_hash": hashlib.sha256(body).hexdigest()}
    settle(path, training_metadata("networks.lora", rank, alpha, "sdxl_base_v1-0") | hashes)


def trained_lora(model: Any, config: LoraConfig, name: str) -> Tensors:
    """The state dict of LoRA layers that peft puts into a model on the meta device, with drawn values."""
    model.add_adapter(config)
    state = get_peft_model_state_dict(model, adapter_name="default")
    return {key: values(tensor.shape, f"{name}.{key}") for key, tensor in sorted(state.items())}


def described(config: LoraConfig) -> dict[str, Any]:
    """The config as diffusers' training scripts put it into a header; its sets in one order."""
    fields = config.to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}


def diffusers_sd15(folder: Path) -> None:
    unet_config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=SD15_ATTENTION[:8] + SD15_FEED_FORWARD + SD15_CONVOLUTIONS[:3],
        rank_pattern={"proj_in": 2},
        alpha_pattern={"proj_in": 1},
    )
    text_config = LoraConfig(
        r=2, lora_alpha=3, target_modules=[name.removeprefix("text_model.") for name in CLIP_MODULES]
    )
    unet = trained_lora(on_meta(UNet2DConditionModel, **SD15_UNET), unet_config, "unet")
    text = trained_lora(on_meta(CLIPTextModel, CLIPTextConfig(**CLIP_L)), text_config, "text_encoder")
    text = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in text.items()}

    def save(name: str, unet_layers: Tensors, text_layers: Tensors) -> None:
        StableDiffusionLoraLoaderMixin.save_lora_weights(
            folder,
            unet_lora_layers={key: tensor.half() for key, tensor in unet_layers.items()},
            text_encoder_lora_layers={key: tensor.half() for key, tensor in text_layers.items()},
            weight_name=name,
            unet_lora_adapter_metadata=described(unet_config),
            text_encoder_lora_adapter_metadata=described(text_config),
        )
        settle(folder / name)

    save("diffusers-sd15.safetensors", unet, text)
    # Most training scripts of diffusers 0.42 convert first, which renames the attention layers and nothing else.
    save(
        "diffusers-mixed-sd15.safetensors",
        convert_state_dict_to_diffusers({key: unet[key] for key in unet if "attn1" in key or "ff.net.2" in key}),
        convert_state_dict_to_diffusers({key: text[key] for key in text if "layers.0" in key}),
    )

    # What the same library makes of it for Kohya's readers, unchanged.
    whole = {f"unet.{key}": tensor for key, tensor in unet.items()}
    whole |= {f"text_encoder.{key}": tensor for key, tensor in text.items()}
    kohya = {key: t.half() if t.is_floating_point() else t for key, t in convert_state_dict_to_kohya(whole).items()}
    save_file(kohya, folder / "kohya-sd15-by-diffusers.safetensors")
    settle(folder / "kohya-sd15-by-diffusers.safetensors")


def diffusers_attention_processors(folder: Path) -> None:
    """The spelling of diffusers 0.11 to 0.16, which no current version writes."""
    unet = on_meta(UNet2DConditionModel, **SD15_UNET)
    tensors: Tensors = {}
    for name in SD15_ATTENTION[:8]:
        attention, layer = name.removesuffix(".0").rsplit(".", 1)
        outputs, inputs = unet.get_submodule(name).weight.shape
        for part, shape in (("down", (4, inputs)), ("up", (outputs, 4))):
            key = f"{attention}.processor.{layer}_lora.{part}.weight"
            tensors[key] = values(shape, key).half()
    torch.save(tensors, folder / "diffusers-attn-procs.bin")


def main() -> None:
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "fixtures")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for make in (
            kohya_sd15,
            kohya_dora_sd15,
            kohya_sdxl,
            diffusers_sd15,
            diffusers_attention_processors,
            peft_folders,
            lycoris_folders,
        ):
            make(folder)
        for path in sorted(folder.rglob("*.safetensors")):
            for key, tensor in load_file(path).items():
                if not tensor.isfinite().all():
                    raise SystemExit(f"{path.name}: {key} is not finite")
        target.mkdir(parents=True, exist_ok=True)
        for entry in folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(target / entry.name, ignore_errors=True)
                shutil.copytree(entry, target / entry.name)
            else:
                shutil.copyfile(entry, target / entry.name)
    files = [path for path in target.rglob("*") if path.is_file()]
    print(f"{target}: {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes")


if __name__ == "__main__":
    main()
