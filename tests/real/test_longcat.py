"""Adapters of LongCat-Image, whose blocks are Flux.1's, but fewer."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import added, comes_back, deltas, sound
from safetensors.torch import load_file
from trainers import DOWN_UP, Modules, Tensors, comfy, loha, lokr, musubi, pairs, write

import adapterops as ao
from adapterops.adapter import Certainty
from adapterops.architectures import load

DOUBLE, SINGLE = 10, 20
PARTS = "qkv"


def attention(double: int = DOUBLE, single: int = SINGLE) -> Modules:
    """Some of what SimpleTuner trains (`helpers/models/longcat_image/model.py`, DEFAULT_LORA_TARGET), by diffusers' names."""
    every = [f"transformer_blocks.{n}" for n in range(double)] + [
        f"single_transformer_blocks.{n}" for n in range(single)
    ]
    return {f"{block}.attn.to_{p}": (3072, 3072) for block in every for p in PARTS}


def comfys() -> Modules:
    """The same by the names of ComfyUI's checkpoint (Comfy-Org/ComfyUI, pull request 12597), and what stands around."""
    fused = {f"double_blocks.{n}.img_attn.qkv": (9216, 3072) for n in range(DOUBLE)}
    fused |= {f"single_blocks.{n}.linear1": (21504, 3072) for n in range(SINGLE)}
    return {**fused, "double_blocks.9.txt_mlp.2": (3072, 12288), "double_blocks.0.img_mod.lin": (18432, 3072)}


AROUND: Modules = {
    "txt_in": (3072, 3584),
    "time_in.in_layer": (3072, 256),
    "final_layer.adaLN_modulation.1": (6144, 3072),
}
ELSEWHERE = ("comfy", "kohya", "diffusers-lycoris", "peft", "diffusers")
FILES: dict[str, Tensors] = {
    "diffusers": pairs(attention(), "transformer."),
    "kohya-diffusers": pairs(attention(), "lora_unet_", DOWN_UP, 1.0, flat=True),
    "comfy": comfy(comfys()),
    "kohya": musubi(comfys()),
    "lycoris-original": pairs(comfys(), "lycoris_", DOWN_UP, 1.0, flat=True),
}


@pytest.mark.parametrize("dialect", FILES)
def test_the_number_of_blocks_tells_it_from_flux_1(dialect: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", FILES[dialect])
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value, found.architecture.others) == (dialect, "longcat_image", ())
    assert found.architecture.certainty is Certainty.DERIVED
    assert [note for note in found.notes if "alike" in note] == []
    sound(path)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


def test_its_own_text_embedder_tells_it(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.safetensors", comfy({"txt_in": (3072, 3584), "double_blocks.3.img_attn.qkv": (9216, 3072)})
    )
    assert ao.inspect(path).architecture.value == "longcat_image"


@pytest.mark.parametrize(("double", "single"), [(9, 20), (10, 19), (11, 20), (10, 38), (10, 0), (0, 20), (19, 38)])
def test_other_numbers_of_blocks_stay_flux_1s(double: int, single: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(attention(double, single), "transformer."))
    assert ao.inspect(path).architecture.value == "flux"


def test_some_of_its_blocks_stay_flux_1s(tmp_path: Path) -> None:
    """The first and the last of each kind, which somebody may have chosen of Flux.1's."""
    ends = {name: shape for name, shape in attention().items() if name.split(".")[1] in ("0", "9", "19")}
    path = write(tmp_path / "a.safetensors", pairs(ends, "transformer."))
    assert ao.inspect(path).architecture.value == "flux"


@pytest.mark.parametrize("said", ["longcat_image-final/lora", "longcat_image-edit/lora"])
def test_the_header_tells_it(said: str, tmp_path: Path) -> None:
    tensors = pairs(attention(1, 1), "transformer.")
    path = write(tmp_path / "a.safetensors", tensors, **{"modelspec.architecture": said})
    assert ao.inspect(path).architecture.value == "longcat_image"


@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_lycoris_methods(method: str, tmp_path: Path) -> None:
    modules: Modules = {"double_blocks.9.img_mlp.2": (3072, 12288), "txt_in": (3072, 3584)}
    made = lokr(modules, "diffusion_model.", 8, 4, 2.0) if method == "lokr" else loha(modules, "diffusion_model.", 1.0)
    path = write(tmp_path / "a.safetensors", made)
    assert ao.inspect(path).architecture.value == "longcat_image"
    comes_back(path, "comfy", tmp_path, ("kohya", "diffusers-lycoris", "peft"))


def test_the_class_of_diffusers_takes_what_comfys_names_are(tmp_path: Path) -> None:
    """A small one, through peft (its pipelines have no loader): every row of ComfyUI's weights reaches its module."""
    config = {"_class_name": "LongCatImageTransformer2DModel", "num_layers": 1, "num_single_layers": 1}
    config |= {"in_channels": 4, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model: Any = importlib.import_module("diffusers").LongCatImageTransformer2DModel.from_config(config)
    modules: Modules = {
        "double_blocks.0.img_attn.qkv": (48, 16),
        "double_blocks.0.txt_attn.qkv": (48, 16),
        "double_blocks.0.txt_mlp.0": (64, 16),
        "single_blocks.0.linear1": (112, 16),
        "single_blocks.0.linear2": (16, 80),
        "final_layer.adaLN_modulation.1": (32, 16),
        "time_in.out_layer": (16, 16),
        "txt_in": (16, 12),
    }
    path = write(tmp_path / "a.safetensors", {key: tensor.float() for key, tensor in comfy(modules).items()})
    ao.convert(path, "peft", tmp_path / "peft", base=tmp_path / "config.json")
    found = {name: change for name, change in added(model, tmp_path / "peft").items() if change.any()}
    double, single = "transformer_blocks.0", "single_transformer_blocks.0"
    parts = {
        "double_blocks.0.img_attn.qkv": [f"{double}.attn.to_{p}" for p in PARTS],
        "double_blocks.0.txt_attn.qkv": [f"{double}.attn.add_{p}_proj" for p in PARTS],
        "double_blocks.0.txt_mlp.0": [f"{double}.ff_context.net.0.proj"],
        "single_blocks.0.linear1": [*(f"{single}.attn.to_{p}" for p in PARTS), f"{single}.proj_mlp"],
        "single_blocks.0.linear2": [f"{single}.proj_out"],
        "final_layer.adaLN_modulation.1": ["norm_out.linear"],
        "time_in.out_layer": ["time_embed.timestep_embedder.linear_2"],
        "txt_in": ["context_embedder"],
    }
    assert found.keys() == {f"{name}.weight" for names in parts.values() for name in names}
    for theirs, delta in deltas(load_file(path)).items():
        name = theirs.removeprefix("diffusion_model.")
        made = torch.cat([found[f"{part}.weight"] for part in parts[name]])
        # ComfyUI's rows are shift and scale, diffusers' are scale and shift.
        wanted = torch.cat(delta.chunk(2)[::-1]) if name.startswith("final_layer") else delta
        assert torch.allclose(made, wanted, atol=1e-5)


def test_that_diffusers_has_no_loader_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", FILES["diffusers"])
    assert {f.rule.code for f in ao.validate(path, targets=["diffusers"], select=["L5"])} == {"L509"}


def test_the_blocks_are_flux_1s() -> None:
    """Every module of a block has the shape, the authors' name and the rows that Flux.1's has."""
    flux, own = (load(name).components["transformer"] for name in ("flux", "longcat_image"))
    blocks = [name for name in own.modules if "blocks." in name]
    assert [name for name in blocks if own.modules[name] != flux.modules[name]] == []
    fused = [name for name in own.fused if "blocks." in name]
    assert [name for name in fused if own.fused[name] != flux.fused[name]] == []
