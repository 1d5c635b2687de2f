"""Adapters of Anima and Cosmos-Predict2 as their trainers write them, and as their readers take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checks import comes_back, same, sound
from image_bases import ANIMA, ANIMAS_CONDITIONER, QWEN3
from safetensors.torch import load_file
from trainers import DOWN_UP, Modules, Tensors, comfy, musubi, number, pairs, write

import adapterops as ao
from adapterops.errors import CannotRepresent

WITH_OTHERS = ("comfy", "comfy-down", "kohya", "diffusers", "diffusers-lycoris", "peft")
"""What has a place for the conditioner and the text encoder, too."""


def conditioned(writer: Callable[[Modules], Tensors]) -> Tensors:
    """The transformer's and the conditioner's modules, which the authors have in one."""
    return writer({**ANIMA.authors, **{f"llm_adapter.{name}": shape for name, shape in ANIMAS_CONDITIONER.items()}})


def sd_scripts() -> Tensors:
    """kohya-ss/sd-scripts `networks/lora_anima.py`, with `train_llm_adapter` and the text encoder."""
    return conditioned(musubi) | pairs(QWEN3, "lora_te_", DOWN_UP, 1.0, flat=True)


def sd_scripts_for_comfy() -> Tensors:
    """kohya-ss/sd-scripts `networks/convert_anima_lora_to_comfy.py`."""
    ends = (".lora_A.weight", ".lora_B.weight")
    made = pairs(
        {f"llm_adapter.{name}": shape for name, shape in ANIMAS_CONDITIONER.items()}, "diffusion_model.", ends, 1.0
    )
    made |= pairs(ANIMA.authors, "diffusion_model.", ends, 1.0)
    return made | pairs(QWEN3, "text_encoders.qwen3_06b.transformer.model.", ends, 1.0)


@pytest.mark.parametrize(
    ("tensors", "dialect", "parts"),
    [
        (conditioned(comfy), "comfy", 2),
        (conditioned(musubi), "kohya", 2),
        (sd_scripts(), "kohya", 3),
        (sd_scripts_for_comfy(), "comfy", 3),
        (pairs(ANIMA.diffusers, "transformer.") | pairs(ANIMAS_CONDITIONER, "text_conditioner."), "diffusers", 2),
    ],
    ids=["ai-toolkit", "sd-scripts, no encoder", "sd-scripts", "sd-scripts for Comfy", "diffusers"],
)
def test_the_conditioner_and_the_text_encoder_come_back(
    tensors: Tensors, dialect: str, parts: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "anima")
    names = ["transformer", "text_conditioner", "text_encoder"]
    assert sorted(c.name for c in found.components) == sorted(names[:parts])
    sound(path)
    comes_back(path, dialect, tmp_path, WITH_OTHERS)


def test_names_are_those_of_each_reader(tmp_path: Path) -> None:
    """What sd-scripts converts for Comfy is what we convert it to."""
    path = write(tmp_path / "a.safetensors", sd_scripts())
    ao.convert(path, "comfy", tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), sd_scripts_for_comfy())
    ao.convert(path, "diffusers", tmp_path / "c.safetensors")
    keys = set(load_file(tmp_path / "c.safetensors"))
    assert {
        "transformer.transformer_blocks.27.ff.net.2.lora_A.weight",
        "transformer.transformer_blocks.1.norm2.linear_2.lora_B.weight",
        "text_conditioner.blocks.5.self_attn.o_proj.lora_A.weight",
        "text_encoder.layers.27.mlp.down_proj.lora_B.weight",
    } <= keys


def test_what_has_no_place_for_the_conditioner_says_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", conditioned(comfy))
    with pytest.raises(CannotRepresent, match="text_conditioner"):
        ao.convert(path, "lycoris", tmp_path / "b.safetensors")
    done = ao.convert(path, "lycoris", tmp_path / "b.safetensors", allow_drop=True)
    assert len(done.dropped) == len(ANIMAS_CONDITIONER)


def test_a_published_file_with_magnitudes(tmp_path: Path) -> None:
    """LoKr whose factors are whole, with DoRA magnitudes on some modules, as LyCORIS writes them for Comfy."""
    tensors: Tensors = {}
    for name in ("blocks.0.cross_attn.q_proj", "blocks.0.self_attn.k_proj"):
        stem = f"diffusion_model.{name}"
        tensors |= {f"{stem}.lokr_w1": torch.ones(8, 8), f"{stem}.lokr_w2": torch.ones(256, 256)}
        tensors[f"{stem}.alpha"] = number(1e10)
    tensors["diffusion_model.blocks.0.cross_attn.q_proj.dora_scale"] = torch.ones(2048, 1)
    path = write(tmp_path / "a.safetensors", tensors)
    assert ao.inspect(path).architecture.value == "anima"
    comes_back(path, "comfy", tmp_path, ("kohya", "comfy-down"))
