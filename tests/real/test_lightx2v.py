"""Whole differences beside factors, as ModelTC/LightX2V distils Wan: read whole, and told of where a reader has no place."""

from __future__ import annotations

from pathlib import Path

import pytest
from checks import comes_back, same, sound
from safetensors.torch import load_file
from trainers import DOWN_UP, Tensors, comfy, pairs, some, write
from video_bases import WAN_1_3B, WAN_14B_I2V

import adapterops as ao
from adapterops.errors import CannotRepresent


def distilled() -> Tensors:
    """ModelTC/LightX2V `tools/convert/lora_extractor.py`, `lightx2v/utils/lora_loader.py`: factors beside whole differences."""
    tensors = pairs(WAN_14B_I2V.authors, "diffusion_model.", DOWN_UP)
    tensors |= {f"diffusion_model.{name}.diff_b": some(rows) for name, (rows, _) in WAN_14B_I2V.authors.items()}
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
    usual = pairs(WAN_1_3B.authors, "diffusion_model.") | {"diffusion_model.blocks.0.modulation.diff": some(1, 6, 1536)}
    path = write(tmp_path / "d.safetensors", usual)
    done = ao.convert(path, "comfy-down", tmp_path / "e.safetensors")
    assert not any("diff_m" in note for note in done.notes)
    assert "diffusion_model.blocks.0.modulation.diff" in load_file(tmp_path / "e.safetensors")


def test_a_modulation_of_another_size_is_refused(tmp_path: Path) -> None:
    tensors = comfy(WAN_1_3B.authors) | {"diffusion_model.blocks.0.diff_m": some(1, 6, 1535)}
    with pytest.raises(ao.AdapterOpsError, match="diff_m"):
        ao.load(write(tmp_path / "a.safetensors", tensors))


def test_differences_are_not_diffusers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", distilled())
    with pytest.raises(CannotRepresent, match="has no place for it"):
        ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    done = ao.convert(path, "diffusers", tmp_path / "b.safetensors", allow_drop=True)
    modules = WAN_14B_I2V.authors
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
