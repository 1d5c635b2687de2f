"""The names under which a conversion writes are those that each reader knows, rows where it has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from base_rows import Base
from checks import comes_back, same
from image_bases import AURAFLOW, ERNIE, HIDREAM, IDEOGRAM, KLEIN_4B, KREA, KREAS_PROJECTOR, LUMINA
from safetensors.torch import load_file
from trainers import DOWN_UP, Modules, comfy, pairs, write
from video_bases import LTX_2B, WAN_1_3B

import adapterops as ao


def converted(modules: Modules, tmp_path: Path, target: str = "diffusers") -> dict[str, torch.Tensor]:
    """What a file by the authors' names becomes."""
    path = write(tmp_path / "a.safetensors", comfy(modules))
    ao.convert(path, target, tmp_path / "b.safetensors")
    return load_file(tmp_path / "b.safetensors")


def stems(tensors: dict[str, torch.Tensor]) -> set[str]:
    """The names before the factors'."""
    return {key.partition(".lora_")[0] for key in tensors}


@pytest.mark.parametrize("base", [KLEIN_4B, WAN_1_3B], ids=lambda base: base.name)
def test_diffusers_and_kohya_have_each_its_own(base: Base, tmp_path: Path) -> None:
    """The modules by diffusers' names are the same ones, in the same order."""
    names = dict(zip(base.authors, base.diffusers, strict=True))
    wanted = {}
    for key, tensor in comfy(base.authors).items():
        name = next(n for n in base.authors if f".{n}." in key)
        wanted[key.replace(f"diffusion_model.{name}", f"transformer.{names[name]}")] = tensor
    same(converted(base.authors, tmp_path), wanted)
    ao.convert(tmp_path / "a.safetensors", "kohya", tmp_path / "c.safetensors")
    same(load_file(tmp_path / "c.safetensors"), pairs(base.authors, "lora_unet_", DOWN_UP, 4.0, flat=True))


@pytest.mark.parametrize("base", [ERNIE, HIDREAM], ids=lambda base: base.name)
def test_the_prefix_is_all_that_differs(base: Base, tmp_path: Path) -> None:
    same(converted(base.authors, tmp_path), pairs(base.authors, "transformer."))


def test_krea_2(tmp_path: Path) -> None:
    everything = {**KREA.whole, **KREAS_PROJECTOR}
    assert {
        "transformer.transformer_blocks.0.attn.to_gate",
        "transformer.transformer_blocks.27.ff.gate",
        "transformer.text_fusion.layerwise_blocks.1.attn.to_k",
        "transformer.text_fusion.projector",
        "transformer.time_mod_proj",
        "transformer.txt_in.linear_2",
        "transformer.final_layer.linear",
    } <= stems(converted(everything, tmp_path))
    ao.convert(tmp_path / "a.safetensors", "kohya", tmp_path / "c.safetensors")
    same(load_file(tmp_path / "c.safetensors"), pairs(everything, "lora_unet_", DOWN_UP, 4.0, flat=True))


def test_ltx_video(tmp_path: Path) -> None:
    made = converted(LTX_2B.whole, tmp_path)
    assert ao.inspect(tmp_path / "a.safetensors").architecture.value == "ltx_2b"
    assert {"transformer.proj_in", "transformer.time_embed.linear"} <= stems(made)
    comes_back(tmp_path / "a.safetensors", "comfy", tmp_path, ("diffusers", "peft", "kohya"))


def test_auraflow(tmp_path: Path) -> None:
    """Comfy-Org/ComfyUI `comfy/utils.py` (`auraflow_to_diffusers`), the halves of the last modulation turned round."""
    path = write(tmp_path / "a.safetensors", pairs(AURAFLOW.diffusers, "transformer."))
    ao.convert(path, "comfy", tmp_path / "b.safetensors")
    made, before = load_file(tmp_path / "b.safetensors"), load_file(path)
    assert {key.removesuffix(".alpha").partition(".lora_")[0] for key in made} == {
        f"diffusion_model.{name}" for name in AURAFLOW.comfys
    }
    for own, comfys in zip(AURAFLOW.diffusers, AURAFLOW.comfys, strict=True):
        rows = before[f"transformer.{own}.lora_B.weight"]
        rows = torch.cat(rows.chunk(2)[::-1]) if own == "norm_out.linear" else rows
        assert torch.equal(made[f"diffusion_model.{comfys}.lora_B.weight"], rows)


def test_ideograms_projections_are_split_in_thirds(tmp_path: Path) -> None:
    made = converted(IDEOGRAM.authors, tmp_path)
    whole = comfy(IDEOGRAM.authors)["diffusion_model.layers.0.attention.qkv.lora_B.weight"]
    for part, rows in zip("qkv", whole.split(4608), strict=True):
        assert torch.equal(made[f"transformer.layers.0.attention.to_{part}.lora_B.weight"], rows)
    assert "transformer.layers.0.attention.to_out.0.lora_A.weight" in made


def test_luminas_projections_are_split_at_their_rows(tmp_path: Path) -> None:
    """Queries are three times as wide as keys and values."""
    made = converted(LUMINA.authors, tmp_path)
    whole = comfy(LUMINA.authors)["diffusion_model.layers.25.attention.qkv.lora_B.weight"]
    stem = "transformer.layers.25.attn.to_"
    for part, (start, stop) in {"q": (0, 2304), "k": (2304, 3072), "v": (3072, 3840)}.items():
        assert torch.equal(made[f"{stem}{part}.lora_B.weight"], whole[start:stop])
    assert "transformer.noise_refiner.0.norm1.linear.lora_A.weight" in made
    assert "transformer.norm_out.linear_1.lora_A.weight" in made
    assert "transformer.context_refiner.1.feed_forward.linear_2.lora_A.weight" in made
