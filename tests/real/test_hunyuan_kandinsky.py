"""Adapters of HunyuanVideo 1.5, HunyuanImage 2.1 and Kandinsky 5 as their trainers write them, and as their readers take them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainers import sound
from test_wan_z_image import Modules, comes_back, comfy, deltas, musubi
from trainers import CLIP, DOWN_UP, Tensors, lokr, pairs, write

import adapterops as ao
from adapterops.adapter import Certainty
from adapterops.architectures.declared import named
from adapterops.errors import AdapterOpsError


def stream(block: int, width: int, apart: bool, stream: str = "img") -> dict[str, tuple[int, int]]:
    """One stream of a double block by the authors' names, with q, k and v apart or in one."""
    stem = f"double_blocks.{block}.{stream}_"
    inputs = {f"{stem}attn_{p}": (width, width) for p in "qkv"} if apart else {f"{stem}attn_qkv": (3 * width, width)}
    ends = {f"{stem}attn_proj": (width, width), f"{stem}mod.linear": (6 * width, width)}
    return inputs | ends | {f"{stem}mlp.fc1": (4 * width, width), f"{stem}mlp.fc2": (width, 4 * width)}


def video(block: int) -> Modules:
    """Modules of HunyuanVideo 1.5, which kohya-ss/musubi-tuner trains (`networks/lora_hv_1_5.py`)."""
    return stream(block, 2048, apart=True) | {f"double_blocks.{block}.txt_attn_{p}": (2048, 2048) for p in "qkv"}


def image(block: int) -> Modules:
    """Modules of HunyuanImage 2.1, which kohya-ss/sd-scripts trains (`networks/lora_hunyuan_image.py`)."""
    single = f"single_blocks.{block}."
    own = {
        f"{single}linear1": (25088, 3584),
        f"{single}linear2": (3584, 17920),
        f"{single}modulation.linear": (10752, 3584),
    }
    return stream(block, 3584, apart=False, stream="txt") | own


def kandinsky(width: int, hidden: int, last: int) -> Modules:
    """Modules of a Kandinsky 5, which kohya-ss/musubi-tuner trains (`networks/lora_kandinsky.py`)."""
    stem = f"visual_transformer_blocks.{last}."
    names = [f"{stem}{a}_attention.{p}" for a in ("self", "cross") for p in ("to_query", "to_value", "out_layer")]
    names.append("text_transformer_blocks.0.self_attention.to_key")
    feed = {f"{stem}feed_forward.in_layer": (hidden, width), f"{stem}feed_forward.out_layer": (width, hidden)}
    return dict.fromkeys(names, (width, width)) | feed


BASES: dict[str, Modules] = {
    "hunyuan_video_1_5": video(53),
    "hunyuan_image": image(19),
    "kandinsky5_lite": kandinsky(1792, 7168, 31),
    "kandinsky5_image": kandinsky(2560, 10240, 49),
    "kandinsky5_pro": kandinsky(4096, 16384, 59),
}
FEW: dict[str, Modules] = {
    "hunyuan_video_1_5": {"double_blocks.0.img_attn_q": (2048, 2048)},
    "hunyuan_image": {"double_blocks.0.img_attn_qkv": (10752, 3584)},
    "kandinsky5_lite": {"visual_transformer_blocks.0.self_attention.to_query": (1792, 1792)},
    "kandinsky5_image": {"visual_transformer_blocks.0.cross_attention.to_key": (2560, 2560)},
    "kandinsky5_pro": {"text_transformer_blocks.0.feed_forward.in_layer": (16384, 4096)},
}
AS_DIFFUSERS: dict[str, Modules] = {
    "hunyuan_video_1_5": {
        **{f"transformer_blocks.53.attn.to_{p}": (2048, 2048) for p in ("q", "k", "v", "out.0")},
        "transformer_blocks.0.attn.add_k_proj": (2048, 2048),
        "transformer_blocks.0.ff.net.0.proj": (8192, 2048),
        "context_embedder_2.linear_3": (2048, 2048),
    },
    "hunyuan_image": {
        **{f"transformer_blocks.19.attn.to_{p}": (3584, 3584) for p in ("q", "k", "v", "out.0")},
        "single_transformer_blocks.39.proj_mlp": (14336, 3584),
        "transformer_blocks.0.ff_context.net.2": (3584, 14336),
    },
    **{name: BASES[name] for name in BASES if name.startswith("kandinsky")},
}
COMFYS: dict[str, Modules] = {
    "hunyuan_video_1_5": {
        "double_blocks.53.img_attn.qkv": (6144, 2048),
        "double_blocks.0.txt_attn.proj": (2048, 2048),
        "double_blocks.0.img_mlp.0": (8192, 2048),
        "double_blocks.0.txt_mod.lin": (12288, 2048),
        "txt_in.individual_token_refiner.blocks.1.self_attn.qkv": (6144, 2048),
        "byt5_in.fc2": (2048, 2048),
        "vision_in.proj.1": (1152, 1152),
    },
    "hunyuan_image": {
        "double_blocks.0.img_attn.qkv": (10752, 3584),
        "double_blocks.0.txt_mlp.2": (3584, 14336),
        "single_blocks.39.modulation.lin": (10752, 3584),
        "single_blocks.0.linear1": (25088, 3584),
        "byt5_in.fc3": (3584, 2048),
    },
}
"""Comfy-Org/ComfyUI `comfy/ldm/hunyuan_video/model.py`, which tdrussell/diffusion-pipe trains for HunyuanVideo 1.5."""

WRITERS: dict[str, tuple[str, Callable[[str], Tensors]]] = {
    "musubi-tuner and sd-scripts": ("kohya", lambda base: musubi(BASES[base])),
    "musubi-tuner, converted": ("comfy", lambda base: comfy(BASES[base])),
    "finetrainers": ("diffusers", lambda base: pairs(AS_DIFFUSERS[base], "transformer.")),
    "SimpleTuner's LyCORIS": ("lycoris", lambda base: pairs(AS_DIFFUSERS[base], "lycoris_", DOWN_UP, 1.0, flat=True)),
    "OneTrainer": ("onetrainer", lambda base: pairs(AS_DIFFUSERS[base], "lora_transformer_", DOWN_UP, 1.0, flat=True)),
    "peft": ("peft", lambda base: pairs(AS_DIFFUSERS[base], "base_model.model.")),
    "DiffSynth-Studio": ("diffsynth", lambda base: pairs(AS_DIFFUSERS[base])),
    "few, flat": ("kohya", lambda base: musubi(FEW[base])),
    "few, dotted": ("comfy", lambda base: comfy(FEW[base])),
    "Comfy": ("comfy-hunyuan", lambda base: comfy(COMFYS[base])),
    "Comfy, lora_down": ("comfy-down-hunyuan", lambda base: pairs(COMFYS[base], "diffusion_model.", DOWN_UP, 2.0)),
    "converted for Comfy": ("kohya-hunyuan", lambda base: musubi(COMFYS[base])),
}
ELSEWHERE = ("comfy", "kohya", "kohya-diffusers", "peft", "diffusers")
CASES = [(b, w) for w in WRITERS for b in BASES if b in COMFYS or "Comfy" not in w]


@pytest.mark.parametrize(("base", "writer"), CASES)
def test_files_come_back(base: str, writer: str, tmp_path: Path) -> None:
    dialect, make = WRITERS[writer]
    path = write(tmp_path / "a.safetensors", make(base))
    found = ao.inspect(path)
    assert found.architecture.value == base
    assert found.architecture.certainty is Certainty.DERIVED
    assert found.dialect == dialect
    if dialect == "peft":
        return
    sound(path)
    others = ("comfy-hunyuan", "kohya-hunyuan") if base in COMFYS else ()
    comes_back(path, dialect, tmp_path, (*ELSEWHERE, *others))


@pytest.mark.parametrize("base", BASES)
def test_lokr_comes_back(base: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lokr(BASES[base], "diffusion_model.", 16, 4, 2.0))
    assert ao.inspect(path).architecture.value == base
    comes_back(path, "comfy", tmp_path, ("kohya",))


def test_comfy_has_in_one_what_the_authors_have_apart(tmp_path: Path) -> None:
    """As kohya-ss/musubi-tuner `networks/convert_hunyuan_video_1_5_lora_to_comfy.py` makes it: a block diagonal, thrice the
    rank and the alpha; and a file that ComfyUI would pass over says so."""
    modules: Modules = {f"double_blocks.0.img_attn_{p}": (2048, 2048) for p in "qkv"}
    path = write(tmp_path / "a.safetensors", musubi(modules))
    source = load_file(path)
    ao.convert(path, "kohya-hunyuan", tmp_path / "b.safetensors")
    made = load_file(tmp_path / "b.safetensors")
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    assert set(made) == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
    parts = [source[f"lora_unet_double_blocks_0_img_attn_{p}.lora_up.weight"] for p in "qkv"]
    downs = [source[f"lora_unet_double_blocks_0_img_attn_{p}.lora_down.weight"] for p in "qkv"]
    assert torch.equal(made[f"{stem}.lora_up.weight"], torch.block_diag(*parts))
    assert torch.equal(made[f"{stem}.lora_down.weight"], torch.cat(downs))
    assert made[f"{stem}.alpha"] == 3 * source["lora_unet_double_blocks_0_img_attn_q.alpha"]
    told = "comfy-hunyuan"
    assert any(told in note for note in ao.convert(path, "comfy", tmp_path / "c.safetensors").notes)
    assert not any(told in note for note in ao.convert(path, told, tmp_path / "d.safetensors").notes)


@pytest.mark.parametrize(
    ("said", "bases"),
    [
        ("hunyuan-video-1.5/lora", {"hunyuan_video_1_5"}),
        ("tencent/HunyuanVideo-1.5", {"hunyuan_video_1_5"}),
        ("hunyuanvideo-community/HunyuanVideo-1.5-Diffusers-480p_t2v", {"hunyuan_video_1_5"}),
        ("tencent/HunyuanVideo", {"hunyuan_video"}),
        ("hunyuan-video/lora", {"hunyuan_video"}),
        ("hunyuan-image-2.1/lora", {"hunyuan_image"}),
        ("Kandinsky-5/lora", {"kandinsky5_lite", "kandinsky5_image", "kandinsky5_pro"}),
        ("kandinskylab/Kandinsky-5.0-I2V-Pro-sft-5s-Diffusers", {"kandinsky5_pro"}),
        ("kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers", {"kandinsky5_image"}),
        ("kandinskylab/Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers", {"kandinsky5_lite"}),
    ],
)
def test_headers_name_them(said: str, bases: set[str]) -> None:
    """kohya-ss/musubi-tuner `utils/sai_model_spec.py`, kohya-ss/sd-scripts `library/sai_model_spec.py`, and the Hub."""
    assert set(named(said)) == bases


CONFIGS: dict[str, dict[str, Any]] = {
    "hunyuan_video_1_5": {
        "_class_name": "HunyuanVideo15Transformer3DModel",
        "in_channels": 9,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 16,
        "text_embed_2_dim": 8,
        "image_embed_dim": 8,
        "rope_axes_dim": [4, 6, 6],
    },
    "hunyuan_image": {
        "_class_name": "HunyuanImageTransformer2DModel",
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": 16,
        "text_embed_2_dim": 8,
        "rope_axes_dim": [8, 8],
    },
    "kandinsky5_lite": {
        "_class_name": "Kandinsky5Transformer3DModel",
        "in_visual_dim": 4,
        "out_visual_dim": 4,
        "in_text_dim": 16,
        "in_text_dim2": 8,
        "time_dim": 8,
        "model_dim": 32,
        "ff_dim": 48,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": [4, 6, 6],
        "visual_cond": True,
    },
}
OWN: dict[str, dict[str, tuple[tuple[int, int], list[str]]]] = {
    "hunyuan_video_1_5": {
        "double_blocks.0.img_attn_k": ((32, 32), ["transformer_blocks.0.attn.to_k"]),
        "double_blocks.0.txt_attn_v": ((32, 32), ["transformer_blocks.0.attn.add_v_proj"]),
        "double_blocks.0.txt_mlp.fc1": ((128, 32), ["transformer_blocks.0.ff_context.net.0.proj"]),
        "byt5_in.fc3": ((32, 2048), ["context_embedder_2.linear_3"]),
        "vision_in.proj.3": ((32, 8), ["image_embedder.linear_2"]),
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (
            (96, 32),
            [f"context_embedder.token_refiner.refiner_blocks.0.attn.to_{p}" for p in "qkv"],
        ),
    },
    "hunyuan_image": {
        "double_blocks.0.img_attn_qkv": ((96, 32), [f"transformer_blocks.0.attn.to_{p}" for p in "qkv"]),
        "double_blocks.0.img_mod.linear": ((192, 32), ["transformer_blocks.0.norm1.linear"]),
        "single_blocks.0.linear1": (
            (224, 32),
            [*(f"single_transformer_blocks.0.attn.to_{p}" for p in "qkv"), "single_transformer_blocks.0.proj_mlp"],
        ),
        "single_blocks.0.linear2": ((32, 160), ["single_transformer_blocks.0.proj_out"]),
        "time_in.mlp.2": ((32, 32), ["time_guidance_embed.timestep_embedder.linear_2"]),
    },
    "kandinsky5_lite": {
        name: (shape, [name])
        for name, shape in {
            "visual_transformer_blocks.0.cross_attention.to_value": (32, 32),
            "text_transformer_blocks.0.feed_forward.out_layer": (32, 48),
            "visual_embeddings.in_layer": (32, 36),
            "out_layer.modulation.out_layer": (64, 8),
        }.items()
    },
}
"""Modules by the authors' names, and diffusers': huggingface/diffusers `scripts/convert_hunyuan_video1_5_to_diffusers.py` and
`convert_hunyuan_image_to_diffusers.py`."""


@pytest.mark.parametrize("reader", ["diffusers", "peft"])
@pytest.mark.parametrize("base", CONFIGS)
def test_the_class_of_diffusers_takes_what_we_write(base: str, reader: str, tmp_path: Path) -> None:
    """A small one, built from its config: the authors' names are known for it, too, and every update reaches its module."""
    config = CONFIGS[base]
    model: Any = getattr(importlib.import_module("diffusers"), config["_class_name"]).from_config(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    modules = {name: shape for name, (shape, _) in OWN[base].items()}
    path = write(tmp_path / "a.safetensors", {key: t.float() for key, t in comfy(modules).items()})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if reader == "diffusers":
        ao.convert(path, "diffusers", tmp_path / "b.safetensors", base=tmp_path / "config.json")
        model.load_lora_adapter(load_file(tmp_path / "b.safetensors"), prefix="transformer")
        model.fuse_lora()
        model.unload_lora()
    else:
        ao.convert(path, "peft", tmp_path / "peft", base=tmp_path / "config.json")
        peft: Any = importlib.import_module("peft")
        model = peft.PeftModel.from_pretrained(model, tmp_path / "peft").merge_and_unload()
    change = {name: value - before[name] for name, value in model.state_dict().items()}
    wanted = {name.removeprefix("diffusion_model."): delta for name, delta in deltas(load_file(path)).items()}
    for name, (_, own) in OWN[base].items():
        made = torch.cat([change.pop(f"{module}.weight") for module in own])
        assert torch.allclose(made, wanted[name], atol=1e-5)
    assert [key for key, value in change.items() if torch.any(value != 0)] == []


@pytest.mark.parametrize("base", BASES)
def test_who_loads_it_is_told(base: str, tmp_path: Path) -> None:
    """diffusers' pipelines have a loader for Kandinsky alone."""
    path = write(tmp_path / "a.safetensors", pairs(AS_DIFFUSERS[base], "transformer."))
    codes = {finding.rule.code for finding in ao.validate(path, targets=["diffusers"], select=["L5"])}
    assert codes == (set() if base.startswith("kandinsky") else {"L509"})


OTHERS: dict[str, Modules] = {
    "HunyuanVideo 1.5, another width": stream(0, 1536, apart=True),
    "HunyuanImage, another width": image(0) | stream(0, 3200, apart=False, stream="txt"),
    "Kandinsky 5, another width": kandinsky(2048, 8192, 31),
    "Kandinsky 5 Lite, as deep as Pro": kandinsky(1792, 7168, 59),
}


@pytest.mark.parametrize("writer", [comfy, musubi])
@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not_taken_for_these(name: str, writer: Callable[[Modules], Tensors], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(OTHERS[name]))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(AdapterOpsError):
        ao.load(path)


def test_comfys_clip_of_hunyuan_video(tmp_path: Path) -> None:
    """Comfy-Org/ComfyUI `comfy/text_encoders/hunyuan_video.py` calls it `clip_l`, as elsewhere."""
    clip = pairs(CLIP, "text_encoders.clip_l.transformer.text_model.", DOWN_UP, 2.0)
    blocks = pairs({"double_blocks.19.img_attn.proj": (3072, 3072)}, "diffusion_model.", DOWN_UP, 2.0)
    path = write(tmp_path / "a.safetensors", clip | blocks)
    found = ao.inspect(path)
    assert found.architecture.value == "hunyuan_video"
    assert {update.component for update in ao.load(path)} == {"transformer", "text_encoder_2"}
    comes_back(path, found.dialect, tmp_path, ("kohya",))
