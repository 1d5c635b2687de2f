"""Adapters of Ideogram 4 as their trainers write them, and as their readers take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainers import sound
from test_wan_z_image import Modules, agrees, comes_back, comfy, musubi
from trainers import DOWN_UP, Tensors, ai_toolkit, loha, lokr, pairs, write

import adapterops as ao
from adapterops.errors import CannotRepresent, UnknownArchitectureOfFile

BLOCKS: Modules = {
    "layers.0.attention.qkv": (13824, 4608),
    "layers.0.attention.o": (4608, 4608),
    "layers.33.feed_forward.w1": (12288, 4608),
    "layers.33.feed_forward.w2": (4608, 12288),
    "layers.5.adaln_modulation": (18432, 512),
}
AROUND: Modules = {
    "input_proj": (4608, 128),
    "llm_cond_proj": (4608, 53248),
    "t_embedding.mlp_in": (4608, 4608),
    "adaln_proj": (512, 4608),
    "final_layer.linear": (128, 4608),
}
AS_DIFFUSERS: Modules = {
    "layers.0.attention.to_q": (4608, 4608),
    "layers.33.attention.to_out.0": (4608, 4608),
    "layers.33.feed_forward.w3": (12288, 4608),
}
ELSEWHERE = ("comfy", "comfy-down", "kohya", "kohya-diffusers", "lycoris", "diffusers-lycoris", "peft", "diffusers")


@pytest.mark.parametrize(
    ("tensors", "dialect"),
    [
        (comfy({**BLOCKS, **AROUND}), "comfy"),
        (pairs(BLOCKS, "diffusion_model.", DOWN_UP, 2.0), "comfy-down"),
        (musubi(BLOCKS), "kohya"),
        (pairs(AS_DIFFUSERS, "transformer."), "diffusers"),
        (pairs(AS_DIFFUSERS, "lycoris_", DOWN_UP, 1.0, flat=True), "lycoris"),
        (pairs(BLOCKS, alpha=1.0), "onetrainer-original"),
        (pairs(BLOCKS), "diffsynth"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_ideogram_4_come_back(tensors: Tensors, dialect: str, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "ideogram4")
    assert [note for note in found.notes if "alike" in note] == []
    sound(path)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


def test_projections_are_split_in_thirds(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy(BLOCKS))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    made = load_file(tmp_path / "b.safetensors")
    whole = load_file(path)["diffusion_model.layers.0.attention.qkv.lora_B.weight"]
    for part, rows in zip("qkv", whole.split(4608), strict=True):
        assert torch.equal(made[f"transformer.layers.0.attention.to_{part}.lora_B.weight"], rows)
    assert "transformer.layers.0.attention.to_out.0.lora_A.weight" in made


def test_lokr_on_the_fused_projection_stays_there(tmp_path: Path) -> None:
    """Eight blocks of rows do not end with the thirds."""
    path = write(tmp_path / "a.safetensors", lokr(BLOCKS, "diffusion_model.", 8, 4, 2.0))
    assert ao.inspect(path).architecture.value == "ideogram4"
    comes_back(path, "comfy", tmp_path, ("kohya",))
    with pytest.raises(CannotRepresent, match="cannot be cut inside a block"):
        ao.convert(path, "diffusers-lycoris", tmp_path / "b.safetensors")


def test_loha_of_ideogram_4(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", loha(BLOCKS, "diffusion_model.", 1.0))
    assert ao.inspect(path).architecture.value == "ideogram4"
    comes_back(path, "comfy", tmp_path, ("kohya", "lycoris", "diffusers-lycoris", "peft"))


@pytest.mark.parametrize("dialect", ["comfy", "comfy-down"])
def test_diffusers_converts_ideogram_4_as_we_do(dialect: str, tmp_path: Path) -> None:
    """It knows the linear layers of blocks alone."""
    few = {name: shape for name, shape in BLOCKS.items() if ".w" not in name and (".o" in name or dialect == "comfy")}
    made = comfy(few) if dialect == "comfy" else pairs(few, "diffusion_model.", DOWN_UP, 2.0)
    agrees("Ideogram4LoraLoaderMixin", write(tmp_path / "a.safetensors", made), tmp_path)


OTHERS: dict[str, Modules] = {
    "another width": {"layers.0.attention.qkv": (12288, 4096), "layers.0.attention.o": (4096, 4096)},
    "a Lumina of no known size": {"layers.0.attention.qkv": (9216, 4608), "layers.0.attention.wo": (4608, 4608)},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("writer", [comfy, musubi])
def test_others_are_not_taken_for_ideogram_4(name: str, writer: Callable[[Modules], Tensors], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(OTHERS[name]))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(UnknownArchitectureOfFile):
        ao.load(path)
