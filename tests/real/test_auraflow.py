"""Adapters of AuraFlow and Pony V7 as their trainers write them, and as their readers take them."""

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
from adapterops.errors import UnknownArchitectureOfFile

AS_DIFFUSERS: Modules = {
    "joint_transformer_blocks.0.attn.to_q": (3072, 3072),
    "joint_transformer_blocks.3.attn.add_k_proj": (3072, 3072),
    "joint_transformer_blocks.3.ff_context.linear_2": (8192, 3072),
    "single_transformer_blocks.31.attn.to_out.0": (3072, 3072),
    "single_transformer_blocks.0.ff.out_projection": (3072, 8192),
    "single_transformer_blocks.0.norm1.linear": (18432, 3072),
    "norm_out.linear": (6144, 3072),
}
"""As diffusion-pipe, SimpleTuner and ai-toolkit write them."""
COMFYS: Modules = {
    "double_layers.0.attn.w2q": (3072, 3072),
    "double_layers.3.attn.w1k": (3072, 3072),
    "double_layers.3.mlpC.c_fc2": (8192, 3072),
    "single_layers.31.attn.w1o": (3072, 3072),
    "single_layers.0.mlp.c_proj": (3072, 8192),
    "single_layers.0.modCX.1": (18432, 3072),
    "modF.1": (6144, 3072),
}
"""The same modules as Comfy calls them: what it saves itself."""
ELSEWHERE = ("comfy", "comfy-down", "kohya", "kohya-diffusers", "lycoris", "diffusers-lycoris", "peft", "diffusers")


@pytest.mark.parametrize(
    ("tensors", "dialect"),
    [
        (pairs(AS_DIFFUSERS, "transformer."), "diffusers"),
        (pairs(AS_DIFFUSERS, "lycoris_", DOWN_UP, 1.0, flat=True), "lycoris"),
        (comfy(COMFYS), "comfy"),
        (pairs(COMFYS, "diffusion_model.", DOWN_UP), "comfy-down"),
        (musubi(COMFYS), "kohya"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_auraflow_come_back(tensors: Tensors, dialect: str, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "auraflow")
    assert [note for note in found.notes if "alike" in note] == []
    sound(path)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


def test_names_are_those_of_comfy(tmp_path: Path) -> None:
    """Comfy-Org/ComfyUI `comfy/utils.py` (`auraflow_to_diffusers`), the halves of the last modulation turned round."""
    path = write(tmp_path / "a.safetensors", pairs(AS_DIFFUSERS, "transformer."))
    ao.convert(path, "comfy", tmp_path / "b.safetensors")
    made, before = load_file(tmp_path / "b.safetensors"), load_file(path)
    assert {key.removesuffix(".alpha").partition(".lora_")[0] for key in made} == {
        f"diffusion_model.{name}" for name in COMFYS
    }
    for own, comfys in zip(AS_DIFFUSERS, COMFYS, strict=True):
        rows = before[f"transformer.{own}.lora_B.weight"]
        rows = torch.cat(rows.chunk(2)[::-1]) if own == "norm_out.linear" else rows
        assert torch.equal(made[f"diffusion_model.{comfys}.lora_B.weight"], rows)


@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_lycoris_methods_of_auraflow(method: str, tmp_path: Path) -> None:
    few = {name: shape for name, shape in AS_DIFFUSERS.items() if name != "norm_out.linear"}
    made = lokr(few, "transformer.", 8, 4, 2.0) if method == "lokr" else loha(few, "transformer.", 1.0)
    path = write(tmp_path / "a.safetensors", made)
    assert ao.inspect(path).architecture.value == "auraflow"
    comes_back(path, "diffusers-lycoris", tmp_path, ("comfy", "kohya", "lycoris", "peft"))


def test_diffusers_takes_it_as_it_is(tmp_path: Path) -> None:
    few = {name: shape for name, shape in AS_DIFFUSERS.items() if shape == (3072, 3072)}
    agrees("AuraFlowLoraLoaderMixin", write(tmp_path / "a.safetensors", pairs(few, "transformer.")), tmp_path)


@pytest.mark.parametrize("writer", [comfy, musubi])
def test_others_are_not_taken_for_auraflow(writer: Callable[[Modules], Tensors], tmp_path: Path) -> None:
    other = {"double_layers.0.attn.w2q": (1536, 1536), "single_layers.0.mlp.c_fc1": (4096, 1536)}
    path = write(tmp_path / "a.safetensors", writer(other))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(UnknownArchitectureOfFile):
        ao.load(path)


def test_the_single_blocks_attention_alone_is_flux_1s(tmp_path: Path) -> None:
    """AuraFlow is older and has the same names; far more adapters are Flux.1's."""
    modules = {f"single_transformer_blocks.{n}.attn.to_{p}": (3072, 3072) for n in (7, 20) for p in "qkv"}
    path = write(tmp_path / "a.safetensors", pairs(modules, "transformer."))
    found = ao.inspect(path).architecture
    assert found.value == "flux"
    assert "auraflow" in found.others
