"""Adapters of Stable Diffusion XL's refiner."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from checks import comes_back, sound
from trainers import DOWN_UP, Modules, Tensors, lokr, pairs, write

import adapterops as ao
from adapterops.adapter import Certainty
from adapterops.architectures import load

YAML: dict[str, Any] = {
    "adm_in_channels": 2560,
    "num_classes": "sequential",
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 384,
    "attention_resolutions": [4, 2],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "transformer_depth": 4,
    "context_dim": [1280, 1280, 1280, 1280],
}
"""Stability-AI/generative-models `configs/inference/sd_xl_refiner.yaml`."""
DIFFUSERS: Modules = {
    "down_blocks.1.attentions.0.transformer_blocks.3.attn2.to_k": (768, 1280),
    "down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q": (1536, 1536),
    "mid_block.attentions.0.transformer_blocks.3.ff.net.2": (1536, 6144),
    "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v": (1536, 1280),
    "up_blocks.2.attentions.0.proj_in": (768, 768),
}
AUTHORS: Modules = {
    "input_blocks.4.1.transformer_blocks.3.attn2.to_k": (768, 1280),
    "input_blocks.8.1.transformer_blocks.0.attn1.to_q": (1536, 1536),
    "middle_block.1.transformer_blocks.3.ff.net.2": (1536, 6144),
    "output_blocks.5.1.transformer_blocks.0.attn2.to_v": (1536, 1280),
    "output_blocks.6.1.proj_in": (768, 768),
    "label_emb.0.0": (1536, 2560),
}
ENCODER: Modules = {"text_model.encoder.layers.31.self_attn.q_proj": (1280, 1280)}
FILES: dict[str, Tensors] = {
    "diffusers": pairs(DIFFUSERS, "unet."),
    "kohya": pairs(AUTHORS, "lora_unet_", DOWN_UP, 1.0, flat=True)
    | pairs(ENCODER, "lora_te2_", DOWN_UP, 1.0, flat=True),
    "kohya-diffusers": pairs(DIFFUSERS, "lora_unet_", DOWN_UP, 1.0, flat=True),
}


def test_the_config_is_what_diffusers_makes_of_the_authors() -> None:
    conversion: Any = importlib.import_module("diffusers.loaders.single_file_utils")
    document = {"model": {"params": {"network_config": {"params": YAML}}}}
    document["model"]["params"]["first_stage_config"] = {"params": {"ddconfig": {"ch_mult": [1, 2, 4, 4]}}}
    theirs = conversion.create_unet_diffusers_config_from_ldm(document, {}, image_size=1024)
    config = load("sdxl_refiner").components["unet"].config
    # Four where every block has as many, or block by block; the class takes either.
    depth = theirs.pop("transformer_layers_per_block")
    assert set(depth if isinstance(depth, list | tuple) else [depth]) == {4}
    same = {key for key in config if key in theirs}
    assert {
        "block_out_channels",
        "down_block_types",
        "up_block_types",
        "cross_attention_dim",
        "attention_head_dim",
    } <= same
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in theirs.items()}
    assert {key: config[key] for key in same} == {key: plain[key] for key in same}


@pytest.mark.parametrize("dialect", FILES)
def test_files_come_back(dialect: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", FILES[dialect])
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value, found.architecture.others) == (dialect, "sdxl_refiner", ())
    assert found.architecture.certainty is Certainty.DERIVED
    sound(path)
    comes_back(path, dialect, tmp_path, ("kohya", "kohya-diffusers", "diffusers-lycoris", "peft", "diffusers"))


@pytest.mark.parametrize("name", DIFFUSERS)
def test_a_module_of_the_unet_tells_it(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs({name: DIFFUSERS[name]}, "unet."))
    assert ao.inspect(path).architecture.value == "sdxl_refiner"


def test_the_text_encoder_alone_stays_the_base_s(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(ENCODER, "lora_te2_", DOWN_UP, 1.0, flat=True))
    assert ao.inspect(path).architecture.value == "sdxl"


def test_lokr_of_lycoris(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lokr(DIFFUSERS, "unet.", 8, 4, 2.0))
    assert ao.inspect(path).architecture.value == "sdxl_refiner"


def test_diffusers_loads_what_we_write(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", FILES["kohya-diffusers"])
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    checked = ao.validate(tmp_path / "b.safetensors", targets=["diffusers"], load_test=True, select=["L"])
    assert [finding.rule.code for finding in checked] == []
