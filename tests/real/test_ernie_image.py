"""Adapters of ERNIE-Image as their trainers write them, and as their readers take them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_trainers import same, sound
from test_wan_z_image import Modules, agrees, comes_back, comfy, musubi
from trainers import DOWN_UP, Tensors, ai_toolkit, loha, lokr, pairs, write

import adapterops as ao
from adapterops.errors import UnknownArchitectureOfFile

SOME: Modules = {
    "layers.0.self_attention.to_q": (4096, 4096),
    "layers.35.self_attention.to_out.0": (4096, 4096),
    "layers.35.mlp.gate_proj": (12288, 4096),
    "layers.7.mlp.linear_fc2": (4096, 12288),
    "text_proj": (4096, 3072),
    "adaLN_modulation.1": (24576, 4096),
    "final_linear": (128, 4096),
}
ELSEWHERE = ("comfy", "comfy-down", "kohya", "lycoris", "diffusers-lycoris", "peft", "diffusers")


@pytest.mark.parametrize(
    ("tensors", "dialect"),
    [
        (comfy(SOME), "comfy"),
        (pairs(SOME, "diffusion_model.", DOWN_UP, 2.0), "comfy-down"),
        (musubi(SOME), "kohya"),
        (pairs(SOME, "transformer."), "diffusers"),
        (pairs(SOME, "transformer.", alpha=2.0), "diffusers-alpha"),
        (pairs(SOME, "lycoris_", DOWN_UP, 1.0, flat=True), "lycoris"),
        (pairs(SOME), "diffsynth"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_ernie_image_come_back(tensors: Tensors, dialect: str, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "ernie_image")
    assert [note for note in found.notes if "alike" in note] == []
    sound(path)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


def test_the_prefix_is_all_that_differs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy(SOME))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), pairs(SOME, "transformer."))


@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_lycoris_methods_of_ernie_image(method: str, tmp_path: Path) -> None:
    made = lokr(SOME, "diffusion_model.", 8, 4, 2.0) if method == "lokr" else loha(SOME, "diffusion_model.", 1.0)
    path = write(tmp_path / "a.safetensors", made)
    assert ao.inspect(path).architecture.value == "ernie_image"
    comes_back(path, "comfy", tmp_path, ("kohya", "lycoris", "diffusers-lycoris", "peft"))


def test_diffusers_converts_ernie_image_as_we_do(tmp_path: Path) -> None:
    few = {name: shape for name, shape in SOME.items() if shape[0] * shape[1] <= 2**24}
    agrees("ErnieImageLoraLoaderMixin", write(tmp_path / "a.safetensors", comfy(few)), tmp_path)


@pytest.mark.parametrize("writer", [comfy, musubi])
def test_others_are_not_taken_for_ernie_image(writer: Callable[[Modules], Tensors], tmp_path: Path) -> None:
    """The size that diffusers' class has by default, and no published model."""
    other = {"layers.0.self_attention.to_q": (3072, 3072), "layers.0.mlp.gate_proj": (8192, 3072)}
    path = write(tmp_path / "a.safetensors", writer(other))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(UnknownArchitectureOfFile):
        ao.load(path)
