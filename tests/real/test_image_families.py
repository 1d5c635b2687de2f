"""What is particular to AuraFlow, Krea 2 and Lumina-Image 2.0 beside what holds of every base model."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from checks import comes_back, same, sound
from image_bases import GEMMA, KREA, LUMINAS_BLOCKS
from safetensors.torch import load_file
from trainers import DOWN_UP, Tensors, comfy, musubi, pairs, some, write

import adapterops as ao
from adapterops.errors import AdapterOpsError


def test_the_single_blocks_attention_alone_is_flux_1s(tmp_path: Path) -> None:
    """AuraFlow is older and has the same names; far more adapters are Flux.1's."""
    modules = {f"single_transformer_blocks.{n}.attn.to_{p}": (3072, 3072) for n in (7, 20) for p in "qkv"}
    path = write(tmp_path / "a.safetensors", pairs(modules, "transformer."))
    found = ao.inspect(path).architecture
    assert found.value == "flux"
    assert "auraflow" in found.others


def test_krea_2s_table_is_of_diffusers_form(tmp_path: Path) -> None:
    """The authors have a block's table as one row of numbers, which is refused rather than taken for the other."""
    flat = comfy(KREA.authors) | {"diffusion_model.blocks.0.mod.lin.diff": some(36864)}
    with pytest.raises(AdapterOpsError, match=r"mod\.lin"):
        ao.load(write(tmp_path / "a.safetensors", flat))


def sd_scripts() -> Tensors:
    """kohya-ss/sd-scripts `networks/lora_lumina.py`, with the text encoder."""
    return musubi(LUMINAS_BLOCKS) | pairs(GEMMA, "lora_te_", DOWN_UP, 1.0, flat=True)


def test_luminas_text_encoder_comes_with_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", sd_scripts())
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("kohya", "lumina2")
    assert sorted(c.name for c in found.components) == ["text_encoder", "transformer"]
    sound(path)
    comes_back(path, "kohya", tmp_path, ("comfy", "kohya-diffusers", "diffusers", "diffusers-lycoris", "peft"))
    ao.convert(path, "comfy", tmp_path / "b.safetensors")
    keys = set(load_file(tmp_path / "b.safetensors"))
    assert "text_encoders.gemma2_2b.transformer.model.layers.25.mlp.down_proj.lora_A.weight" in keys


def test_diffusers_takes_no_part_of_luminas_block(tmp_path: Path) -> None:
    """Attention alone is refused by its conversion, not by ours: what we make of it needs none there."""
    path = write(tmp_path / "a.safetensors", comfy({"layers.0.attention.qkv": (3840, 2304)}))
    mixin: Any = importlib.import_module("diffusers.loaders.lora_pipeline").Lumina2LoraLoaderMixin
    with pytest.raises(KeyError):
        mixin.lora_state_dict(load_file(path))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    made = load_file(tmp_path / "b.safetensors")
    same(mixin.lora_state_dict(dict(made)), made)


def test_z_image_stays_what_it_is(tmp_path: Path) -> None:
    """Comfy has both in one file of code, with most names alike."""
    path = write(tmp_path / "a.safetensors", comfy({"layers.0.attention.qkv": (11520, 3840)}))
    assert ao.inspect(path).architecture.value == "z_image"
