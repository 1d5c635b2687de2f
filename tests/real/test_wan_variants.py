"""Adapters of Wan's variants: VACE, Animate, FLF2V and the image-to-video models of 1.3B, against diffusers' own classes."""

from __future__ import annotations

import importlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import same, sound
from safetensors.torch import load_file
from trainers import DEFAULT, DOWN_UP, Modules, Tensors, comfy, pairs, some, write

import adapterops as ao
from adapterops import architectures
from adapterops.architectures import Component, ModuleSpec
from adapterops.architectures.table import _component, _read, _templates

VARIANTS: dict[str, Modules] = {
    "wan_vace_14b": {"vace_blocks.0.before_proj": (5120, 5120), "vace_blocks.7.cross_attn.o": (5120, 5120)},
    "wan_vace_1_3b": {"vace_blocks.0.self_attn.q": (1536, 1536), "vace_blocks.14.after_proj": (1536, 1536)},
    "wan_animate_14b": {
        "face_adapter.fuser_blocks.0.linear1_kv": (10240, 5120),
        "face_adapter.fuser_blocks.7.linear2": (5120, 5120),
        "blocks.39.cross_attn.k_img": (5120, 5120),
    },
    "wan_1_3b_i2v": {"blocks.0.cross_attn.v_img": (1536, 1536), "blocks.29.ffn.0": (8960, 1536)},
    "wan_animate_2_14b": {"blocks.0.block.self_attn.q": (5120, 5120), "blocks.39.block.cross_attn.k_img": (5120, 5120)},
}
"""Modules that only these have, by their authors' names."""


def fun(modules: Modules) -> Tensors:
    """aigc-apps/VideoX-Fun `videox_fun/utils/lora_utils.py`: the whole model's name, which is empty, is a part of the key."""
    return pairs(modules, "lora_unet__", DOWN_UP, 2.0, flat=True)


def diffsynth(modules: Modules) -> Tensors:
    """modelscope/DiffSynth-Studio, with `--remove_prefix_in_ckpt pipe.vace.` or `pipe.dit.`, as its examples have it."""
    return pairs(modules, "", DEFAULT)


@pytest.mark.parametrize("writer", [comfy, fun, diffsynth])
@pytest.mark.parametrize("name", VARIANTS)
def test_each_is_told_by_its_modules(name: str, writer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(VARIANTS[name]))
    found = ao.inspect(path)
    dialects = {comfy: "comfy", fun: "kohya", diffsynth: "diffsynth"}
    assert (found.dialect, found.architecture.value) == (dialects[writer], name)
    # A fused projection comes back in the way that it was split.
    before = load_file(path)
    for other in ("comfy", "kohya", "lycoris-original", "diffusers", "peft"):
        there = tmp_path / (other.replace("peft", "folder") + ("" if other == "peft" else ".safetensors"))
        done = ao.convert(path, other, there, fold_alpha=other == "diffusers" and writer is fun)
        assert done.proof is not None
        if other != "diffusers" or writer is not fun:
            ao.convert(done.path, dialects[writer], tmp_path / "back.safetensors", overwrite=True)
            back = load_file(tmp_path / "back.safetensors")
            same(back, {key.replace("unet__", "unet_").replace(".default", ""): t for key, t in before.items()})


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_keeps_its_spelling(name: str, tmp_path: Path) -> None:
    for number, tensors in enumerate((fun(VARIANTS[name]), diffsynth(VARIANTS[name]))):
        path = write(tmp_path / f"{number}.safetensors", tensors)
        ao.save(ao.load(path), tmp_path / f"again{number}.safetensors")
        same(load_file(tmp_path / f"again{number}.safetensors"), tensors)


def small(name: str, **numbers: int | list[int]) -> Component:
    document = _read(str(files(architectures) / f"{name}.toml"))
    table = document["components"]["transformer"]
    return _component("transformer", table, _templates(document), {**table["config"], **numbers})


def checkpoint(component: Component) -> tuple[Tensors, Tensors]:
    """Parameters under the authors' names, every row a number of its own, and what the table makes of them."""
    authors: Tensors = {}
    expected: Tensors = {}
    specs: list[ModuleSpec] = [*component.modules.values(), *component.fused.values()]
    for spec in specs:
        for parameter in spec.params if spec.original else ():
            start = len(authors) * 100_000
            rows = torch.arange(start, start + spec.shape[0])
            authors[f"{spec.original}.{parameter}"] = rows
            at = 0
            for part, first, last in spec.joins or ((spec.name, 0, spec.shape[0]),):
                assert first == 0
                expected[f"{part}.{parameter}"] = rows[at : at + last]
                at += last
    for spec in component.parameters.values():
        authors[spec.original] = expected[spec.name] = torch.tensor([len(authors)])
    return authors, expected


@pytest.mark.parametrize("name", VARIANTS)
def test_diffusers_converts_checkpoints_as_the_rows_say(name: str) -> None:
    numbers: dict[str, Any] = {"num_layers": 2}
    authors, expected = checkpoint(small(name, **numbers))
    conversion: Any = importlib.import_module("diffusers.loaders.single_file_utils")
    own = "wan_animate_2" if name == "wan_animate_2_14b" else "wan"
    convert = getattr(conversion, f"convert_{own}_transformer_to_diffusers")
    # Biases of the motion encoder's activations stand as images of one pixel there.
    images = {k: t.reshape(1, -1, 1, 1) for k, t in authors.items() if ".net_app.convs." in k and k.endswith(".bias")}
    made = convert({**authors, **images})
    assert made.keys() == expected.keys()
    assert [key for key, rows in expected.items() if not torch.equal(made[key].reshape(-1), rows)] == []


def test_the_places_of_two_images_are_a_parameter(tmp_path: Path) -> None:
    """Wan-Video/Wan2.1 `wan/modules/model.py` (`MLPProj`, `flf_pos_emb`): a difference of it is FLF2V's."""
    modules: Modules = {"blocks.0.cross_attn.k_img": (5120, 5120), "img_emb.proj.1": (1280, 1280)}
    tensors = comfy(modules) | {"diffusion_model.img_emb.emb_pos.diff": some(1, 514, 1280)}
    path = write(tmp_path / "a.safetensors", tensors)
    assert ao.inspect(path).architecture.value == "wan_14b_flf2v"
    ao.convert(path, "diffusers-lycoris", tmp_path / "b.safetensors")
    assert "transformer.condition_embedder.image_embedder.pos_embed.diff" in load_file(tmp_path / "b.safetensors")
    model: Any = importlib.import_module("diffusers").WanTransformer3DModel
    with torch.device("meta"):
        own = dict(model.from_config({**small("wan_14b_flf2v").config, "num_layers": 1}).named_parameters())
    assert own["condition_embedder.image_embedder.pos_embed"].shape == (1, 514, 1280)


@pytest.mark.parametrize("class_name", ["SkyReelsV2Transformer3DModel", "ChronoEditTransformer3DModel"])
def test_classes_with_wans_names_take_its_files(class_name: str, tmp_path: Path) -> None:
    """SkyReels V2 and ChronoEdit have classes of their own, and Wan's modules."""
    config = {**small("wan_14b_i2v").config, "num_layers": 1}
    modules: Modules = {
        "blocks.0.self_attn.q": (5120, 5120),
        "blocks.0.cross_attn.v_img": (5120, 5120),
        "head.head": (64, 5120),
    }
    path = write(tmp_path / "a.safetensors", comfy(modules))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    with torch.device("meta"):
        model = getattr(importlib.import_module("diffusers"), class_name).from_config(config)
    model.load_lora_adapter(load_file(tmp_path / "b.safetensors"), prefix="transformer", low_cpu_mem_usage=True)
    layers = {n.removesuffix(".lora_A.default_0") for n, _ in model.named_modules() if n.endswith(".lora_A.default_0")}
    assert layers == {"blocks.0.attn1.to_q", "blocks.0.attn2.add_v_proj", "proj_out"}


def test_a_file_for_text_alone_loads_into_the_model_for_images(tmp_path: Path) -> None:
    """diffusers fills the projections of the image in with zeros; they are not left without values."""
    modules = {f"blocks.0.cross_attn.{p}": (5120, 5120) for p in "qkvo"}
    path = write(tmp_path / "a.safetensors", comfy(modules))
    checked = ao.validate(path, targets=["diffusers"], load_test=True, arch="wan_14b_i2v", select=["L"])
    assert [finding.rule.code for finding in checked] == []
    sound(path)
