"""Adapters of CogVideoX, CogView4, Mochi 1, Sana and PixArt as their trainers write them, and as their readers take them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checks import deltas, same
from safetensors import safe_open
from safetensors.torch import load_file
from trainers import Modules, comfy, pairs, write

import adapterops as ao
from adapterops.errors import CannotRepresent, Conflict, InvalidHeader, UnknownFact
from adapterops.methods import METHODS

FIRST = tuple(f"attn1.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0"))


GENMO: Modules = {
    "blocks.0.attn.qkv_x": (9216, 3072),
    "blocks.0.attn.qkv_y": (9216, 1536),
    "blocks.0.attn.proj_x": (3072, 3072),
    "blocks.46.attn.proj_y": (1536, 3072),
}
BARE = (".lora_A", ".lora_B")


def genmo(path: Path, **kwargs: float) -> Path:
    """genmoai/mochi `demos/fine_tuner/train.py`: what the model is built with stands in the header."""
    tensors = {key: value.float() for key, value in pairs(GENMO, ends=BARE).items()}
    return write(path, tensors, **({"kwargs": json.dumps(kwargs)} if kwargs else {}))


USUAL = {
    "qkv_proj_lora_rank": 4,
    "qkv_proj_lora_alpha": 4,
    "qkv_proj_lora_dropout": 0.0,
    "out_proj_lora_rank": 4,
    "out_proj_lora_alpha": 8,
    "out_proj_lora_dropout": 0.0,
}


def test_the_pipelines_checkpoints(tmp_path: Path) -> None:
    """genmoai/mochi `pipelines.py` (`DitModelFactory`) takes `state_dict` and `kwargs` from what is no safetensors file."""
    path = genmo(tmp_path / "a.safetensors", **USUAL)
    torch.save({"state_dict": load_file(path), "kwargs": USUAL}, tmp_path / "a.pt")
    scales = [{u.module: METHODS["lora"].scale(u) for u in ao.load(file)} for file in (path, tmp_path / "a.pt")]
    assert scales[0] == scales[1]
    assert set(scales[1].values()) == {1, 2}
    torch.save(load_file(path), tmp_path / "b.pt")
    assert {update.alpha.value for update in ao.load(tmp_path / "b.pt")} == {None}


def test_genmos_files_come_back(tmp_path: Path) -> None:
    path = genmo(tmp_path / "a.safetensors", **USUAL)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("genmo", "mochi")
    scales = {update.module: METHODS["lora"].scale(update) for update in ao.load(path)}
    assert scales["transformer_blocks.0.attn1.to_qkv"] == 1
    assert scales["transformer_blocks.0.attn1.to_out.0"] == 2
    for name in ("comfy", "kohya", "diffusers", "peft"):
        there = tmp_path / (name if name == "peft" else f"{name}.safetensors")
        assert ao.convert(path, name, there).proof is not None
        ao.convert(there, "genmo", tmp_path / "back.safetensors", overwrite=True)
        same(load_file(tmp_path / "back.safetensors"), load_file(path))
        with safe_open(tmp_path / "back.safetensors", "pt") as file:
            kwargs = json.loads(file.metadata()["kwargs"])
        assert kwargs == {key: value for key, value in USUAL.items() if "dropout" not in key}


class LoraLinear(torch.nn.Linear):
    """What genmoai/mochi `dit/joint_model/lora.py` computes of a layer's own tensors and the header's numbers."""

    def __init__(self, shape: tuple[int, int], rank: int, alpha: float) -> None:
        super().__init__(shape[1], shape[0], bias=False)
        self.lora_A = torch.nn.Parameter(torch.zeros(rank, shape[1]))
        self.lora_B = torch.nn.Parameter(torch.zeros(shape[0], rank))
        self.scaling = alpha / rank

    def delta(self) -> torch.Tensor:
        return (self.lora_B @ self.lora_A).detach() * self.scaling


def test_genmos_layers_take_what_we_write(tmp_path: Path) -> None:
    """From diffusers' names: queries, keys and values become one layer's, under the numbers in the header."""
    modules = {f"transformer_blocks.{i}.{end}": (3072, 3072) for i in range(2) for end in FIRST}
    path = write(tmp_path / "a.safetensors", pairs(modules, "transformer.", alpha=2.0))
    ao.convert(path, "genmo", tmp_path / "b.safetensors", arch="mochi")
    tensors = load_file(tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        kwargs = json.loads(file.metadata()["kwargs"])
    wanted = {name.removeprefix("transformer."): delta / 2 for name, delta in deltas(load_file(path)).items()}
    for i in range(2):
        for layer, shape, stem in (("qkv_x", (9216, 3072), "qkv_proj"), ("proj_x", (3072, 3072), "out_proj")):
            module = LoraLinear(shape, kwargs[f"{stem}_lora_rank"], kwargs[f"{stem}_lora_alpha"])
            own = {end: tensors.pop(f"blocks.{i}.attn.{layer}.{end}").float() for end in ("lora_A", "lora_B")}
            module.load_state_dict(own | {"weight": module.weight})
            parts = FIRST[:3] if layer == "qkv_x" else FIRST[3:]
            whole = torch.cat([wanted[f"transformer_blocks.{i}.{part}"] for part in parts])
            assert torch.allclose(module.delta(), whole, atol=1e-5)
    assert not tensors


def test_genmos_header_decides_the_scale(tmp_path: Path) -> None:
    bare = genmo(tmp_path / "a.safetensors")
    with pytest.raises(UnknownFact, match="--alpha"):
        ao.convert(bare, "comfy", tmp_path / "b.safetensors")
    assert ao.convert(bare, "comfy", tmp_path / "b.safetensors", alpha=4.0).proof is not None
    other = genmo(tmp_path / "c.safetensors", **{**USUAL, "qkv_proj_lora_rank": 16})
    with pytest.raises(Conflict, match=r"qkv_proj_lora_rank.*16.*rank 4"):
        ao.load(other)
    for kwargs in ("[]", "{", '{"qkv_proj_lora_alpha": "4"}'):
        tensors = pairs(GENMO, ends=BARE)
        with pytest.raises(InvalidHeader, match="kwargs"):
            ao.load(write(tmp_path / "d.safetensors", tensors, kwargs=kwargs))


def test_what_genmos_model_cannot_take_is_refused(tmp_path: Path) -> None:
    several = pairs({"blocks.0.attn.proj_x": (3072, 3072)}, "diffusion_model.")
    several |= pairs({"blocks.1.attn.proj_x": (3072, 3072)}, "diffusion_model.", rank=8)
    path = write(tmp_path / "a.safetensors", several)
    with pytest.raises(CannotRepresent, match=r"rank 8.*out_proj_lora_rank.*4"):
        ao.convert(path, "genmo", tmp_path / "b.safetensors")
    path = write(tmp_path / "c.safetensors", comfy({"blocks.0.mlp_x.w2": (3072, 8192)}))
    with pytest.raises(CannotRepresent):
        ao.convert(path, "genmo", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_who_reads_genmos_files_is_told(tmp_path: Path) -> None:
    """diffusers loads nothing of them; Comfy all, but for the header's alphas."""
    path = genmo(tmp_path / "a.safetensors", **USUAL)
    assert {f.rule.code for f in ao.validate(path, targets=["diffusers"], select=["L5"])} == {"L580"}
    assert {f.rule.code for f in ao.validate(path, targets=["comfy"], select=["L5"])} == {"L530"}
    done = ao.convert(path, "diffusers", tmp_path / "b.safetensors", fold_alpha=True)
    assert not list(ao.validate(done.path, targets=["diffusers", "comfy"], select=["L5"]))
