"""Adapters of Anima and Cosmos-Predict2 as their trainers write them, and as their readers take them."""

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
from trainers import DOWN_UP, Tensors, ai_toolkit, loha, lokr, number, pairs, write

import adapterops as ao
from adapterops.errors import CannotRepresent, UnknownArchitectureOfFile

BLOCKS: Modules = {
    **{f"blocks.0.self_attn.{p}_proj": (2048, 2048) for p in ("q", "k", "v", "output")},
    **{f"blocks.27.cross_attn.{p}_proj": (2048, 1024) for p in ("k", "v")},
    "blocks.27.mlp.layer1": (8192, 2048),
    "blocks.27.mlp.layer2": (2048, 8192),
    **{f"blocks.1.adaln_modulation_{p}.2": (6144, 256) for p in ("self_attn", "cross_attn", "mlp")},
}
AROUND: Modules = {
    "x_embedder.proj.1": (2048, 68),
    "t_embedder.1.linear_1": (2048, 2048),
    "t_embedder.1.linear_2": (6144, 2048),
    "final_layer.adaln_modulation.1": (256, 2048),
    "final_layer.linear": (64, 2048),
}
CONDITIONER: Modules = {
    "blocks.0.cross_attn.q_proj": (1024, 1024),
    "blocks.5.self_attn.o_proj": (1024, 1024),
    "blocks.5.mlp.2": (1024, 4096),
    "out_proj": (1024, 1024),
}
QWEN3: Modules = {
    "layers.0.self_attn.q_proj": (2048, 1024),
    "layers.27.self_attn.k_proj": (1024, 1024),
    "layers.27.mlp.down_proj": (1024, 3072),
}
AS_DIFFUSERS: Modules = {
    "transformer_blocks.0.attn1.to_q": (2048, 2048),
    "transformer_blocks.27.attn2.to_k": (2048, 1024),
    "transformer_blocks.27.attn2.to_out.0": (2048, 2048),
    "transformer_blocks.27.ff.net.0.proj": (8192, 2048),
    "transformer_blocks.1.norm3.linear_2": (6144, 256),
}
ELSEWHERE = ("comfy", "comfy-down", "kohya", "kohya-diffusers", "lycoris", "diffusers-lycoris", "peft", "diffusers")
WITH_OTHERS = ("comfy", "comfy-down", "kohya", "diffusers", "diffusers-lycoris", "peft")
"""What has a place for the conditioner and the text encoder, too."""


def conditioned(writer: Callable[[Modules], Tensors]) -> Tensors:
    """The transformer's and the conditioner's modules, which the authors have in one."""
    return writer({**BLOCKS, **{f"llm_adapter.{name}": shape for name, shape in CONDITIONER.items()}})


def sd_scripts() -> Tensors:
    """kohya-ss/sd-scripts `networks/lora_anima.py`, with `train_llm_adapter` and the text encoder."""
    return conditioned(musubi) | pairs(QWEN3, "lora_te_", DOWN_UP, 1.0, flat=True)


def sd_scripts_for_comfy() -> Tensors:
    """kohya-ss/sd-scripts `networks/convert_anima_lora_to_comfy.py`."""
    ends = (".lora_A.weight", ".lora_B.weight")
    made = pairs({f"llm_adapter.{name}": shape for name, shape in CONDITIONER.items()}, "diffusion_model.", ends, 1.0)
    made |= pairs(BLOCKS, "diffusion_model.", ends, 1.0)
    return made | pairs(QWEN3, "text_encoders.qwen3_06b.transformer.model.", ends, 1.0)


def onetrainer_original() -> Tensors:
    """Nerogar/OneTrainer `modules/model/AnimaModel.py` (`diffusers_to_original`): as in the authors' checkpoint."""
    return pairs(BLOCKS, "net.", alpha=1.0)


@pytest.mark.parametrize(
    ("tensors", "dialect"),
    [
        (comfy({**BLOCKS, **AROUND}), "comfy"),
        (pairs(BLOCKS, "diffusion_model.", DOWN_UP, 2.0), "comfy-down"),
        (musubi({**BLOCKS, **AROUND}), "kohya"),
        (pairs(AS_DIFFUSERS, "transformer."), "diffusers"),
        (pairs(AS_DIFFUSERS, "transformer.", alpha=2.0), "diffusers-alpha"),
        (pairs(AS_DIFFUSERS, "lycoris_", DOWN_UP, 1.0, flat=True), "lycoris"),
        (onetrainer_original(), "onetrainer-original"),
        (pairs(BLOCKS), "diffsynth"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_anima_come_back(tensors: Tensors, dialect: str, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "anima")
    assert [note for note in found.notes if "alike" in note] == []
    sound(path)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


@pytest.mark.parametrize(
    ("tensors", "dialect", "parts"),
    [
        (conditioned(comfy), "comfy", 2),
        (conditioned(musubi), "kohya", 2),
        (sd_scripts(), "kohya", 3),
        (sd_scripts_for_comfy(), "comfy", 3),
        (pairs(AS_DIFFUSERS, "transformer.") | pairs(CONDITIONER, "text_conditioner."), "diffusers", 2),
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
    assert len(done.dropped) == len(CONDITIONER)


@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_lycoris_methods_of_anima(method: str, tmp_path: Path) -> None:
    made = lokr(BLOCKS, "diffusion_model.", 8, 4, 2.0) if method == "lokr" else loha(BLOCKS, "diffusion_model.", 1.0)
    path = write(tmp_path / "a.safetensors", made)
    assert ao.inspect(path).architecture.value == "anima"
    comes_back(path, "comfy", tmp_path, ("kohya", "lycoris", "diffusers-lycoris", "peft"))


def test_diffusers_converts_anima_as_we_do(tmp_path: Path) -> None:
    made = conditioned(comfy) | comfy(AROUND)
    agrees("AnimaLoraLoaderMixin", write(tmp_path / "a.safetensors", made), tmp_path)


CONFIG = {
    "_class_name": "CosmosTransformer3DModel",
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "text_embed_dim": 16,
    "adaln_lora_dim": 8,
    "extra_pos_embed_type": None,
}


def test_the_class_of_diffusers_takes_what_we_write(tmp_path: Path) -> None:
    """A small Cosmos, built from its config: the authors' names are known for it, too, and every update reaches its module."""
    model_class: Any = importlib.import_module("diffusers").CosmosTransformer3DModel
    model = model_class.from_config(CONFIG)
    base = tmp_path / "config.json"
    base.write_text(json.dumps(CONFIG))
    modules: Modules = {
        "blocks.0.cross_attn.k_proj": (24, 16),
        "blocks.0.adaln_modulation_mlp.2": (72, 8),
        "final_layer.linear": (16, 24),
    }
    path = write(tmp_path / "a.safetensors", {key: t.float() for key, t in comfy(modules).items()})
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", base=base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_lora_adapter(load_file(tmp_path / "b.safetensors"), prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    after = model.state_dict()
    wanted = deltas(load_file(path))
    names = ("transformer_blocks.0.attn2.to_k", "transformer_blocks.0.norm3.linear_2", "proj_out")
    for name, own in zip(modules, names, strict=True):
        change = after[f"{own}.weight"] - before.pop(f"{own}.weight")
        assert torch.allclose(change, wanted[f"diffusion_model.{name}"], atol=1e-5)
    assert [key for key, value in before.items() if not torch.equal(after[key], value)] == []


OTHERS: dict[str, Modules] = {
    "a Cosmos of another size": {
        "blocks.0.cross_attn.k_proj": (5120, 1024),
        "blocks.0.self_attn.output_proj": (5120, 5120),
        "blocks.35.mlp.layer1": (20480, 5120),
    },
    "a Wan of no known size": {"blocks.0.self_attn.q": (2048, 2048), "blocks.0.ffn.0": (8192, 2048)},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("writer", [comfy, musubi])
def test_others_are_not_taken_for_anima(name: str, writer: Callable[[Modules], Tensors], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(OTHERS[name]))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(UnknownArchitectureOfFile):
        ao.load(path)


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
