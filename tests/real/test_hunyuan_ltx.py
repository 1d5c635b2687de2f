"""Adapters of HunyuanVideo, FramePack and LTX-Video as their trainers write them, and as their readers take them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import deltas, same
from safetensors.torch import load_file
from trainers import DOWN_UP, FLUX, Modules, Tensors, comfy, musubi, pairs, write
from video_bases import HUNYUAN, HUNYUANS_BLOCKS, LTX_2

import adapterops as ao
from adapterops import errors
from adapterops.adapter import Certainty


def test_comfys_names_are_what_comfy_maps_the_authors_to(tmp_path: Path) -> None:
    """Comfy-Org/ComfyUI `comfy/lora.py` (`model_lora_keys_unet`) says so by replacing parts of the names."""
    ao.convert(write(tmp_path / "a.safetensors", comfy(HUNYUANS_BLOCKS)), "comfy-hunyuan", tmp_path / "b.safetensors")
    renamed = {}
    for key, tensor in load_file(tmp_path / "b.safetensors").items():
        for one, other in (
            ("_mod.lin.", "_mod.linear."),
            ("_attn.qkv.", "_attn_qkv."),
            ("_attn.proj.", "_attn_proj."),
            ("mlp.0.", "mlp.fc1."),
            ("mlp.2.", "mlp.fc2."),
            (".modulation.lin.", ".modulation.linear."),
        ):
            key = key.replace(one, other)
        renamed[key] = tensor
    same(renamed, comfy(HUNYUANS_BLOCKS))


def test_a_whole_file_by_comfys_names(tmp_path: Path) -> None:
    """Most of it is Flux.1's by name and size, and so is what a look at some of many keys finds."""
    modules = {f"double_blocks.{i}.img_attn.proj": (3072, 3072) for i in range(20)}
    modules |= {f"double_blocks.{i}.{s}_mod.lin": (18432, 3072) for i in range(20) for s in ("img", "txt")}
    modules |= {f"double_blocks.{i}.txt_attn.qkv": (9216, 3072) for i in range(20)}
    for ends, dialect in ((DOWN_UP, "comfy-down-hunyuan"), ((".lora_A.weight", ".lora_B.weight"), "comfy-hunyuan")):
        path = write(tmp_path / f"{dialect}.safetensors", pairs(modules, "diffusion_model.", ends, 1.0, rank=1))
        found = ao.inspect(path)
        assert (found.dialect, found.architecture.value, found.modules) == (dialect, "hunyuan_video", len(modules))


def test_few_blocks_by_comfys_names(tmp_path: Path) -> None:
    """They are Flux.1's by every sign, unless the user, or a header, says otherwise."""
    modules: Modules = {"double_blocks.3.img_attn.qkv": (9216, 3072), "double_blocks.3.img_mlp.0": (12288, 3072)}
    path = write(tmp_path / "a.safetensors", comfy(modules))
    assert ao.inspect(path).architecture.value == "flux"
    done = ao.convert(path, "diffusion-pipe", tmp_path / "b.safetensors", arch="hunyuan_video")
    names = {key.partition(".lora_")[0] for key in load_file(done.path)}
    assert names == {"transformer.double_blocks.3.img_attn_qkv", "transformer.double_blocks.3.img_mlp.fc1"}
    ao.convert(done.path, "comfy-hunyuan", tmp_path / "c.safetensors", arch="hunyuan_video")
    found = ao.inspect(tmp_path / "c.safetensors")
    assert (found.dialect, found.architecture.value) == ("comfy-hunyuan", "hunyuan_video")


def test_where_diffusers_is_wrong(tmp_path: Path) -> None:
    """Of the refiner's attention it cuts the factor that the three parts share as it cuts the other; of the last norm it turns
    both round."""
    modules = {
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (9216, 3072),
        "final_layer.adaLN_modulation.1": (6144, 3072),
        "double_blocks.0.img_attn_qkv": (9216, 3072),
    }
    path = write(tmp_path / "a.safetensors", pairs(modules, "diffusion_model.", rank=3))
    loaders: Any = importlib.import_module("diffusers.loaders.lora_pipeline")
    theirs = loaders.HunyuanVideoLoraLoaderMixin.lora_state_dict(load_file(path))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    ours, wanted = load_file(tmp_path / "b.safetensors"), deltas(load_file(path), 6)
    stem = "transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_"
    assert [made[f"{stem}q.lora_A.weight"].shape[0] for made in (ours, theirs)] == [3, 1]
    made = deltas(ours, 6)
    parts = torch.cat([made[stem + part] for part in "qkv"])
    assert torch.allclose(parts, wanted[f"diffusion_model.{next(iter(modules))}"])
    shift, scale = wanted["diffusion_model.final_layer.adaLN_modulation.1"].chunk(2)
    turned, name = torch.cat([scale, shift]), "transformer.norm_out.linear"
    assert torch.allclose(made[name], turned)
    assert not torch.allclose(deltas({k: t for k, t in theirs.items() if name in k}, 6)[name], turned)


def every(blocks: int, singles: int) -> Modules:
    """The attention of each block of a Flux.1, or of a HunyuanVideo, by diffusers' names."""
    out = {f"transformer_blocks.{i}.attn.to_{p}": (3072, 3072) for i in range(blocks) for p in ("q", "out.0")}
    return out | {f"single_transformer_blocks.{i}.attn.to_k": (3072, 3072) for i in range(singles)}


FLAT: Modules = {f"double_blocks.{i}.img_attn_qkv": (9216, 3072) for i in range(19)}


@pytest.mark.parametrize(
    ("tensors", "base", "alike"),
    [
        (pairs(every(19, 38), "transformer.", rank=1), "flux", False),
        (pairs(every(20, 40), "transformer.", rank=1), "hunyuan_video", False),
        (pairs(every(2, 2), "transformer.", rank=1), "flux", True),
        (pairs(every(19, 37), "transformer.", rank=1), "flux", True),
        (pairs(FLUX, "transformer."), "flux", True),
        (pairs(FLAT, "lora_unet_", DOWN_UP, 1.0, flat=True, rank=1), "flux", False),
        (musubi({"double_blocks.3.img_attn_qkv": (9216, 3072)}), "flux", True),
        (musubi({"double_blocks.18.img_attn_qkv": (9216, 3072)}), "flux", True),
        (musubi({"double_blocks.3.img_mlp.fc1": (12288, 3072)}), "hunyuan_video", False),
        (musubi({"double_blocks.3.img_mlp.0": (12288, 3072)}), "flux", False),
    ],
    ids=[
        "flux",
        "hunyuan",
        "two blocks",
        "all blocks but one",
        "first and last",
        "flat",
        "a flat one",
        "last",
        "fc1",
        "mlp.0",
    ],
)
def test_flux_and_hunyuan_video_are_told_apart(tensors: Tensors, base: str, alike: bool, tmp_path: Path) -> None:
    """By names, sizes and the number of blocks; where both fit alike, that is told."""
    found = ao.inspect(write(tmp_path / "a.safetensors", tensors))
    assert found.architecture.value == base
    told = [note for note in found.notes if "alike" in note and "hunyuan_video" in note]
    assert len(told) == alike
    assert not alike or found.architecture.certainty is Certainty.ASSUMED


@pytest.mark.parametrize("said", ["hunyuan-video/lora", "framepack/lora", "Flux.1-dev/lora", "anything"])
def test_what_a_header_says_of_modules_that_both_have(said: str, tmp_path: Path) -> None:
    """kohya-ss/musubi-tuner `utils/sai_model_spec.py` (`build_metadata`)."""
    tensors = pairs(every(2, 2), "lora_unet_", DOWN_UP, 1.0, flat=True, rank=1)
    found = ao.inspect(write(tmp_path / "a.safetensors", tensors, **{"modelspec.architecture": said}))
    assert found.dialect == "kohya-diffusers"
    named = said.startswith(("hunyuan", "framepack"))
    assert found.architecture.value == ("hunyuan_video" if named else "flux")
    assert (found.architecture.certainty is Certainty.ASSUMED) == (said == "anything")


def test_diffusion_pipes_folder(tmp_path: Path) -> None:
    """Its keys in peft's file, beside peft's config, which names no module of the file."""
    folder = tmp_path / "a"
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["img_attn_qkv", "linear1", "linear2", "fc1"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write(folder / "adapter_model.safetensors", pairs(HUNYUAN.authors, "transformer."), format="pt")
    found = ao.inspect(folder)
    assert (found.dialect, found.architecture.value) == ("diffusion-pipe", "hunyuan_video")
    ao.convert(folder, "comfy", tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), comfy(HUNYUAN.authors))


def test_what_ltx_2_and_the_13b_share_is_told(tmp_path: Path) -> None:
    """An adapter of the video alone has the same names and sizes in both, and is converted alike."""
    modules = {name: shape for name, shape in LTX_2.authors.items() if "audio" not in name}
    path = write(tmp_path / "a.safetensors", comfy(modules))
    found = ao.inspect(path)
    assert (found.architecture.value, found.architecture.certainty) == ("ltx_13b", Certainty.ASSUMED)
    assert any("fit ltx_13b and ltx_2, ltx_2_3 alike" in note for note in found.notes)
    said = ao.inspect(write(tmp_path / "b.safetensors", comfy(modules), ss_base_model_version="Lightricks/LTX-2"))
    assert (said.architecture.value, said.architecture.certainty) == ("ltx_2", Certainty.READ)
    for base in ("ltx_13b", "ltx_2"):
        ao.convert(path, "diffusers", tmp_path / f"{base}.safetensors", arch=base)
    same(load_file(tmp_path / "ltx_13b.safetensors"), load_file(tmp_path / "ltx_2.safetensors"))


def test_a_table_is_asked_for_by_its_name(tmp_path: Path) -> None:
    """Where the modules fit Flux.1 as well."""
    path = write(tmp_path / "a.safetensors", pairs(every(2, 2), "transformer.", rank=1))
    ao.convert(path, "comfy", tmp_path / "b.safetensors", arch="hunyuan_video")
    assert any("single_blocks.0.linear1" in key for key in load_file(tmp_path / "b.safetensors"))
    assert any("double_blocks.0.img_attn_proj" in key for key in load_file(tmp_path / "b.safetensors"))


def test_a_file_of_flux_is_not_merged_with_one_of_hunyuan_video(tmp_path: Path) -> None:
    """Names in diffusers' spelling are the same, and sizes: the authors' own, and the number of blocks, tell them apart."""
    blocks = {f"double_blocks.{i}.img_attn.qkv": (9216, 3072) for i in range(19)}
    blocks |= {f"single_blocks.{i}.linear1": (21504, 3072) for i in range(38)}
    flux = write(tmp_path / "flux.safetensors", pairs(blocks, "diffusion_model.", rank=1))
    other = {name.replace(".img_attn.qkv", ".img_attn_qkv"): shape for name, shape in blocks.items()}
    other |= {"double_blocks.19.img_attn_qkv": (9216, 3072), "single_blocks.39.linear1": (21504, 3072)}
    hunyuan = write(tmp_path / "hunyuan.safetensors", pairs(other, "diffusion_model.", rank=1))
    assert ao.inspect(flux).architecture.certainty is Certainty.ASSUMED  # Chroma has the same
    for sources in ([flux, hunyuan], [hunyuan, flux]):
        with pytest.raises(errors.UsageError, match="different base models"):
            ao.merge(sources, tmp_path / "out.safetensors", "cat")
    assert not (tmp_path / "out.safetensors").exists()


EMBEDDERS: Modules = {
    "txt_in.c_embedder.linear_2": (3072, 3072),
    "txt_in.t_embedder.mlp.2": (3072, 3072),
    "time_in.mlp.2": (3072, 3072),
}


@pytest.mark.parametrize("dialect", ["diffusion-pipe", "comfy-hunyuan", "comfy-down-hunyuan"])
def test_embedders_alone_are_found_again(dialect: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", pairs(EMBEDDERS, "diffusion_model."))
    made = ao.convert(source, dialect, tmp_path / "b.safetensors")
    found = ao.inspect(made.path)
    assert (found.dialect, found.architecture.value) == (dialect, "hunyuan_video")
    back = ao.convert(made.path, "comfy", tmp_path / "c.safetensors")
    assert load_file(back.path).keys() == load_file(source).keys()
