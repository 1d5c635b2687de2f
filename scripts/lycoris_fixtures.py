"""Files of lycoris-lora on tiny SD 1.5, SDXL and Flux.1 models: one algorithm a file, as its users have them.

Every network is made by lycoris' own entries: `lycoris.kohya.create_network` (keys `lora_unet_…`, `lora_te_…`) and
`lycoris.create_lycoris` (keys `lycoris_…`).  The base models are built from the configs beside the files.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import toml
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from fixture_tools import PublishedClip, settle, training_metadata, values
from lycoris import create_lycoris
from lycoris.kohya import LycorisNetworkKohya, create_network
from lycoris.modules.full import FullModule
from lycoris.wrapper import LycorisNetwork
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SD15 = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SDXL = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 2),
    "cross_attention_dim": 36,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 44,
    "norm_num_groups": 4,
}
FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (2, 2, 4),
}
CLIP = {"vocab_size": 64, "max_position_embeddings": 8, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 63}
CLIP_L = {**CLIP, "hidden_size": 12, "intermediate_size": 24, "num_attention_heads": 2, "projection_dim": 12}
CLIP_G = {**CLIP, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "projection_dim": 20}

SD15_NAMES = [
    *(f"down_blocks.0.attentions.0.{name}" for name in ("norm", "proj_in")),
    *(
        f"down_blocks.0.attentions.0.transformer_blocks.0.{name}"
        for name in ("norm2", "attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.0.proj")
    ),
    *("down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv"),
    *(f"down_blocks.1.resnets.0.{name}" for name in ("time_emb_proj", "conv_shortcut")),
]
SDXL_NAMES = [
    *(f"down_blocks.1.attentions.0.{name}" for name in ("norm", "proj_in")),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
    "mid_block.attentions.0.transformer_blocks.1.ff.net.2",
    *(f"down_blocks.1.resnets.0.{name}" for name in ("conv2", "conv_shortcut")),
]
FLUX_NAMES = [
    "x_embedder",
    *(f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj")),
    *(f"transformer_blocks.0.{name}" for name in ("ff.net.0.proj", "ff_context.net.2", "norm1.linear")),
    *(f"single_transformer_blocks.0.{name}" for name in ("attn.to_q", "proj_mlp", "proj_out")),
]
# The names and sizes of black-forest-labs/flux `src/flux/model.py` at the same width, as sd-scripts has the model.
FLUX_AUTHORS = {
    "double_blocks.0.img_attn.qkv": (16, 48),
    "double_blocks.0.txt_attn.qkv": (16, 48),
    "double_blocks.0.img_attn.proj": (16, 16),
    "double_blocks.0.img_mlp.0": (16, 64),
    "single_blocks.0.linear1": (16, 112),
    "single_blocks.0.linear2": (80, 16),
}
CLIP_NAMES = [
    *("text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.1.mlp.fc1"),
    "text_model.final_layer_norm",
]


@dataclass(frozen=True)
class Variant:
    """What one file is trained with, in the words of lycoris' entries.  Convolutions with a kernel have `conv_dim`.

    `map` is the preset's `name_algo_map`.
    """

    algo: str = "locon"
    dim: int = 4
    alpha: float = 2.0
    options: Mapping[str, Any] = field(default_factory=dict)
    map: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float16


CONV = {"conv_dim": 2, "conv_alpha": 1.5}
LOCON = Variant(options=CONV)
PER_OUTPUT, PER_INPUT = {"dora_wd": True}, {"dora_wd": True, "wd_on_output": False}


def loha(**options: Any) -> Variant:
    return Variant("loha", 3, 2.0, {"conv_dim": 2, "conv_alpha": 3.0, **options})


def lokr(dim: int = 1, **options: Any) -> Variant:
    return Variant("lokr", dim, 0.5, {"conv_dim": dim, "conv_alpha": 0.75, **options})


# The outputs of attention, and the inputs of what follows it, as in lycoris' own preset for (IA)³.
IA3 = Variant("ia3", map={r".*(ff\.net\.\d|fc1|proj_out|proj_in|conv1)": {"algo": "ia3", "train_on_input": True}})
FULL = Variant("full")
MIXED = Variant(
    options={**CONV, "train_norm": True},
    map={
        r".*attn\d?\.to_": {"algo": "lokr", "factor": 4, "dim": 1},
        r".*(ff|proj_mlp|norm1\.linear)": {"algo": "loha", "dim": 2, "alpha": 1.0},
        r".*time_emb_proj": {"algo": "full"},
    },
)
SD15_VARIANTS = {
    "locon": LOCON,
    "locon-tucker": Variant(options={**CONV, "use_tucker": True}),
    "locon-dora": Variant(options={**CONV, "use_tucker": True, **PER_OUTPUT}),
    "locon-dora-in": Variant(options={**CONV, **PER_INPUT}, dtype=torch.float32),
    "locon-norm": Variant(options={**CONV, "train_norm": True}),
    "locon-scalar": Variant(options={**CONV, "use_scalar": True}, dtype=torch.bfloat16),
    "dylora": Variant("dylora", options={"conv_dim": 2, "conv_alpha": 2.0, "block_size": 1}),
    "loha": loha(),
    "loha-tucker": loha(use_tucker=True),
    "loha-dora": loha(**PER_OUTPUT),
    "loha-dora-in": loha(use_tucker=True, **PER_INPUT),
    "loha-rslora": Variant("loha", 4, 2.0, {"conv_dim": 2, "conv_alpha": 3.0, "rs_lora": True}),
    "loha-scalar": Variant("loha", 3, 2.0, {"use_scalar": True}, dtype=torch.bfloat16),
    "lokr": lokr(),
    "lokr-tucker": lokr(2, use_tucker=True, factor=2),
    "lokr-both": lokr(decompose_both=True),
    "lokr-factor": lokr(2, factor=4),
    "lokr-full": lokr(full_matrix=True, factor=4),
    "lokr-unbalanced": lokr(unbalanced_factorization=True),
    "lokr-dora": lokr(**PER_OUTPUT),
    "lokr-dora-in": lokr(2, use_tucker=True, factor=2, **PER_INPUT),
    "lokr-scalar": Variant("lokr", 1, 0.5, {"use_scalar": True}, dtype=torch.float32),
    "ia3": IA3,
    "full": FULL,
    "mixed": MIXED,
}
SDXL_VARIANTS = {
    "locon-dora": SD15_VARIANTS["locon-dora"],
    "loha": loha(),
    "lokr": lokr(),
    "ia3": IA3,
    "full": Variant("full", options={"train_norm": True}),
}
FLUX_VARIANTS = {
    "lora": LOCON,
    "lora-dora": Variant(options=PER_OUTPUT),
    "loha": loha(),
    "lokr": lokr(),
    "lokr-factor": lokr(2, factor=4),
    "lokr-full": lokr(full_matrix=True, factor=4),
    "lokr-dora": lokr(**PER_OUTPUT),
    "ia3": IA3,
    "full": FULL,
    "mixed": MIXED,
}
# With factor 7 the blocks of LoKr end where q, k and v do; with 2, as with most factors at full size, they do not.
AUTHORS_VARIANTS = {
    "lora": LOCON,
    "loha": loha(),
    "lokr": lokr(factor=7),
    "lokr-uncut": lokr(factor=2),
    "full": FULL,
}


def base_model(build: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The model with weights that depend on their names only; those of norms are about one."""
    model = build(*arguments, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = values(parameter.shape, name, 0.2)
            parameter.copy_(drawn + 1 if "norm" in name and name.endswith("weight") and drawn.dim() == 1 else drawn)
    return model


def clips() -> list[nn.Module]:
    """CLIP-L and CLIP-G."""
    small = base_model(CLIPTextModel, CLIPTextConfig(**CLIP_L))
    large = base_model(CLIPTextModelWithProjection, CLIPTextConfig(**CLIP_G))
    return [small, large]


def published(encoder: nn.Module) -> nn.Module:
    """The encoder under the names of its checkpoints."""
    return encoder if "text_model" in dict(encoder.named_children()) else PublishedClip(encoder)


def authors_flux() -> nn.Module:
    """Modules with the names that the authors of Flux.1 gave them; what they compute does not matter here."""
    root = nn.Module()
    for name, (inputs, outputs) in FLUX_AUTHORS.items():
        module = root
        *path, last = name.split(".")
        for step in path:
            if step not in dict(module.named_children()):
                module.add_module(step, nn.Module())
            module = module.get_submodule(step)
        module.add_module(last, nn.Linear(inputs, outputs))
    return base_model(lambda: root)


def draw(network: Any) -> None:
    """Gives every tensor that was trained its own values; the network must have been applied."""
    for lora in network.loras:
        owner = lora.lora_name.removeprefix("lycoris_").removeprefix("lora_unet_")
        for name, parameter in lora.named_parameters():
            drawn = values(parameter.shape, f"{owner}.{name}", 0.3)
            with torch.no_grad():
                if name == "dora_scale":  # its start is the norm of the base's weight; training moves it
                    parameter.mul_(1 + drawn)
                elif isinstance(lora, FullModule):  # holds the weight itself once it is applied
                    parameter.add_(drawn)
                elif name == "scalar":
                    parameter.fill_(0.7)
                else:
                    parameter.copy_(drawn)


def preset_of(variant: Variant, targets: Mapping[str, list[str]]) -> dict[str, Any]:
    """The preset with these lists of names; the map is written out for them, since it would add to them."""
    named = {
        name: {"algo": variant.algo, **own}
        for names in targets.values()
        for name in names
        for pattern, own in variant.map.items()
        if re.match(pattern, name)
    }
    empty = {key.replace("_name", "_module"): [] for key in targets}
    return {"enable_conv": True, "use_fnmatch": True, **empty, **targets, "name_algo_map": named}


def create(variant: Variant, targets: Mapping[str, list[str]], make: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """The network, and what it was created with.

    A preset without a map leaves that of the network before in place (lycoris-lora 4.1.3), so it is reset.
    """
    preset = preset_of(variant, targets)
    for network in (LycorisNetwork, LycorisNetworkKohya):
        network.apply_preset({"name_algo_map": {}})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preset.toml"
        path.write_text(toml.dumps(preset))
        network = make(algo=variant.algo, preset=str(path), warn_on_unmatched=False, **variant.options)
    config = {"algo": variant.algo, "linear_dim": variant.dim, "linear_alpha": variant.alpha, **variant.options}
    return network, {**config, "apply_preset": preset}


def save_kohya(
    path: Path, variant: Variant, denoiser: nn.Module, names: list[str], encoders: list[nn.Module], base: str
) -> None:
    """A file with the keys that sd-scripts' readers know."""
    text: Any = None
    if encoders:
        text = encoders[0] if len(encoders) == 1 else encoders
    targets = {"unet_target_name": names, "text_encoder_target_name": CLIP_NAMES if encoders else []}

    def make(**options: Any) -> Any:
        return create_network(1.0, variant.dim, variant.alpha, None, text, denoiser, **options)

    network, config = create(variant, targets, make)
    network.apply_to(text, denoiser, bool(encoders), True)
    draw(network)
    arguments = json.dumps({key: str(value) for key, value in {"algo": variant.algo, **variant.options}.items()})
    said = training_metadata("lycoris.kohya", variant.dim, variant.alpha, base, ss_network_args=arguments)
    network.save_weights(str(path), variant.dtype, {**said, "lycoris_config": json.dumps(config)})
    settle(path)


def save_lycoris(path: Path, variant: Variant, model: nn.Module, names: list[str]) -> None:
    """A file of lycoris' own wrapper, with the header that SimpleTuner gives it."""

    def make(**options: Any) -> Any:
        return create_lycoris(model, 1.0, variant.dim, variant.alpha, **options)

    network, config = create(variant, {"target_name": names}, make)
    network.apply_to()
    draw(network)
    network.save_weights(str(path), variant.dtype, {"lycoris_config": json.dumps(config)})
    settle(path)


def sd15() -> nn.Module:
    return base_model(UNet2DConditionModel, **SD15)


def sdxl() -> nn.Module:
    return base_model(UNet2DConditionModel, **SDXL)


def flux() -> nn.Module:
    return base_model(FluxTransformer2DModel, **FLUX)


def lycoris_folders(folder: Path) -> None:
    """Every file is made on a fresh model: lycoris leaves its hooks in those that it has adapted."""
    for name, build, kind, encoders in (
        ("lycoris-sd15", sd15, "unet", 1),
        ("lycoris-sdxl", sdxl, "unet", 2),
        ("lycoris-flux", flux, "transformer", 0),
    ):
        (folder / name).mkdir()
        parts = [(kind, build()), *zip(("text_encoder", "text_encoder_2"), clips()[:encoders], strict=False)]
        for part, model in parts:
            (folder / name / part).mkdir()
            text = model.config.to_json_string() if part != kind else model.to_json_string()
            if part != kind:
                text = json.dumps({**json.loads(text), "architectures": [type(model).__name__]}, indent=2) + "\n"
            (folder / name / part / "config.json").write_text(text)

    for variant, how in SD15_VARIANTS.items():
        encoder = published(clips()[0])
        save_kohya(folder / f"lycoris-sd15/kohya-{variant}.safetensors", how, sd15(), SD15_NAMES, [encoder], "sd_v1")
        if "rs_lora" not in how.options:  # `create_lycoris` does not know it
            save_lycoris(folder / f"lycoris-sd15/lycoris-{variant}.safetensors", how, sd15(), SD15_NAMES)
    for variant in ("locon", "lokr", "locon-norm"):
        path = folder / f"lycoris-sd15/encoder-{variant}.safetensors"
        save_lycoris(path, SD15_VARIANTS[variant], published(clips()[0]), CLIP_NAMES)
    for variant, how in SDXL_VARIANTS.items():
        path = folder / f"lycoris-sdxl/kohya-{variant}.safetensors"
        save_kohya(path, how, sdxl(), SDXL_NAMES, [published(clip) for clip in clips()], "sdxl_base_v1-0")
        save_lycoris(folder / f"lycoris-sdxl/lycoris-{variant}.safetensors", how, sdxl(), SDXL_NAMES)
    for variant, how in FLUX_VARIANTS.items():
        save_kohya(folder / f"lycoris-flux/kohya-{variant}.safetensors", how, flux(), FLUX_NAMES, [], "flux1")
        save_lycoris(folder / f"lycoris-flux/lycoris-{variant}.safetensors", how, flux(), FLUX_NAMES)
    for variant, how in AUTHORS_VARIANTS.items():
        path = folder / f"lycoris-flux/authors-{variant}.safetensors"
        save_kohya(path, how, authors_flux(), list(FLUX_AUTHORS), [], "flux1")
