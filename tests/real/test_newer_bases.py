"""Adapters of Flux.3, Qwen-Image 2.1, MiniMax-H3, HunyuanDiT, Stable Cascade and ACE-Step 1.5, against their readers."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from base_rows import Base
from checks import added, agrees, comes_back, deltas, same, sound
from newer_bases import (
    ACE_STEP,
    ACE_STEP_XL,
    FLUX_3,
    HUNYUAN_DIT,
    MINIMAX_H3,
    QWEN_IMAGE_2_1,
    STABLE_CASCADE,
)
from safetensors.torch import load_file
from trainers import DEFAULT, DOWN_UP, Modules, Tensors, comfy, loha, lokr, musubi, pairs, write

import adapterops as ao
from adapterops.architectures import load, names
from adapterops.errors import UnknownArchitectureOfFile

BASES = (FLUX_3, QWEN_IMAGE_2_1, MINIMAX_H3, HUNYUAN_DIT, STABLE_CASCADE, ACE_STEP, ACE_STEP_XL)
ACE = (ACE_STEP, ACE_STEP_XL)
NO_LOADER = (HUNYUAN_DIT, STABLE_CASCADE)
"""Those for which diffusers has none."""


def of_comfy(base: Base, modules: Modules) -> Tensors:
    """ostris/ai-toolkit (`extensions_built_in/diffusion_models/*`, `audio_models/base_audio_model.py`): ACE-Step's transformer is
    the decoder of its model."""
    return pairs(modules, "diffusion_model.decoder.") if base in ACE else comfy(modules)


def of_kohya(base: Base, modules: Modules) -> Tensors:
    """kohya-ss/musubi-tuner (MiniMax-H3), kohya-ss/sd-scripts branch stable-cascade; what Comfy's generic names are."""
    return pairs(modules, "lora_unet_decoder_", DOWN_UP, 1.0, flat=True) if base in ACE else musubi(modules)


def component(base: Base) -> str:
    return "prior" if base is STABLE_CASCADE else "transformer"


WRITERS: dict[str, Callable[[Base], Tensors]] = {
    "comfy": lambda base: of_comfy(base, base.whole),
    "kohya": lambda base: of_kohya(base, base.whole),
    "lycoris-original": lambda base: pairs(base.whole, "lycoris_", DOWN_UP, 1.0, flat=True),
    "diffusers": lambda base: pairs(base.diffusers, f"{component(base)}."),
    "diffusers-alpha": lambda base: pairs(base.diffusers, f"{component(base)}.", alpha=2.0),
    "lycoris": lambda base: pairs(base.diffusers, "lycoris_", DOWN_UP, 1.0, flat=True),
    "kohya-diffusers": lambda base: pairs(base.diffusers, "lora_unet_", DOWN_UP, 1.0, flat=True),
    "comfy-diffusers": lambda base: comfy(base.diffusers),
}
ELSEWHERE = ("comfy", "comfy-down", "kohya", "diffusers-lycoris", "peft", "diffusers")


NOBODYS = {
    *((base.name, "kohya-diffusers") for base in ACE),
    *((base.name, "comfy-diffusers") for base in ACE),
    (STABLE_CASCADE.name, "lycoris"),
}


@pytest.mark.parametrize(
    ("base", "dialect"),
    [(base, dialect) for base in BASES for dialect in WRITERS if (base.name, dialect) not in NOBODYS],
    ids=lambda value: getattr(value, "name", value),
)
def test_files_come_back(base: Base, dialect: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", WRITERS[dialect](base))
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value, found.architecture.others) == (dialect, base.name, ())
    assert [note for note in found.notes if "alike" in note] == []
    sound(path)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_a_module_of_a_block_tells_the_base(base: Base, tmp_path: Path) -> None:
    for writer in (of_comfy, of_kohya):
        found = ao.inspect(write(tmp_path / "a.safetensors", writer(base, base.few)))
        assert found.architecture.value == base.name


@pytest.mark.parametrize("method", ["lokr", "loha"])
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_lycoris_methods(base: Base, method: str, tmp_path: Path) -> None:
    modules = {own: base.diffusers[name] for name, (own, *rows) in base.rows.items() if not rows}
    before = "diffusion_model.decoder." if base in ACE else "diffusion_model."
    made = lokr(modules, before, 8, 4, 2.0) if method == "lokr" else loha(modules, before, 1.0)
    path = write(tmp_path / "a.safetensors", made)
    assert ao.inspect(path).architecture.value == base.name
    comes_back(path, "comfy", tmp_path, ("kohya", "diffusers-lycoris", "peft"))


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_modules_are_the_authors_rows(base: Base, tmp_path: Path) -> None:
    """Each update acts on the rows of the authors' weight that are the module's, and on no others."""
    own = component(base)
    path = write(tmp_path / "a.safetensors", pairs({name: base.diffusers[name] for name in base.rows}, f"{own}."))
    ao.convert(path, "comfy", tmp_path / "b.safetensors", arch=base.name)
    made, before = deltas(load_file(tmp_path / "b.safetensors"), 6), deltas(load_file(path), 6)
    prefix = "diffusion_model.decoder." if base in ACE else "diffusion_model."
    assert set(made) == {f"{prefix}{rows[0]}" for rows in base.rows.values()}
    for name, (theirs, *rows) in base.rows.items():
        delta = made[f"{prefix}{theirs}"]
        start, stop = rows or (0, len(delta))
        assert torch.equal(delta[start:stop], before[f"{own}.{name}"])
        assert not delta[:start].any()
        assert not delta[stop:].any()


@pytest.mark.parametrize(
    ("base", "name", "theirs", "shape"),
    [
        ("flux3_klein", "norm_out.linear", "final_layer.image.adaLN_modulation.1", (6144, 3072)),
        ("minimax_h3", "transformer_blocks.3.ff.net.0.proj", "blocks.3.mlp.fc1", (28672, 5376)),
        ("hunyuan_dit", "norm_out.linear", "final_layer.adaLN_modulation.1", (2816, 1408)),
    ],
)
def test_halves_are_turned_round(base: str, name: str, theirs: str, shape: tuple[int, int], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs({name: shape}, "transformer."))
    ao.convert(path, "comfy", tmp_path / "b.safetensors", arch=base)
    first, second = deltas(load_file(path), 6)[f"transformer.{name}"].chunk(2)
    made = deltas(load_file(tmp_path / "b.safetensors"), 6)[f"diffusion_model.{theirs}"]
    assert torch.equal(made, torch.cat([second, first]))


QWENS_WITHOUT_THE_FUSED = {name: shape for name, shape in QWEN_IMAGE_2_1.whole.items() if not name.endswith("gate_up")}
OF_MINIMAX = {**MINIMAX_H3.whole, **MINIMAX_H3.few}


@pytest.mark.parametrize(
    ("mixin", "tensors"),
    [
        ("Flux3", comfy(FLUX_3.authors)),
        ("QwenImage", comfy(QWENS_WITHOUT_THE_FUSED)),
        ("MiniMaxH3", comfy(OF_MINIMAX)),
        ("MiniMaxH3", musubi(OF_MINIMAX)),
        ("MiniMaxH3", pairs(OF_MINIMAX, "diffusion_model.", DOWN_UP, 2.0)),
        ("MiniMaxH3", pairs(MINIMAX_H3.diffusers, "", DEFAULT)),
    ],
)
def test_diffusers_converts_adapters_as_we_do(mixin: str, tensors: Tensors, tmp_path: Path) -> None:
    """Of Flux.3 the blocks, of Qwen-Image 2.1 what Comfy calls so, too, of MiniMax-H3 everything."""
    agrees(f"{mixin}LoraLoaderMixin", write(tmp_path / "a.safetensors", tensors), tmp_path)


def test_diffusers_reads_what_ace_steps_trainer_calls_its_modules(tmp_path: Path) -> None:
    """ace-step/ACE-Step-1.5 saves peft's names of its decoder, which diffusers renames as our table does."""
    attention = {name: shape for name, shape in ACE_STEP.authors.items() if "attn" in name}
    loader: Any = importlib.import_module("diffusers.loaders.lora_pipeline").AceStepLoraLoaderMixin
    theirs = loader.lora_state_dict(pairs(attention, "base_model.model."))
    path = write(tmp_path / "a.safetensors", of_comfy(ACE_STEP, attention))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), theirs)


class Small(NamedTuple):
    """A small model of a class, and adapters of some of its modules."""

    class_name: str
    config: Mapping[str, Any]
    modules: Mapping[str, tuple[str, tuple[int, int]]]
    """By the authors' names: what diffusers calls it, and the shape."""


SMALL = {
    FLUX_3.name: Small(
        "Flux3Transformer2DModel",
        {
            "in_channels": 4,
            "cond_in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": [2, 2, 2, 2],
        },
        {
            "content_mode_blocks.image_cond.0.v_proj": ("mode_blocks.image_cond.0.attn.to_v", (16, 16)),
            "txt_mode_blocks.0.mlp_in": ("txt_mode_blocks.0.ff.linear_in", (96, 16)),
            "single_blocks.0.attn_out": ("single_transformer_blocks.0.attn.to_out.0", (16, 16)),
            "emb_in.image": ("x_embedders.image", (16, 4)),
            "single_stream_modulations.txt.lin": ("single_stream_modulations.txt.linear", (48, 16)),
        },
    ),
    QWEN_IMAGE_2_1.name: Small(
        "QwenImage21Transformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "context_in_dim": 12,
            "axes_dims_rope": [4, 2, 2],
        },
        {
            "transformer_blocks.0.attn.to_k": ("transformer_blocks.0.attn.to_k", (16, 16)),
            "transformer_blocks.0.img_mlp.out": ("transformer_blocks.0.img_mlp.out", (16, 48)),
            "modulation.1": ("modulation.1", (64, 16)),
            "txt_in.in_layer": ("txt_in.in_layer", (16, 12)),
        },
    ),
    MINIMAX_H3.name: Small(
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "hidden_size": 12,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "ffn_dim": 20,
            "in_channels": 2,
            "audio_in_channels": 3,
            "text_dim": 10,
            "freq_dim": 8,
            "time_embed_hidden_dim": 12,
            "time_embed_dim": 6,
            "rope_freq_dim": 2,
        },
        {
            "blocks.0.attn.out_proj": ("transformer_blocks.0.attn.to_out.0", (12, 16)),
            "blocks.0.adaln_proj.linear": ("transformer_blocks.0.adaln_proj.linear", (216, 6)),
            "token_refiner.blocks.0.mlp.fc2": ("token_refiner.refiner_blocks.0.ff.net.2", (12, 20)),
            "condition_proj": ("context_embedder", (12, 10)),
        },
    ),
    ACE_STEP.name: Small(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "in_channels": 6,
            "audio_acoustic_hidden_dim": 2,
            "encoder_hidden_size": 12,
        },
        {
            "layers.1.cross_attn.k_proj": ("layers.1.cross_attn.to_k", (8, 16)),
            "layers.0.self_attn.o_proj": ("layers.0.self_attn.to_out.0", (16, 16)),
            "layers.0.mlp.down_proj": ("layers.0.mlp.down_proj", (16, 24)),
            "condition_embedder": ("condition_embedder", (16, 12)),
        },
    ),
}


@pytest.mark.parametrize("base", [base for base in BASES if base.name in SMALL], ids=lambda base: base.name)
def test_the_class_of_diffusers_takes_what_we_write(base: Base, tmp_path: Path) -> None:
    """A small one, built from its config: the authors' names are known for it, too, and every update reaches its module."""
    small = SMALL[base.name]
    config = {"_class_name": small.class_name, **small.config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model: Any = getattr(importlib.import_module("diffusers"), small.class_name).from_config(config)
    tensors = of_comfy(base, {name: shape for name, (_, shape) in small.modules.items()})
    path = write(tmp_path / "a.safetensors", {key: tensor.float() for key, tensor in tensors.items()})
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", base=tmp_path / "config.json")
    found = {name: change for name, change in added(model, tmp_path / "b.safetensors").items() if change.any()}
    wanted = {
        key.removeprefix("diffusion_model.").removeprefix("decoder."): d for key, d in deltas(load_file(path)).items()
    }
    assert found.keys() == {f"{own}.weight" for own, _ in small.modules.values()}
    for name, (own, _) in small.modules.items():
        assert torch.allclose(found[f"{own}.weight"], wanted[name], atol=1e-5)


def test_the_classes_without_a_loader_take_it_from_peft(tmp_path: Path) -> None:
    """HunyuanDiT's: what was trained on the authors' one weight of queries, keys and values reaches diffusers' three."""
    component = load("hunyuan_dit").components["transformer"]
    model: Any = importlib.import_module("diffusers").HunyuanDiT2DModel.from_config(
        {**component.config, "num_layers": 2}
    )
    modules: Modules = {"blocks.0.attn1.Wqkv": (4224, 1408), "blocks.1.attn2.kv_proj": (2816, 1024)}
    path = write(tmp_path / "a.safetensors", {k: t.float() for k, t in comfy(modules).items()})
    ao.convert(path, "peft", tmp_path / "peft", arch="hunyuan_dit")
    found = {name: change for name, change in added(model, tmp_path / "peft").items() if change.any()}
    wanted = deltas(load_file(path))
    for name, parts in (("blocks.0.attn1.Wqkv", "qkv"), ("blocks.1.attn2.kv_proj", "kv")):
        stem = name.rpartition(".")[0]
        made = torch.cat([found.pop(f"{stem}.to_{p}.weight") for p in parts])
        assert torch.allclose(made, wanted[f"diffusion_model.{name}"], atol=1e-5)
    assert not found


@pytest.mark.parametrize("base", NO_LOADER, ids=lambda base: base.name)
def test_that_diffusers_has_no_loader_is_told(base: Base, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(base.diffusers, f"{component(base)}."))
    assert {f.rule.code for f in ao.validate(path, targets=["diffusers"], select=["L5"])} == {"L509"}


@pytest.mark.parametrize("base", [base for base in BASES if base not in NO_LOADER], ids=lambda base: base.name)
def test_diffusers_loads_what_we_write(base: Base, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", of_comfy(base, {**base.authors, **base.few}))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    checked = ao.validate(tmp_path / "b.safetensors", targets=["diffusers"], load_test=True, select=["L"])
    assert [finding.rule.code for finding in checked] == []


def test_stable_cascade_of_onetrainer(tmp_path: Path) -> None:
    """Nerogar/OneTrainer `modules/modelSaver/wuerstchen/WuerstchenLoRASaver.py` (LEGACY), with the text encoder."""
    tensors = pairs(STABLE_CASCADE.authors, "lora_prior_unet_", DOWN_UP, 1.0, flat=True)
    encoder: Modules = {"text_model.encoder.layers.31.self_attn.q_proj": (1280, 1280), "text_projection": (1280, 1280)}
    tensors |= pairs(encoder, "lora_prior_te_", DOWN_UP, 1.0, flat=True)
    path = write(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("onetrainer", "stable_cascade")
    sound(path)
    comes_back(path, "onetrainer", tmp_path, ("diffusers", "diffusers-lycoris", "peft"))


def test_minimaxs_names_before_peft_s_infix_are_left_alone(tmp_path: Path) -> None:
    """DiffSynth-Studio keeps queries, keys and values apart by heads in the one weight, and of some models it does not.  Shapes
    and names are the same, so that nothing is read as MiniMax-H3's there.  Under diffusers' names there is no such weight."""
    path = write(tmp_path / "a.safetensors", pairs(MINIMAX_H3.authors, "", DEFAULT))
    assert ao.inspect(path).architecture.value is None
    path = write(tmp_path / "b.safetensors", pairs(MINIMAX_H3.diffusers, "", DEFAULT))
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("diffsynth", "minimax_h3")


NEWER = {base.name for base in BASES} | {name for name in names() if load(name).variant}
OLDER = sorted(set(names()) - NEWER)
_BLOCK = re.compile(r"(?:blocks|layers)\.[123]\.")


def some_blocks(name: str, original: bool) -> Modules:
    """The attention of three blocks, as far as both code bases have its modules, by one of the two names."""
    component = next(own for key, own in load(name).components.items() if key in ("unet", "transformer"))
    spelled = {spec.original if original else spec.name: spec for spec in component.modules.values()}
    wanted = {
        own: spec.shape for own, spec in spelled.items() if own and _BLOCK.search(spec.name) and "att" in spec.name
    }
    return {own: (shape[0], shape[1]) for own, shape in wanted.items() if len(shape) == 2}


@pytest.mark.parametrize("name", OLDER)
def test_older_bases_keep_their_files(name: str, tmp_path: Path) -> None:
    """Few blocks of an older base are not taken for these, nor said to be theirs as well."""
    for original, prefix in ((False, "transformer."), (False, "unet."), (True, "diffusion_model.")):
        tensors = pairs(some_blocks(name, original), prefix, rank=1)
        found = ao.inspect(write(tmp_path / "a.safetensors", tensors)).architecture
        assert found.value not in NEWER
        assert NEWER.isdisjoint(found.others)


QWEN3_1_7B: Modules = {
    **{f"layers.{i}.self_attn.{p}_proj": (1024 if p in "kv" else 2048, 2048) for i in range(6) for p in "qkvo"},
    **{f"layers.{i}.mlp.{p}_proj": (6144, 2048) for i in range(6) for p in ("gate", "up")},
}


@pytest.mark.parametrize("ends", [DEFAULT, (".lora_A.weight", ".lora_B.weight")])
@pytest.mark.parametrize("prefix", ["", "model.", "base_model.model.", "base_model.model.model."])
def test_a_language_model_is_not_ace_step(prefix: str, ends: tuple[str, str], tmp_path: Path) -> None:
    """ACE-Step 1.5 has the layers of Qwen 3, in the sizes of its models of 1.7 and 4 billion parameters."""
    found = ao.inspect(write(tmp_path / "a.safetensors", pairs(QWEN3_1_7B, prefix, ends)))
    assert (found.dialect, found.architecture.value) == ("peft", None)


OTHERS: dict[str, Modules] = {
    "a larger Flux.3": {"single_blocks.0.q_proj": (4096, 4096), "single_blocks.0.mlp_in": (24576, 4096)},
    "another HunyuanDiT": {"blocks.0.attn1.Wqkv": (6144, 2048), "blocks.0.mlp.fc1": (8192, 2048)},
    "Cascade of a billion": {"down_blocks.0.2.attention.attn.to_q": (1536, 1536)},
    "another MiniMax": {"blocks.0.attn.qkv_proj": (9216, 3072), "blocks.0.mlp.fc1": (16384, 3072)},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("writer", [comfy, musubi])
def test_others_are_not_taken_for_these(name: str, writer: Callable[[Modules], Tensors], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(OTHERS[name]))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(UnknownArchitectureOfFile):
        ao.convert(path, "diffusers", tmp_path / "diffusers")
