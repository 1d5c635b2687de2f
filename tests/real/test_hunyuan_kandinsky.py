"""Adapters of HunyuanVideo 1.5, HunyuanImage 2.1 and Kandinsky 5 as their trainers write them, and as their readers take them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from base_rows import Base
from checks import comes_back
from safetensors.torch import load_file
from trainers import CLIP, DOWN_UP, Modules, musubi, pairs, write
from video_bases import HUNYUANS_AND_KANDINSKYS

import adapterops as ao
from adapterops.architectures.declared import named


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


@pytest.mark.parametrize("base", HUNYUANS_AND_KANDINSKYS, ids=lambda base: base.name)
def test_who_loads_it_is_told(base: Base, tmp_path: Path) -> None:
    """diffusers' pipelines have a loader for Kandinsky alone."""
    path = write(tmp_path / "a.safetensors", pairs(base.diffusers or base.authors, "transformer."))
    codes = {finding.rule.code for finding in ao.validate(path, targets=["diffusers"], select=["L5"])}
    assert codes == (set() if base.name.startswith("kandinsky") else {"L509"})


def test_comfys_clip_of_hunyuan_video(tmp_path: Path) -> None:
    """Comfy-Org/ComfyUI `comfy/text_encoders/hunyuan_video.py` calls it `clip_l`, as elsewhere."""
    clip = pairs(CLIP, "text_encoders.clip_l.transformer.text_model.", DOWN_UP, 2.0)
    blocks = pairs({"double_blocks.19.img_attn.proj": (3072, 3072)}, "diffusion_model.", DOWN_UP, 2.0)
    path = write(tmp_path / "a.safetensors", clip | blocks)
    found = ao.inspect(path)
    assert found.architecture.value == "hunyuan_video"
    assert {update.component for update in ao.load(path)} == {"transformer", "text_encoder_2"}
    comes_back(path, found.dialect, tmp_path, ("kohya",))
