"""Adapters of Krea 2 as their trainers write them, and as their readers take them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainers import same, sound
from test_wan_z_image import Modules, agrees, comes_back, comfy, deltas, musubi
from trainers import DOWN_UP, Tensors, ai_toolkit, loha, lokr, pairs, some, write

import adapterops as ao
from adapterops.errors import AdapterOpsError, UnknownArchitectureOfFile

BLOCKS: Modules = {
    **{f"blocks.0.attn.{p}": (6144, 6144) for p in ("wq", "wo", "gate")},
    **{f"blocks.27.attn.{p}": (1536, 6144) for p in ("wk", "wv")},
    "blocks.27.mlp.gate": (16384, 6144),
    "blocks.27.mlp.down": (6144, 16384),
}
AROUND: Modules = {
    "first": (6144, 64),
    "last.linear": (64, 6144),
    "tmlp.0": (6144, 256),
    "tmlp.2": (6144, 6144),
    "tproj.1": (36864, 6144),
    "txtmlp.1": (6144, 2560),
    "txtmlp.3": (6144, 6144),
    "txtfusion.layerwise_blocks.1.attn.wk": (2560, 2560),
    "txtfusion.refiner_blocks.0.mlp.up": (6912, 2560),
}
PROJECTOR: Modules = {"txtfusion.projector": (1, 12)}
"""Of which `validate` tells that no rank above 1 is of use; trainers of all linear layers take it along."""
AS_DIFFUSERS: Modules = {
    "transformer_blocks.0.attn.to_q": (6144, 6144),
    "transformer_blocks.27.attn.to_k": (1536, 6144),
    "transformer_blocks.27.attn.to_out.0": (6144, 6144),
    "transformer_blocks.3.ff.up": (16384, 6144),
    "text_fusion.layerwise_blocks.0.attn.to_gate": (2560, 2560),
}
ELSEWHERE = ("comfy", "comfy-down", "kohya", "kohya-diffusers", "lycoris", "diffusers-lycoris", "peft", "diffusers")


@pytest.mark.parametrize(
    ("tensors", "dialect"),
    [
        (comfy({**BLOCKS, **AROUND}), "comfy"),
        (pairs(BLOCKS, "diffusion_model.", DOWN_UP, 2.0), "comfy-down"),
        (musubi({**BLOCKS, **AROUND}), "kohya"),
        (pairs(AS_DIFFUSERS, "transformer."), "diffusers"),
        (pairs(AS_DIFFUSERS, "transformer.", alpha=2.0), "diffusers-alpha"),
        (pairs(AS_DIFFUSERS, "lycoris_", DOWN_UP, 1.0, flat=True), "lycoris"),
        (pairs(BLOCKS, alpha=1.0), "onetrainer-original"),
        (pairs(BLOCKS), "diffsynth"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_krea_2_come_back(tensors: Tensors, dialect: str, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "krea2")
    assert [note for note in found.notes if "alike" in note] == []
    sound(path)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


def test_names_are_those_of_each_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy({**BLOCKS, **AROUND, **PROJECTOR}))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    stems = {key.rpartition(".lora_")[0] for key in load_file(tmp_path / "b.safetensors")}
    assert {
        "transformer.transformer_blocks.0.attn.to_gate",
        "transformer.transformer_blocks.27.ff.gate",
        "transformer.text_fusion.layerwise_blocks.1.attn.to_k",
        "transformer.text_fusion.projector",
        "transformer.time_mod_proj",
        "transformer.txt_in.linear_2",
        "transformer.final_layer.linear",
    } <= stems
    ao.convert(path, "kohya", tmp_path / "c.safetensors")
    everything = {**BLOCKS, **AROUND, **PROJECTOR}
    same(load_file(tmp_path / "c.safetensors"), pairs(everything, "lora_unet_", DOWN_UP, 4.0, flat=True))


@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_lycoris_methods_of_krea_2(method: str, tmp_path: Path) -> None:
    made = lokr(BLOCKS, "diffusion_model.", 8, 4, 2.0) if method == "lokr" else loha(BLOCKS, "diffusion_model.", 1.0)
    path = write(tmp_path / "a.safetensors", made)
    assert ao.inspect(path).architecture.value == "krea2"
    comes_back(path, "comfy", tmp_path, ("kohya", "lycoris", "diffusers-lycoris", "peft"))


def test_diffusers_converts_krea_2_as_we_do(tmp_path: Path) -> None:
    small = {name: shape for name, shape in {**BLOCKS, **AROUND, **PROJECTOR}.items() if shape[0] * shape[1] < 2**24}
    agrees("Krea2LoraLoaderMixin", write(tmp_path / "a.safetensors", comfy(small)), tmp_path)


def test_a_table_is_of_diffusers_form(tmp_path: Path) -> None:
    """The authors have a block's table as one row of numbers, which is refused rather than taken for the other."""
    flat = comfy(BLOCKS) | {"diffusion_model.blocks.0.mod.lin.diff": some(36864)}
    with pytest.raises(AdapterOpsError, match=r"mod\.lin"):
        ao.load(write(tmp_path / "a.safetensors", flat))


CONFIG = {
    "_class_name": "Krea2Transformer2DModel",
    "in_channels": 4,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "timestep_embed_dim": 16,
    "text_hidden_dim": 16,
    "num_text_layers": 3,
    "text_num_attention_heads": 2,
    "text_num_key_value_heads": 2,
    "text_intermediate_size": 24,
    "num_layerwise_text_blocks": 1,
    "num_refiner_text_blocks": 1,
    "axes_dims_rope": [4, 2, 2],
}


def test_the_class_of_diffusers_takes_what_we_write(tmp_path: Path) -> None:
    """A small one, built from its config: the authors' names are known for it, too, and every update reaches its module."""
    model_class: Any = importlib.import_module("diffusers").Krea2Transformer2DModel
    model = model_class.from_config(CONFIG)
    base = tmp_path / "config.json"
    base.write_text(json.dumps(CONFIG))
    modules: Modules = {
        "blocks.0.attn.wk": (16, 32),
        "blocks.0.mlp.down": (32, 16),
        "txtfusion.projector": (1, 3),
        "last.linear": (4, 32),
    }
    path = write(tmp_path / "a.safetensors", {key: t.float() for key, t in comfy(modules).items()})
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", base=base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_lora_adapter(load_file(tmp_path / "b.safetensors"), prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    after = model.state_dict()
    wanted = deltas(load_file(path))
    own = (
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.ff.down",
        "text_fusion.projector",
        "final_layer.linear",
    )
    for name, module in zip(modules, own, strict=True):
        change = after[f"{module}.weight"] - before.pop(f"{module}.weight")
        assert torch.allclose(change, wanted[f"diffusion_model.{name}"], atol=1e-5)
    assert [key for key, value in before.items() if not torch.equal(after[key], value)] == []


OTHERS: dict[str, Modules] = {"another width": {"blocks.0.attn.wq": (4096, 4096), "blocks.0.mlp.gate": (11008, 4096)}}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("writer", [comfy, musubi])
def test_others_are_not_taken_for_krea_2(name: str, writer: Callable[[Modules], Tensors], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(OTHERS[name]))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(UnknownArchitectureOfFile):
        ao.load(path)
