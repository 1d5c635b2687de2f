"""Adapters of HiDream as their trainers write them, and as their readers take them."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_trainers import same, sound
from test_wan_z_image import Modules, agrees, comes_back, comfy, musubi
from trainers import DOWN_UP, Tensors, ai_toolkit, loha, lokr, pairs, write

import adapterops as ao
from adapterops.errors import UnknownArchitectureOfFile

SOME: Modules = {
    "double_stream_blocks.0.block.attn1.to_q": (2560, 2560),
    "double_stream_blocks.15.block.attn1.to_out_t": (2560, 2560),
    "double_stream_blocks.15.block.adaLN_modulation.1": (30720, 2560),
    "double_stream_blocks.3.block.ff_t.w1": (6912, 2560),
    "single_stream_blocks.31.block.ff_i.experts.3.w2": (2560, 6912),
    "single_stream_blocks.31.block.ff_i.shared_experts.w3": (3584, 2560),
    "caption_projection.48.linear": (2560, 4096),
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
        (pairs(SOME, alpha=1.0), "onetrainer-original"),
    ],
    ids=["ai-toolkit", "comfy-down", "onetrainer", "diffusers", "onetrainer-diffusers", "simpletuner", "original"],
)
def test_files_of_hidream_come_back(tensors: Tensors, dialect: str, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "hidream")
    assert [note for note in found.notes if "alike" in note] == []
    sound(path)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


def test_the_prefix_is_all_that_differs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy(SOME))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), pairs(SOME, "transformer."))


@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_lycoris_methods_of_hidream(method: str, tmp_path: Path) -> None:
    made = lokr(SOME, "diffusion_model.", 8, 4, 2.0) if method == "lokr" else loha(SOME, "diffusion_model.", 1.0)
    path = write(tmp_path / "a.safetensors", made)
    assert ao.inspect(path).architecture.value == "hidream"
    comes_back(path, "comfy", tmp_path, ("kohya", "lycoris", "diffusers-lycoris", "peft"))


def test_diffusers_converts_hidream_as_we_do(tmp_path: Path) -> None:
    few = {name: shape for name, shape in SOME.items() if shape[0] * shape[1] < 2**24}
    agrees("HiDreamImageLoraLoaderMixin", write(tmp_path / "a.safetensors", comfy(few)), tmp_path)


OTHERS: dict[str, Modules] = {
    "another width": {"double_stream_blocks.0.block.attn1.to_q": (3072, 3072)},
    "more experts": {
        **{f"single_stream_blocks.0.block.ff_i.experts.{i}.w1": (8192, 2560) for i in range(2, 5)},
        "single_stream_blocks.0.block.attn1.to_q": (2560, 2560),
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not_taken_for_hidream(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy(OTHERS[name]))
    with pytest.raises(UnknownArchitectureOfFile):
        ao.load(path)
