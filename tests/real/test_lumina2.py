"""Adapters of Lumina-Image 2.0 as their trainers write them, and as their readers take them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainers import same, sound
from test_wan_z_image import Modules, agrees, comes_back, comfy, musubi
from trainers import DOWN_UP, Tensors, ai_toolkit, loha, lokr, pairs, write

import adapterops as ao
from adapterops.errors import CannotRepresent, UnknownArchitectureOfFile


def block(stem: str, modulated: bool = True) -> Modules:
    """All that is trained of a block, by its authors' names."""
    own: Modules = {
        f"{stem}.attention.qkv": (3840, 2304),
        f"{stem}.attention.out": (2304, 2304),
        **{f"{stem}.feed_forward.w{n}": (9216, 2304) for n in (1, 3)},
        f"{stem}.feed_forward.w2": (2304, 9216),
    }
    return {**own, f"{stem}.adaLN_modulation.1": (9216, 1024)} if modulated else own


BLOCKS: Modules = {
    **block("layers.0"),
    **block("noise_refiner.0"),
    **block("noise_refiner.1"),
    **block("context_refiner.0", modulated=False),
    **block("context_refiner.1", modulated=False),
}
SOME: Modules = {
    "layers.25.attention.qkv": (3840, 2304),
    "layers.25.attention.out": (2304, 2304),
    "context_refiner.1.feed_forward.w2": (2304, 9216),
    "noise_refiner.0.adaLN_modulation.1": (9216, 1024),
    "final_layer.adaLN_modulation.1": (2304, 1024),
}
GEMMA: Modules = {
    "layers.0.self_attn.q_proj": (2048, 2304),
    "layers.25.self_attn.v_proj": (1024, 2304),
    "layers.25.mlp.down_proj": (2304, 9216),
}
AS_DIFFUSERS: Modules = {
    "layers.0.attn.to_q": (2304, 2304),
    "layers.0.attn.to_k": (768, 2304),
    "layers.25.attn.to_out.0": (2304, 2304),
    "noise_refiner.1.feed_forward.linear_1": (9216, 2304),
    "layers.3.norm1.linear": (9216, 1024),
}
ELSEWHERE = ("comfy", "comfy-down", "kohya", "kohya-diffusers", "lycoris", "diffusers-lycoris", "peft", "diffusers")


def sd_scripts() -> Tensors:
    """kohya-ss/sd-scripts `networks/lora_lumina.py`, with the text encoder."""
    return musubi(BLOCKS) | pairs(GEMMA, "lora_te_", DOWN_UP, 1.0, flat=True)


@pytest.mark.parametrize(
    ("tensors", "dialect"),
    [
        (comfy(SOME), "comfy"),
        (pairs(SOME, "diffusion_model.", DOWN_UP, 2.0), "comfy-down"),
        (musubi(SOME), "kohya"),
        (pairs(AS_DIFFUSERS, "transformer."), "diffusers"),
        (pairs(AS_DIFFUSERS, "lycoris_", DOWN_UP, 1.0, flat=True), "lycoris"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_lumina_2_come_back(tensors: Tensors, dialect: str, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "lumina2")
    assert [note for note in found.notes if "alike" in note] == []
    sound(path)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


def test_the_text_encoder_comes_with_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", sd_scripts())
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("kohya", "lumina2")
    assert sorted(c.name for c in found.components) == ["text_encoder", "transformer"]
    sound(path)
    comes_back(path, "kohya", tmp_path, ("comfy", "kohya-diffusers", "diffusers", "diffusers-lycoris", "peft"))
    ao.convert(path, "comfy", tmp_path / "b.safetensors")
    keys = set(load_file(tmp_path / "b.safetensors"))
    assert "text_encoders.gemma2_2b.transformer.model.layers.25.mlp.down_proj.lora_A.weight" in keys


def test_projections_are_joined_and_split_at_their_rows(tmp_path: Path) -> None:
    """Queries are three times as wide as keys and values."""
    path = write(tmp_path / "a.safetensors", comfy(SOME))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    made = load_file(tmp_path / "b.safetensors")
    whole = load_file(path)["diffusion_model.layers.25.attention.qkv.lora_B.weight"]
    stem = "transformer.layers.25.attn.to_"
    for part, (start, stop) in {"q": (0, 2304), "k": (2304, 3072), "v": (3072, 3840)}.items():
        assert torch.equal(made[f"{stem}{part}.lora_B.weight"], whole[start:stop])
    assert "transformer.noise_refiner.0.norm1.linear.lora_A.weight" in made
    assert "transformer.norm_out.linear_1.lora_A.weight" in made
    assert "transformer.context_refiner.1.feed_forward.linear_2.lora_A.weight" in made


def test_lokr_on_the_fused_projection_stays_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lokr(SOME, "diffusion_model.", 8, 4, 2.0))
    assert ao.inspect(path).architecture.value == "lumina2"
    comes_back(path, "comfy", tmp_path, ("kohya",))
    with pytest.raises(CannotRepresent, match="cannot be cut inside a block"):
        ao.convert(path, "diffusers-lycoris", tmp_path / "b.safetensors")


def test_loha_of_lumina_2(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", loha(SOME, "diffusion_model.", 1.0))
    assert ao.inspect(path).architecture.value == "lumina2"
    comes_back(path, "comfy", tmp_path, ("kohya", "lycoris", "diffusers-lycoris", "peft"))


def test_diffusers_converts_lumina_2_as_we_do(tmp_path: Path) -> None:
    made = comfy(block("layers.0"))
    agrees("Lumina2LoraLoaderMixin", write(tmp_path / "a.safetensors", made), tmp_path)


def test_diffusers_takes_no_part_of_a_block(tmp_path: Path) -> None:
    """Attention alone is refused by its conversion, not by ours: what we make of it needs none there."""
    path = write(tmp_path / "a.safetensors", comfy({"layers.0.attention.qkv": (3840, 2304)}))
    mixin: Any = importlib.import_module("diffusers.loaders.lora_pipeline").Lumina2LoraLoaderMixin
    with pytest.raises(KeyError):
        mixin.lora_state_dict(load_file(path))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    made = load_file(tmp_path / "b.safetensors")
    same(mixin.lora_state_dict(dict(made)), made)


OTHERS: dict[str, Modules] = {
    "a larger Lumina": {"layers.0.attention.qkv": (4320, 2592), "layers.29.feed_forward.w1": (10368, 2592)},
    "no grouped queries": {"layers.0.attention.qkv": (6912, 2304), "layers.0.attention.wo": (2304, 2304)},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("writer", [comfy, musubi])
def test_others_are_not_taken_for_lumina_2(name: str, writer: Callable[[Modules], Tensors], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(OTHERS[name]))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(UnknownArchitectureOfFile):
        ao.load(path)


def test_z_image_stays_what_it_is(tmp_path: Path) -> None:
    """Comfy has both in one file of code, with most names alike."""
    path = write(tmp_path / "a.safetensors", comfy({"layers.0.attention.qkv": (11520, 3840)}))
    assert ao.inspect(path).architecture.value == "z_image"
