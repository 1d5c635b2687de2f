"""Adapters of Wan 2.1, 2.2 and Z-Image as their trainers write them, and as their readers take them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainers import same, sound
from trainers import DOWN_UP, Shape, Tensors, ai_toolkit, loha, lokr, pairs, some, write

import adapterops as ao
from adapterops.errors import CannotRepresent, UnknownArchitectureOfFile

Modules = Mapping[str, Shape]


def wan(width: int, hidden: int, last: int, image: bool = False) -> dict[str, Shape]:
    """Modules of a Wan by its authors' names."""
    own = {f"blocks.0.self_attn.{p}": (width, width) for p in ("q", "o")}
    own |= {"blocks.1.cross_attn.k_img": (width, width)} if image else {}
    return own | {f"blocks.{last}.ffn.0": (hidden, width), f"blocks.{last}.ffn.2": (width, hidden)}


BASES: dict[str, Modules] = {
    "wan_1_3b": wan(1536, 8960, 29),
    "wan_14b": wan(5120, 13824, 39),
    "wan_14b_i2v": wan(5120, 13824, 39, image=True),
    "wan_5b": wan(3072, 14336, 29),
}
SMALL = BASES["wan_1_3b"]
AS_DIFFUSERS = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.self_attn.o": "blocks.0.attn1.to_out.0",
    "blocks.29.ffn.0": "blocks.29.ffn.net.0.proj",
    "blocks.29.ffn.2": "blocks.29.ffn.net.2",
}
Z_IMAGE: Modules = {
    **{f"layers.0.attention.to_{p}": (3840, 3840) for p in ("q", "k", "v", "out.0")},
    "noise_refiner.1.feed_forward.w1": (10240, 3840),
    "layers.29.adaLN_modulation.0": (15360, 256),
}
Z_IMAGE_COMFY: Modules = {
    "layers.0.attention.qkv": (11520, 3840),
    "layers.0.attention.out": (3840, 3840),
    "context_refiner.1.feed_forward.w2": (3840, 10240),
}
ELSEWHERE = ("comfy", "comfy-down", "kohya", "kohya-diffusers", "lycoris", "diffusers-lycoris", "peft", "diffusers")


def comfy(modules: Modules) -> Tensors:
    """ostris/ai-toolkit `extensions_built_in/diffusion_models/wan22`, tdrussell/diffusion-pipe `models/wan`: Comfy's."""
    return pairs(modules, "diffusion_model.")


def musubi(modules: Modules) -> Tensors:
    """kohya-ss/musubi-tuner `networks/lora.py` (and `lora_wan.py`, `lora_zimage.py`)."""
    return pairs(modules, "lora_unet_", DOWN_UP, 1.0, flat=True)


def comes_back(path: Path, dialect: str, tmp_path: Path, elsewhere: tuple[str, ...] = ELSEWHERE) -> None:
    """The file is the same after a way through every other dialect."""
    before = load_file(path)
    for name in elsewhere:
        there = tmp_path / name.replace("peft", "folder")
        done = ao.convert(path, name, there if name == "peft" else there.with_suffix(".safetensors"))
        assert done.proof is not None
        ao.convert(done.path, dialect, tmp_path / "back.safetensors", overwrite=True)
        same(load_file(tmp_path / "back.safetensors"), before)


@pytest.mark.parametrize("writer", [comfy, musubi])
@pytest.mark.parametrize("name", BASES)
def test_each_wan_is_told_by_its_modules(name: str, writer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(BASES[name]))
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("comfy" if writer is comfy else "kohya", name)
    # Text to video has no module of its own, so what is for it fits the other, too; it is the one that is taken.
    alike = [note for note in found.notes if "fit wan_14b and wan_14b_i2v, wan_14b_flf2v, wan_vace_14b" in note]
    assert len(alike) == (name == "wan_14b")
    sound(path)


@pytest.mark.parametrize(
    ("tensors", "dialect"),
    [
        (comfy(SMALL), "comfy"),
        (pairs(SMALL, "diffusion_model.", DOWN_UP, 2.0), "comfy-down"),
        (musubi(SMALL), "kohya"),
        (pairs({AS_DIFFUSERS[n]: s for n, s in SMALL.items()}, "transformer."), "diffusers"),
        (pairs({AS_DIFFUSERS[n]: s for n, s in SMALL.items()}, "lycoris_", DOWN_UP, 1.0, flat=True), "lycoris"),
        (pairs(SMALL), "diffsynth"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_spellings_of_wan_come_back(tensors: Tensors, dialect: str, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "wan_1_3b")
    comes_back(path, dialect, tmp_path)


def test_names_are_those_of_each_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy(SMALL))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    wanted = {}
    for key, tensor in comfy(SMALL).items():
        name = next(n for n in SMALL if f".{n}." in key)
        wanted[key.replace(f"diffusion_model.{name}", f"transformer.{AS_DIFFUSERS[name]}")] = tensor
    same(load_file(tmp_path / "b.safetensors"), wanted)
    ao.convert(path, "kohya", tmp_path / "c.safetensors")
    same(load_file(tmp_path / "c.safetensors"), pairs(SMALL, "lora_unet_", DOWN_UP, 4.0, flat=True))


@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_lycoris_methods_of_wan(method: str, tmp_path: Path) -> None:
    made = lokr(SMALL, "diffusion_model.", 16, 4, 2.0) if method == "lokr" else loha(SMALL, "diffusion_model.", 1.0)
    path = write(tmp_path / "a.safetensors", made)
    assert ao.inspect(path).architecture.value == "wan_1_3b"
    comes_back(path, "comfy", tmp_path, ("kohya", "lycoris", "diffusers-lycoris", "peft"))


BLOCK: Modules = {
    **{f"blocks.0.{a}.{p}": (1536, 1536) for a in ("self_attn", "cross_attn") for p in "qkvo"},
    "blocks.0.ffn.0": (8960, 1536),
    "blocks.0.ffn.2": (1536, 8960),
}
AROUND: Modules = {
    "time_embedding.0": (1536, 256),
    "time_embedding.2": (1536, 1536),
    "text_embedding.0": (1536, 4096),
    "text_embedding.2": (1536, 1536),
    "time_projection.1": (9216, 1536),
    "head.head": (64, 1536),
}


def deltas(tensors: Tensors) -> dict[str, torch.Tensor]:
    """What each module is changed by, in a file whose scales are 1."""
    ends = (".lora_A.weight", ".lora_B.weight")
    stems = {key.removesuffix(end) for key in tensors for end in ends if key.endswith(end)}
    return {stem: tensors[stem + ends[1]].float() @ tensors[stem + ends[0]].float() for stem in stems}


def agrees(mixin: str, path: Path, tmp_path: Path) -> None:
    """diffusers' own conversion makes the same names and updates of the file as ours."""
    loaders: Any = importlib.import_module("diffusers.loaders.lora_pipeline")
    theirs = deltas(getattr(loaders, mixin).lora_state_dict(load_file(path)))
    ao.convert(path, "diffusers", tmp_path / "ours.safetensors", fold_alpha=True, dtype="float32")
    ours = deltas(load_file(tmp_path / "ours.safetensors"))
    assert set(ours) == set(theirs)
    assert [n for n, delta in ours.items() if not torch.allclose(delta, theirs[n], rtol=0.05, atol=0.02)] == []


@pytest.mark.parametrize("name", ["comfy", "comfy-down", "kohya"])
def test_diffusers_converts_wan_as_we_do(name: str, tmp_path: Path) -> None:
    made = {
        "comfy": lambda: comfy({**BLOCK, **AROUND}),
        "comfy-down": lambda: pairs(BLOCK, "diffusion_model.", DOWN_UP, 2.0),
        "kohya": lambda: musubi(BLOCK),
    }[name]()
    agrees("WanLoraLoaderMixin", write(tmp_path / "a.safetensors", made), tmp_path)


@pytest.mark.parametrize("name", ["comfy-diffusers", "kohya-diffusers", "kohya"])
def test_diffusers_converts_z_image_as_we_do(name: str, tmp_path: Path) -> None:
    made = {
        "comfy-diffusers": lambda: comfy(Z_IMAGE),
        "kohya-diffusers": lambda: musubi({n: s for n, s in Z_IMAGE.items() if "out" not in n}),
        "kohya": lambda: pairs({"layers.0.attention.qkv": (11520, 3840)}, "lora_unet_", DOWN_UP, 1.0, flat=True),
    }[name]()
    path = write(tmp_path / "a.safetensors", made)
    assert ao.inspect(path).dialect == name
    agrees("ZImageLoraLoaderMixin", path, tmp_path)


CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "ffn_dim": 32,
    "text_dim": 16,
    "freq_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
}


def test_the_class_of_diffusers_takes_what_we_write(tmp_path: Path) -> None:
    """A small Wan, built from its config: the authors' names are known for it, too, and every update reaches its module."""
    model_class: Any = importlib.import_module("diffusers").WanTransformer3DModel
    model = model_class.from_config(CONFIG)
    base = tmp_path / "config.json"
    base.write_text(json.dumps(CONFIG))
    modules: Modules = {"blocks.0.self_attn.q": (24, 24), "blocks.0.cross_attn.o": (24, 24), "head.head": (16, 24)}
    path = write(tmp_path / "a.safetensors", {key: t.float() for key, t in comfy(modules).items()})
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", base=base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_lora_adapter(load_file(tmp_path / "b.safetensors"), prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    after = model.state_dict()
    wanted = deltas(load_file(path))
    names = {"blocks.0.self_attn.q": "blocks.0.attn1.to_q", "blocks.0.cross_attn.o": "blocks.0.attn2.to_out.0"}
    for name in modules:
        key = names.get(name, "proj_out") + ".weight"
        assert torch.allclose(after[key] - before.pop(key), wanted[f"diffusion_model.{name}"], atol=1e-5)
    assert [key for key, value in before.items() if not torch.equal(after[key], value)] == []


def distilled() -> Tensors:
    """ModelTC/LightX2V `tools/convert/lora_extractor.py`, `lightx2v/utils/lora_loader.py`: factors beside whole differences."""
    tensors = pairs(BASES["wan_14b_i2v"], "diffusion_model.", DOWN_UP)
    tensors |= {f"diffusion_model.{name}.diff_b": some(rows) for name, (rows, _) in BASES["wan_14b_i2v"].items()}
    shapes = {
        "blocks.0.diff_m": (1, 6, 5120),
        "head.diff_m": (1, 2, 5120),
        "blocks.0.norm3.diff": (5120,),
        "blocks.0.norm3.diff_b": (5120,),
        "blocks.0.self_attn.norm_q.diff": (5120,),
        "blocks.1.cross_attn.norm_k_img.diff": (5120,),
        "img_emb.proj.0.diff": (1280,),
        "patch_embedding.diff": (5120, 36, 1, 2, 2),
        "head.head.diff": (64, 5120),
    }
    return tensors | {f"diffusion_model.{name}": some(*shape) for name, shape in shapes.items()}


def test_lightx2vs_file_is_read_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", distilled())
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("comfy-down", "wan_14b_i2v")
    sound(path)
    adapter = ao.load(path)
    changed = {update.module for update in adapter if update.method == "diff"}
    assert {"blocks.0.scale_shift_table", "scale_shift_table", "blocks.0.norm2", "patch_embedding"} <= changed
    ao.save(adapter, tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), load_file(path))
    comes_back(path, "comfy-down", tmp_path, ("comfy", "kohya", "diffusers-lycoris"))


def test_who_reads_a_modulation_is_told(tmp_path: Path) -> None:
    """Comfy-Org/ComfyUI `comfy/lora.py`: a bare parameter's name and `.diff`; `.diff_m` is a key that is not loaded."""
    path = write(tmp_path / "a.safetensors", distilled())
    assert any("diff_m" in note for note in ao.convert(path, "comfy", tmp_path / "b.safetensors").notes)
    ao.convert(path, "diffusers-lycoris", tmp_path / "c.safetensors")
    assert "transformer.blocks.0.scale_shift_table.diff" in load_file(tmp_path / "c.safetensors")
    usual = pairs(SMALL, "diffusion_model.") | {"diffusion_model.blocks.0.modulation.diff": some(1, 6, 1536)}
    path = write(tmp_path / "d.safetensors", usual)
    done = ao.convert(path, "comfy-down", tmp_path / "e.safetensors")
    assert not any("diff_m" in note for note in done.notes)
    assert "diffusion_model.blocks.0.modulation.diff" in load_file(tmp_path / "e.safetensors")


def test_a_modulation_of_another_size_is_refused(tmp_path: Path) -> None:
    tensors = comfy(SMALL) | {"diffusion_model.blocks.0.diff_m": some(1, 6, 1535)}
    with pytest.raises(ao.AdapterOpsError, match="diff_m"):
        ao.load(write(tmp_path / "a.safetensors", tensors))


def test_differences_are_not_diffusers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", distilled())
    with pytest.raises(CannotRepresent, match="has no place for it"):
        ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    done = ao.convert(path, "diffusers", tmp_path / "b.safetensors", allow_drop=True)
    modules = BASES["wan_14b_i2v"]
    # Biases stand in the factors, and the differences of the thin weights of the ends as factors themselves.
    others = {
        "blocks.0.norm2",
        "blocks.0.attn1.norm_q",
        "blocks.1.attn2.norm_added_k",
        "condition_embedder.image_embedder.norm1",
    }
    others |= {"blocks.0.scale_shift_table", "scale_shift_table"}
    assert {told.split(": ")[1] for told in done.dropped} == others
    assert len(load_file(tmp_path / "b.safetensors")) == 3 * (len(modules) + 2)


@pytest.mark.parametrize(
    ("tensors", "dialect"),
    [
        (comfy(Z_IMAGE), "comfy-diffusers"),
        (musubi(Z_IMAGE), "kohya-diffusers"),
        (pairs(Z_IMAGE, "transformer."), "diffusers"),
        (comfy(Z_IMAGE_COMFY), "comfy"),
        (musubi(Z_IMAGE_COMFY), "kohya"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_spellings_of_z_image_come_back(tensors: Tensors, dialect: str, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "z_image")
    sound(path)
    comes_back(path, dialect, tmp_path, ("comfy", "kohya", "kohya-diffusers", "lycoris", "peft", "diffusers"))


OTHERS: dict[str, Modules] = {
    "Cosmos": {"blocks.0.attn1.to_q": (2048, 2048), "blocks.0.attn2.to_k": (2048, 1024)},
    "a Wan of no known size": wan(2048, 8192, 23),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("writer", [comfy, musubi])
def test_others_are_not_taken_for_wan(name: str, writer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(OTHERS[name]))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(UnknownArchitectureOfFile):
        ao.load(path)
