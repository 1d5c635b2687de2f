"""What writers call base models in headers, and the tables that those are."""

from __future__ import annotations

import pytest

from adapterops.architectures import names
from adapterops.architectures.declared import in_file, named

ONETRAINER = {
    "Chroma1/lora": {"chroma"},
    "Flux.1-dev/lora": {"flux"},
    "Flux.1-fill-dev/lora": {"flux"},
    "Flux.2/lora": {"flux2_dev", "flux2_klein_4b", "flux2_klein_9b"},
    "hunyuan-video/lora": {"hunyuan_video"},
    "Qwen-Image/lora": {"qwen_image"},
    "stable-diffusion-v3.5/lora": {"sd35_medium", "sd35_large"},
    "stable-diffusion-v3-medium/lora": {"sd3"},
    "stable-diffusion-xl-v1-base/lora": {"sdxl"},
    "Z-Image/lora": {"z_image"},
    "stable-diffusion-v1/lora": {"sd1"},
    "stable-diffusion-v1-inpainting/lora": {"sd1_inpainting"},
    "stable-diffusion-v2-inpainting/lora": {"sd2_inpainting"},
    "stable-diffusion-v2-depth/lora": {"sd2_depth"},
    "stable-diffusion-xl-v1-base-inpainting/lora": {"sdxl_inpainting"},
    "stable-cascade-v1-prior/lora": {"stable_cascade"},
}
"""Nerogar/OneTrainer `resources/sd_model_spec/*-lora.json`."""
MUSUBI = {
    "hunyuan-video/lora": {"hunyuan_video"},
    "framepack/lora": {"hunyuan_video"},
    "wan2.1/lora": {"wan_1_3b", "wan_14b", "wan_14b_i2v", "wan_5b"},
    "Flux.2-dev/lora": {"flux2_dev"},
    "Flux.2-klein-4b/lora": {"flux2_klein_4b"},
    "Qwen-Image-Edit-2511/lora": {"qwen_image"},
    "Qwen-Image-Layered/lora": {"qwen_image"},
    "Z-Image/lora": {"z_image"},
    "hunyuan-video-1.5/lora": {"hunyuan_video_1_5"},
    "HiDream-O1-Image/lora": set(),
}
"""kohya-ss/musubi-tuner `src/musubi_tuner/utils/sai_model_spec.py`; two that are other models than they sound."""
AI_TOOLKIT = {
    "flux.1": {"flux"},
    "flux.1_kontext": {"flux"},
    "sd_3": {"sd3", "sd35_medium", "sd35_large"},
    "chroma": {"chroma"},
    "flux2_klein_9b": {"flux2_klein_9b"},
    "wan_2.1": {"wan_1_3b", "wan_14b", "wan_14b_i2v", "wan_5b"},
    "wan_2.2_14b": {"wan_14b"},
    "wan_2.2_5b": {"wan_5b"},
    "qwen_image": {"qwen_image"},
    "zimage": {"z_image"},
    "ltx2": {"ltx_2", "ltx_2_3"},
    "minimax_h3": {"minimax_h3"},
    "minimax_h3_ref2va": {"minimax_h3"},
    "chroma_radiance": set(),
    "zeta_chroma": set(),
}
"""ostris/ai-toolkit: `get_base_model_version` of its models."""
SIMPLETUNER = {
    "flux-dev/lora": {"flux"},
    "flux-kontext/lora": {"flux"},
    "flux2-dev/lora": {"flux2_dev"},
    "flux2-klein-4b/lora": {"flux2_klein_4b"},
    "chroma-hd/lora": {"chroma"},
    "sd3-medium/lora": {"sd35_medium"},
    "wan-t2v-480p-1.3b-2.1/lora": {"wan_1_3b"},
    "wan-i2v-14b-2.1/lora": {"wan_14b_i2v"},
    "wan-i2v-14b-2.2-high/lora": {"wan_14b"},
    "wan-ti2v-5b-2.2/lora": {"wan_5b"},
    "qwen_image-v1.0/lora": {"qwen_image"},
    "ltxvideo-0.9.5/lora": {"ltx_2b"},
    "ltxvideo2-dev/lora": {"ltx_2"},
    "kolors-1.0/lora": {"kolors"},
    "longcat_image-final/lora": {"longcat_image"},
    "stable_cascade-stage-c/lora": {"stable_cascade"},
    "stable_cascade-stage-c-lite/lora": set(),
}
"""bghira/SimpleTuner `simpletuner/helpers/training/save_hooks.py` (`_derive_modelspec_architecture`): family and flavour."""
HUB = {
    "Qwen/Qwen-Image-Edit-2511": {"qwen_image"},
    "Qwen/Qwen-Image-2512": {"qwen_image"},
    "Qwen/Qwen-Image-2.1": {"qwen_image_2_1"},
    "black-forest-labs/flux-3-image-klein-base": {"flux3_klein"},
    "stabilityai/stable-diffusion-xl-refiner-1.0": {"sdxl_refiner"},
    "meituan-longcat/LongCat-Image-Edit": {"longcat_image"},
    "meituan-longcat/LongCat-Video": set(),
    "MiniMaxAI/MiniMax-H3": {"minimax_h3"},
    "ACE-Step/acestep-v15-turbo-diffusers": {"ace_step_1_5"},
    "ACE-Step/acestep-v15-xl-turbo-diffusers": {"ace_step_1_5_xl"},
    "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers": {"hunyuan_dit"},
    "stabilityai/stable-cascade-prior": {"stable_cascade"},
    "Kwai-Kolors/Kolors-diffusers": {"kolors"},
    "timbrooks/instruct-pix2pix": {"sd1_instruct_pix2pix"},
    "stable-diffusion-v1-5/stable-diffusion-inpainting": {"sd1_inpainting"},
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": {"sdxl_inpainting"},
    "Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers": {"wan_14b_flf2v"},
    "Wan-AI/Wan2.1-VACE-1.3B-diffusers": {"wan_vace_1_3b"},
    "nvidia/Cosmos-Predict2-14B-Text2Image": {"cosmos_predict2_14b"},
    "nvidia/Cosmos-Predict2.5-2B": {"anima"},
    "Wan-AI/Wan2.2-Animate-14B-Diffusers": {"wan_animate_14b"},
    "alibaba-pai/Wan2.1-Fun-V1.1-14B-InP": {"wan_14b_i2v"},
    "Skywork/SkyReels-V2-DF-1.3B-540P": {"wan_1_3b"},
    "Skywork/SkyReels-V2-I2V-14B-720P-Diffusers": {"wan_14b_i2v"},
}
"""Repositories of the models themselves, as PEFT configs and trainers name them."""


@pytest.mark.parametrize("said", [ONETRAINER, MUSUBI, AI_TOOLKIT, SIMPLETUNER, HUB])
def test_names_in_headers(said: dict[str, set[str]]) -> None:
    assert {value: set(named(value)) for value in said} == said
    assert set().union(*said.values()) <= set(names())


def test_names_in_a_file() -> None:
    assert in_file({"ss_base_model_version": "wan_2.2_14b", "other": "chroma"}) == {"wan_14b"}
    assert in_file({}, {"base_model_name_or_path": "lodestones/Chroma1-HD"}) == {"chroma"}
    assert in_file({"modelspec.architecture": "flux-dev/lora"}, {"base_model_name_or_path": "lodestones/Chroma"}) == {
        "flux",
        "chroma",
    }
    assert in_file({}, {"base_model_name_or_path": None}) == set()
