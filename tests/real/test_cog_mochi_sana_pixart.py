"""Adapters of CogVideoX, CogView4, Mochi 1, Sana and PixArt as their trainers write them, and as their readers take them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_trainers import same, sound
from test_wan_z_image import Modules, agrees, comes_back, comfy, deltas
from trainers import DOWN_UP, Tensors, ai_toolkit, loha, lokr, pairs, some, write

import adapterops as ao
from adapterops.adapter import Certainty
from adapterops.errors import CannotRepresent, Conflict, InvalidHeader, UnknownArchitectureOfFile, UnknownFact
from adapterops.methods import METHODS


class Base(NamedTuple):
    """A base model, and modules that are no other's."""

    name: str
    diffusers: Modules
    """By diffusers' names: first and last blocks, and something around them."""
    authors: Modules
    """By the names that Comfy and the authors have; empty where everyone has diffusers'."""
    rows: dict[str, tuple[str, int, int] | tuple[str]]
    """For each module of `diffusers` the authors' one, and which of its rows, where that has more."""
    mixin: str
    """Which of diffusers' loaders takes it; "" where none does."""


COGVIDEOX_2B = Base(
    "cogvideox_2b",
    {
        "transformer_blocks.0.attn1.to_q": (1920, 1920),
        "transformer_blocks.29.attn1.to_out.0": (1920, 1920),
        "transformer_blocks.29.ff.net.0.proj": (7680, 1920),
        "transformer_blocks.3.norm1.linear": (11520, 512),
        "time_embedding.linear_1": (512, 1920),
    },
    {
        "blocks.0.q": (1920, 1920),
        "blocks.29.attn_out": (1920, 1920),
        "blocks.29.ff_proj": (7680, 1920),
        "blocks.3.norm1.linear": (11520, 512),
        "time_embedding_linear_1": (512, 1920),
    },
    {
        "transformer_blocks.0.attn1.to_q": ("blocks.0.q",),
        "transformer_blocks.29.attn1.to_out.0": ("blocks.29.attn_out",),
        "transformer_blocks.29.ff.net.0.proj": ("blocks.29.ff_proj",),
        "transformer_blocks.3.norm1.linear": ("blocks.3.norm1.linear",),
        "time_embedding.linear_1": ("time_embedding_linear_1",),
    },
    "CogVideoXLoraLoaderMixin",
)
COGVIDEOX_1_5_I2V = Base(
    "cogvideox_1_5_5b_i2v",
    {
        "transformer_blocks.41.ff.net.2": (3072, 12288),
        "ofs_embedding.linear_2": (512, 512),
        "patch_embed.proj": (3072, 256),
    },
    {
        "blocks.41.ff_out": (3072, 12288),
        "ofs_embedding_linear_2": (512, 512),
        "patch_embed.proj": (3072, 256),
    },
    {
        "transformer_blocks.41.ff.net.2": ("blocks.41.ff_out",),
        "ofs_embedding.linear_2": ("ofs_embedding_linear_2",),
        "patch_embed.proj": ("patch_embed.proj",),
    },
    "CogVideoXLoraLoaderMixin",
)
COGVIEW4 = Base(
    "cogview4",
    {
        "transformer_blocks.0.attn1.to_q": (4096, 4096),
        "transformer_blocks.27.ff.net.2": (4096, 16384),
        "transformer_blocks.27.norm1.linear": (49152, 512),
        "time_condition_embed.condition_embedder.linear_1": (512, 1536),
    },
    {},
    {},
    "CogView4LoraLoaderMixin",
)
MOCHI = Base(
    "mochi",
    {
        "transformer_blocks.0.attn1.to_k": (3072, 3072),
        "transformer_blocks.47.attn1.add_v_proj": (3072, 1536),
        "transformer_blocks.46.attn1.to_add_out": (1536, 3072),
        "transformer_blocks.47.ff.net.2": (3072, 8192),
        "transformer_blocks.0.ff_context.net.0.proj": (8192, 1536),
        "transformer_blocks.47.norm1_context.linear_1": (1536, 3072),
        "norm_out.linear": (6144, 3072),
    },
    {
        "blocks.0.attn.qkv_x": (9216, 3072),
        "blocks.47.attn.qkv_y": (9216, 1536),
        "blocks.46.attn.proj_y": (1536, 3072),
        "blocks.47.mlp_x.w2": (3072, 8192),
        "blocks.0.mlp_y.w1": (8192, 1536),
        "blocks.47.mod_y": (1536, 3072),
        "final_layer.mod": (6144, 3072),
    },
    {
        "transformer_blocks.0.attn1.to_k": ("blocks.0.attn.qkv_x", 3072, 6144),
        "transformer_blocks.47.attn1.add_v_proj": ("blocks.47.attn.qkv_y", 6144, 9216),
        "transformer_blocks.46.attn1.to_add_out": ("blocks.46.attn.proj_y",),
        "transformer_blocks.47.ff.net.2": ("blocks.47.mlp_x.w2",),
        "transformer_blocks.47.norm1_context.linear_1": ("blocks.47.mod_y",),
    },
    "Mochi1LoraLoaderMixin",
)
SANA = Base(
    "sana_1600m",
    {
        "transformer_blocks.0.attn1.to_q": (2240, 2240),
        "transformer_blocks.19.attn2.to_out.0": (2240, 2240),
        "caption_projection.linear_1": (2240, 2304),
    },
    {},
    {},
    "SanaLoraLoaderMixin",
)
SANA_600M = Base(
    "sana_600m",
    {
        "transformer_blocks.0.attn1.to_q": (1152, 1152),
        "transformer_blocks.27.attn2.to_k": (1152, 1152),
        "caption_projection.linear_1": (1152, 2304),
        "time_embed.linear": (6912, 1152),
    },
    {},
    {},
    "SanaLoraLoaderMixin",
)
PIXART = Base(
    "pixart_alpha",
    {
        "transformer_blocks.0.attn1.to_k": (1152, 1152),
        "transformer_blocks.27.attn2.to_v": (1152, 1152),
        "transformer_blocks.27.attn2.to_q": (1152, 1152),
        "transformer_blocks.5.ff.net.0.proj": (4608, 1152),
        "adaln_single.emb.resolution_embedder.linear_2": (384, 384),
        "proj_out": (32, 1152),
    },
    {
        "blocks.0.attn.qkv": (3456, 1152),
        "blocks.27.cross_attn.kv_linear": (2304, 1152),
        "blocks.27.cross_attn.q_linear": (1152, 1152),
        "blocks.5.mlp.fc1": (4608, 1152),
        "csize_embedder.mlp.2": (384, 384),
        "final_layer.linear": (32, 1152),
    },
    {
        "transformer_blocks.0.attn1.to_k": ("blocks.0.attn.qkv", 1152, 2304),
        "transformer_blocks.27.attn2.to_v": ("blocks.27.cross_attn.kv_linear", 1152, 2304),
        "transformer_blocks.27.attn2.to_q": ("blocks.27.cross_attn.q_linear",),
        "transformer_blocks.5.ff.net.0.proj": ("blocks.5.mlp.fc1",),
        "adaln_single.emb.resolution_embedder.linear_2": ("csize_embedder.mlp.2",),
        "proj_out": ("final_layer.linear",),
    },
    "",
)
BASES = (COGVIDEOX_2B, COGVIDEOX_1_5_I2V, COGVIEW4, MOCHI, SANA, SANA_600M, PIXART)
ALIKE = {
    "sana_1600m": ("sana_1_5_1600m",),
    "cogvideox_1_5_5b_i2v": (),
}
"""What the modules of a base are also of: a later release with the same ones."""
ELSEWHERE = ("comfy", "comfy-down", "kohya", "kohya-diffusers", "lycoris", "diffusers-lycoris", "peft", "diffusers")


def lora_unet(modules: Modules) -> Tensors:
    """aigc-apps/CogVideoX-Fun `cogvideox/utils/lora_utils.py`; OneTrainer's KOHYA."""
    return pairs(modules, "lora_unet_", DOWN_UP, 1.0, flat=True)


def onetrainer(modules: Modules) -> Tensors:
    """Nerogar/OneTrainer, PixArt's LEGACY; ai-toolkit's older PixArt files."""
    return pairs(modules, "lora_transformer_", DOWN_UP, 2.0, flat=True)


BY_DIFFUSERS = {
    "diffusers": lambda m: pairs(m, "transformer."),
    "diffusers-alpha": lambda m: pairs(m, "transformer.", alpha=2.0),
    "lycoris": lambda m: pairs(m, "lycoris_", DOWN_UP, 1.0, flat=True),
    "diffsynth": pairs,
    "kohya-diffusers": lora_unet,
    "onetrainer": onetrainer,
}
BY_AUTHORS = {
    "comfy": comfy,
    "comfy-down": lambda m: pairs(m, "diffusion_model.", DOWN_UP, 2.0),
    "kohya": lora_unet,
    "onetrainer-original": lambda m: pairs(m, alpha=1.0),
}
"""The latter is Nerogar/OneTrainer's ORIGINAL."""


def read_as(path: Path, base: Base, dialect: str) -> None:
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, base.name)
    assert found.architecture.others == ALIKE.get(base.name, ())
    sound(path)


@pytest.mark.parametrize("dialect", BY_DIFFUSERS)
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_files_by_diffusers_names_come_back(base: Base, dialect: str, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", BY_DIFFUSERS[dialect](base.diffusers))
    if not base.authors and dialect == "kohya-diffusers":
        dialect = "kohya"  # the authors' names are the same
    read_as(path, base, dialect)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


@pytest.mark.parametrize("dialect", BY_AUTHORS)
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_files_by_the_authors_names_come_back(base: Base, dialect: str, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", BY_AUTHORS[dialect](base.authors or base.diffusers))
    read_as(path, base, dialect)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


@pytest.mark.parametrize("method", [lokr, loha])
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_lycoris_methods(base: Base, method: Any, tmp_path: Path) -> None:
    """Of what is no part of a fused module, where a Kronecker product could not be taken apart."""
    whole = {n: s for n, s in base.diffusers.items() if len(base.rows.get(n, ("",))) == 1 and "ff" not in n}
    whole.pop("norm_out.linear", None)
    made = method(whole, "transformer.", 8, 4, 2.0) if method is lokr else method(whole, "transformer.", 1.0)
    path = write(tmp_path / "a.safetensors", made)
    comes_back(path, "diffusers-lycoris", tmp_path, ("comfy", "kohya", "lycoris", "peft"))


@pytest.mark.parametrize("base", [base for base in BASES if base.rows], ids=lambda base: base.name)
def test_modules_are_those_of_comfy(base: Base, tmp_path: Path) -> None:
    """Each update acts on the rows of the authors' weight that are the module's, and on no others."""
    path = write(tmp_path / "a.safetensors", pairs({name: base.diffusers[name] for name in base.rows}, "transformer."))
    ao.convert(path, "comfy", tmp_path / "b.safetensors", arch=base.name)
    made, before = deltas(load_file(tmp_path / "b.safetensors")), deltas(load_file(path))
    assert set(made) == {f"diffusion_model.{rows[0]}" for rows in base.rows.values()}
    for name, (own, *rows) in base.rows.items():
        start, stop = rows or (0, base.diffusers[name][0])
        delta = made[f"diffusion_model.{own}"]
        assert delta.shape == base.authors[own]
        assert torch.equal(delta[start:stop], before[f"transformer.{name}"])
        assert not delta[:start].any()
        assert not delta[stop:].any()


def test_halves_of_mochi_are_turned_round(tmp_path: Path) -> None:
    """huggingface/diffusers `scripts/convert_mochi_to_diffusers.py` (`swap_proj_gate`, `swap_scale_shift`)."""
    turned = {"transformer_blocks.0.ff_context.net.0.proj": "blocks.0.mlp_y.w1", "norm_out.linear": "final_layer.mod"}
    path = write(tmp_path / "a.safetensors", pairs({n: MOCHI.diffusers[n] for n in turned}, "transformer."))
    ao.convert(path, "comfy", tmp_path / "b.safetensors", arch="mochi")
    made, before = deltas(load_file(tmp_path / "b.safetensors")), deltas(load_file(path))
    for name, own in turned.items():
        first, second = before[f"transformer.{name}"].chunk(2)
        assert torch.equal(made[f"diffusion_model.{own}"], torch.cat([second, first]))


@pytest.mark.parametrize("base", [base for base in BASES if base.mixin], ids=lambda base: base.name)
def test_diffusers_takes_what_we_write(base: Base, tmp_path: Path) -> None:
    """What came from the authors' names, as diffusers' loader reads it."""
    path = write(tmp_path / "a.safetensors", comfy(base.authors or base.diffusers))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", arch=base.name)
    agrees(base.mixin, tmp_path / "b.safetensors", tmp_path)


CONFIGS: dict[str, dict[str, Any]] = {
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 16,
        "num_layers": 2,
        "attention_bias": True,
        "use_rotary_positional_embeddings": True,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 9,
    },
    "CogView4Transformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
        "condition_dim": 4,
    },
    "MochiTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "pooled_projection_dim": 12,
        "in_channels": 4,
        "text_embed_dim": 16,
        "time_embed_dim": 8,
    },
    "SanaTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "sample_size": 8,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "sample_size": 16,
        "use_additional_conditions": False,
    },
}
"""Of small models of each class."""
BY_CONFIG: dict[str, dict[str, Any]] = {
    "CogVideoXTransformer3DModel": {
        "blocks.0.q": ("transformer_blocks.0.attn1.to_q", (32, 32)),
        "blocks.1.ff_out": ("transformer_blocks.1.ff.net.2", (32, 128)),
        "time_embedding_linear_2": ("time_embedding.linear_2", (8, 8)),
    },
    "PixArtTransformer2DModel": {
        "blocks.1.cross_attn.q_linear": ("transformer_blocks.1.attn2.to_q", (16, 16)),
        "blocks.0.mlp.fc2": ("transformer_blocks.0.ff.net.2", (16, 64)),
        "t_block.1": ("adaln_single.linear", (96, 16)),
    },
}
"""The authors' names are known for these, too: no size in their tables is a number of its own."""


@pytest.mark.parametrize("name", CONFIGS)
def test_the_class_of_diffusers_takes_what_we_write(name: str, tmp_path: Path) -> None:
    """A small model, built from its config: every update reaches its module, and nothing else changes."""
    torch.manual_seed(0)
    model = getattr(importlib.import_module("diffusers"), name).from_config(CONFIGS[name])
    base = tmp_path / "config.json"
    base.write_text(json.dumps({"_class_name": name, **CONFIGS[name]}))
    linear = {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    places = {own: module for own, (module, _) in BY_CONFIG.get(name, {}).items()} or {n: n for n in linear}
    modules: Modules = {own: tuple(linear[module].shape) for own, module in places.items()}
    tensors = {key: tensor.float() for key, tensor in lora_unet(modules).items()}
    path = write(tmp_path / "a.safetensors", tensors)
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", base=base, fold_alpha=True)
    ao.convert(path, "peft", tmp_path / "peft", base=base)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if hasattr(model, "load_lora_adapter"):
        model.load_lora_adapter(load_file(tmp_path / "b.safetensors"), prefix="transformer")
        model.fuse_lora()
        model.unload_lora()
    else:
        peft: Any = importlib.import_module("peft")
        model = peft.PeftModel.from_pretrained(model, tmp_path / "peft").merge_and_unload()
    after = model.state_dict()
    for own, module in places.items():
        stem = f"lora_unet_{own.replace('.', '_')}"
        wanted = tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"] / 4
        assert torch.allclose(after[f"{module}.weight"] - before.pop(f"{module}.weight"), wanted, atol=1e-5)
    assert [key for key, value in before.items() if not torch.equal(after[key], value)] == []


def blocks(numbers: range, ends: tuple[str, ...], width: int) -> Modules:
    return {f"transformer_blocks.{i}.{end}": (width, width) for i in numbers for end in ends}


FIRST = tuple(f"attn1.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0"))
BOTH = (*FIRST, *(f"attn2.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0")))
OTHER_5B = ("cogvideox_1_5_5b", "cogvideox_1_5_5b_i2v")


@pytest.mark.parametrize(
    ("modules", "base", "others"),
    [
        (blocks(range(30), FIRST, 1920), "cogvideox_2b", ()),
        (blocks(range(42), FIRST, 3072), "cogvideox_5b", OTHER_5B),
        (blocks(range(3), FIRST, 3072), "cogvideox_5b", ("mochi", *OTHER_5B)),
        (blocks(range(48), FIRST, 3072), "mochi", ()),
        (blocks(range(28), FIRST, 4096), "cogview4", ()),
        (blocks(range(48), FIRST, 4096), "ltx_13b", ("ltx_2", "ltx_2_3")),
        (blocks(range(48), BOTH, 4096), "ltx_13b", ("ltx_2", "ltx_2_3")),
        (blocks(range(20), BOTH, 2240), "sana_1600m", ("sana_1_5_1600m",)),
        (blocks(range(60), BOTH, 2240), "sana_1_5_4800m", ()),
        (blocks(range(3), BOTH, 2240), "sana_1600m", ("sana_1_5_1600m", "sana_1_5_4800m")),
        (blocks(range(28), BOTH, 1152), "pixart_alpha", ("pixart_sigma", "sana_600m")),
        (blocks(range(42), BOTH, 1152), "pixart_900m", ()),
        (blocks(range(28), BOTH, 2048), "ltx_2b", ()),
    ],
)
def test_what_trainers_adapt_by_default(modules: Modules, base: str, others: tuple[str, ...], tmp_path: Path) -> None:
    """The attention, of all blocks or of a few: where it is another base's too, the note says so."""
    tensors = {key: value[:, :1] if ".lora_B." in key else value[:1] for key, value in pairs(modules).items()}
    tensors = {f"transformer.{key}": value.contiguous() for key, value in tensors.items()}
    found = ao.inspect(write(tmp_path / "a.safetensors", tensors))
    assert (found.architecture.value, found.architecture.others) == (base, others)
    assert bool([note for note in found.notes if "alike" in note]) == bool(others)


FEW_5B = blocks(range(2), FIRST, 3072)
FEW_SANA = blocks(range(2), BOTH, 2240)
FEW_1152 = blocks(range(2), BOTH, 1152)


@pytest.mark.parametrize(
    ("said", "modules", "base"),
    [
        ("THUDM/CogVideoX-5b", FEW_5B, "cogvideox_5b"),
        ("zai-org/CogVideoX-5b-I2V", FEW_5B, "cogvideox_5b"),
        ("THUDM/CogVideoX1.5-5B", FEW_5B, "cogvideox_1_5_5b"),
        ("THUDM/CogVideoX1.5-5B-I2V", FEW_5B, "cogvideox_1_5_5b_i2v"),
        ("alibaba-pai/CogVideoX-Fun-V1.1-5b-InP", FEW_5B, "cogvideox_5b"),
        ("genmo/mochi-1-preview", FEW_5B, "mochi"),
        ("sana-sana1.0-1.6b-1024/lora", FEW_SANA, "sana_1600m"),
        ("sana-sana1.5-4.8b-1024/lora", FEW_SANA, "sana_1_5_4800m"),
        ("Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers", FEW_SANA, "sana_1_5_1600m"),
        ("sana/lora", FEW_1152, "sana_600m"),
        ("Efficient-Large-Model/Sana_600M_1024px_diffusers", FEW_1152, "sana_600m"),
        ("pixart-alpha/lora", FEW_1152, "pixart_alpha"),
        ("pixart-sigma/lora", FEW_1152, "pixart_sigma"),
        ("pixart_sigma", FEW_1152, "pixart_sigma"),
        ("pixart_sigma-900m-1024-v0.6/lora", FEW_1152, "pixart_900m"),
        ("terminusresearch/pixart-900m-1024-ft-v0.6", FEW_1152, "pixart_900m"),
        ("cogview4", blocks(range(2), FIRST, 4096), "cogview4"),
        ("THUDM/CogView4-6B", blocks(range(2), FIRST, 4096), "cogview4"),
    ],
)
def test_a_header_decides(said: str, modules: Modules, base: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(modules, "transformer."), **{"modelspec.architecture": said})
    found = ao.inspect(path)
    assert (found.architecture.value, found.architecture.certainty) == (base, Certainty.READ)
    assert found.notes == ()


OTHERS: dict[str, Modules] = {
    "another width": blocks(range(4), BOTH, 1408),
    "Comfy's names, another width": {"blocks.0.q": (2048, 2048), "blocks.0.ff_proj": (8192, 2048)},
    "Latte": {
        **blocks(range(28), BOTH, 1152),
        **{f"temporal_transformer_blocks.{i}.attn1.to_q": (1152, 1152) for i in range(300)},
    },
}


@pytest.mark.parametrize("writer", [comfy, lora_unet])
@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not_taken_for_these(name: str, writer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(OTHERS[name]))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(UnknownArchitectureOfFile):
        ao.load(path)


def test_pixarts_own_trainer(tmp_path: Path) -> None:
    """PixArt-alpha/PixArt-sigma `train_scripts/train_pixart_lora_hf.py`: a PEFT folder of the transformer."""
    modules = {name: shape for name, shape in PIXART.diffusers.items() if "resolution" not in name}
    write(tmp_path / "adapter_model.safetensors", pairs(modules, "base_model.model."))
    targets = ["to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear"]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": targets}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = ao.inspect(tmp_path)
    assert (found.dialect, found.architecture.value) == ("peft", "pixart_alpha")
    ao.convert(tmp_path, "comfy", tmp_path / "b.safetensors")
    ao.convert(tmp_path / "b.safetensors", "peft", tmp_path / "back")
    back, before = (
        load_file(tmp_path / "back/adapter_model.safetensors"),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    assert set(back) == set(before)
    assert all(torch.equal(back[key], value) for key, value in before.items())


def test_what_pixarts_own_trainer_saves_besides(tmp_path: Path) -> None:
    """The same behind the name of another denoiser."""
    tensors = pairs(PIXART.diffusers, "unet.base_model.model.")
    path = write(tmp_path / "a.safetensors", tensors)
    read_as(path, PIXART, "pixart-unet")
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    wanted = {key.replace("unet.base_model.model.", "transformer."): value for key, value in tensors.items()}
    same(load_file(tmp_path / "b.safetensors"), wanted)
    other = pairs({"down_blocks.0.attentions.0.proj_in": (320, 320)}, "unet.base_model.model.")
    assert ao.inspect(write(tmp_path / "c.safetensors", other)).dialect == "diffusers"


def test_convolutions_of_sana(tmp_path: Path) -> None:
    """OneTrainer's `ff.`: the convolutions of the feed-forward part, one of which is grouped."""
    tensors = {}
    for name, out, inputs, kernel in (
        ("conv_inverted", 11200, 2240, 1),
        ("conv_depth", 11200, 1, 3),
        ("conv_point", 2240, 5600, 1),
    ):
        stem = f"transformer.transformer_blocks.0.ff.{name}"
        tensors[f"{stem}.lora_down.weight"] = some(4, inputs, kernel, kernel, of=name)
        tensors[f"{stem}.lora_up.weight"] = some(out, 4, 1, 1, of=name)
        tensors[f"{stem}.alpha"] = torch.tensor(2.0, dtype=torch.bfloat16)
    path = write(tmp_path / "a.safetensors", tensors)
    assert ao.inspect(path).architecture.value == "sana_1600m"
    comes_back(path, "diffusers-lycoris", tmp_path, ("kohya", "comfy", "diffusers-alpha", "peft"))


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
    modules = blocks(range(2), FIRST, 3072)
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


def test_diffusers_has_no_loader_of_pixarts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(PIXART.diffusers, "transformer."))
    assert {f.rule.code for f in ao.validate(path, targets=["diffusers"], select=["L5"])} == {"L509"}
    assert not list(ao.validate(path, targets=["comfy"], select=["L5"]))
    (told,) = ao.validate(path, targets=["diffusers"], load_test=True, select=["L59"])
    assert told.rule.code == "L593"
