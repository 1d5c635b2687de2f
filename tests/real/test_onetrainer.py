"""What OneTrainer of 2026 saves: embeddings bundled into each of its formats, and its ORIGINAL output.

Sources: Nerogar/OneTrainer `modules/modelSaver/mixin/LoRASaverMixin.py` (`_save_diffusers`, `_save_comfy`, `_save_original`),
`modules/modelSaver/flux/FluxLoRASaver.py` (`_get_state_dict`), `modules/util/convert_lora_util.py`,
`modules/model/FluxModel.py` (`diffusers_to_original`, `fusion_groups`).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checks import same, sound
from safetensors.torch import load_file
from trainers import AB, FLUX, QWEN, Tensors, clip, lokr, pairs, some, write

import adapterops as ao
from adapterops.errors import CannotRepresent

AUTHORS = {
    "double_blocks.0.img_attn.qkv": (9216, 3072),
    "double_blocks.18.img_mlp.0": (12288, 3072),
    "single_blocks.37.linear2": (3072, 15360),
}
"""Modules of Flux.1 as its authors name and fuse them."""
BUNDLE = {
    "bundle_emb.tok.clip_l": some(2, 768),
    "bundle_emb.tok.t5": some(2, 4096),
    "bundle_emb.tok.t5_out": some(2, 4096),
}

WITH_BUNDLE: dict[str, Tensors] = {
    "diffusers-bundled": pairs(FLUX, "transformer.") | pairs(clip("text_encoder.")) | BUNDLE,
    "diffusers-lycoris": lokr(FLUX, "transformer.", 16, 4, 2.0) | BUNDLE,
    "comfy": pairs(AUTHORS, "diffusion_model.", AB, 1.0)
    | pairs(clip("text_encoders.clip_l.transformer."), "", AB, 1.0)
    | BUNDLE,
}


@pytest.mark.parametrize("name", WITH_BUNDLE)
def test_bundled_embeddings(name: str, tmp_path: Path) -> None:
    """They travel with the adapter, to what has a place for them, and back."""
    tensors = WITH_BUNDLE[name]
    path = write(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (name, "flux")
    sound(path)
    ao.save(ao.load(path), tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), tensors)
    ao.convert(path, "kohya", tmp_path / "k.safetensors")
    kohya = load_file(tmp_path / "k.safetensors")
    same({key: t for key, t in kohya.items() if key in BUNDLE}, BUNDLE)
    ao.convert(tmp_path / "k.safetensors", name, tmp_path / "c.safetensors")
    back = load_file(tmp_path / "c.safetensors")
    assert set(back) - {key for key in back if key.endswith(".alpha")} == {
        k for k in tensors if not k.endswith(".alpha")
    }


def test_a_bundle_where_there_is_no_place_for_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", WITH_BUNDLE["diffusers-bundled"])
    for target in ("peft", "diffusers"):
        with pytest.raises(ao.errors.CannotRepresent, match=r"embeddings: tok: .*--allow-drop"):
            ao.convert(path, target, tmp_path / target)
    report = ao.validate(path, ignore=["D601"], targets=["diffusers"])
    assert [f.code for f in report] == ["L527"]


def test_a_bundle_alone_stays_kohyas(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", BUNDLE)
    assert ao.inspect(path).dialect == "kohya"


def test_original(tmp_path: Path) -> None:
    """The authors' names without a prefix, and alpha tensors, which Black Forest Labs' own files have not."""
    tensors = pairs(AUTHORS, "", AB, 1.0)
    tensors["double_blocks.18.img_mlp.0.dora_scale"] = some(1, 3072).abs() + 1
    path = write(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value, found.modules) == ("onetrainer-original", "flux", len(AUTHORS))
    assert found.components[0].scales == {0.25: len(AUTHORS)}
    sound(path)
    # ComfyUI `comfy/lora.py` (`model_lora_keys_unet`) has no bare names of Flux.1's authors.
    assert [f.code for f in ao.validate(path, ignore=["D601"], targets=["comfy"])] == ["L536"]
    ao.save(ao.load(path), tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), tensors)
    ao.convert(path, "comfy", tmp_path / "c.safetensors")
    same(load_file(tmp_path / "c.safetensors"), {f"diffusion_model.{key}": t for key, t in tensors.items()})


def test_original_of_a_base_whose_names_are_diffusers_own(tmp_path: Path) -> None:
    tensors = pairs(QWEN, "", AB, 1.0)
    path = write(tmp_path / "a.safetensors", tensors)
    assert ao.inspect(path).dialect == "onetrainer-original"
    ao.convert(path, "diffusers-alpha", tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), {f"transformer.{key}": t for key, t in tensors.items()})


@pytest.mark.parametrize("scaled", [False, True])
def test_original_of_rotations(scaled: bool, tmp_path: Path) -> None:
    """OFT has no alpha, by which the spelling is told from others, and the marker of Scaled OFT is nothing of peft's."""
    tensors = {f"{name}.oft_R.weight": 0.01 * some(shape[1] // 32, 496) for name, shape in AUTHORS.items()}
    if scaled:
        tensors |= {f"{name}.oft_R.scaled_oft": torch.tensor(True) for name in AUTHORS}
    path = write(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value, found.modules) == ("onetrainer-original", "flux", len(AUTHORS))
    ao.save(ao.load(path), tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), tensors)
    ao.convert(path, "comfy", tmp_path / "c.safetensors")
    same(load_file(tmp_path / "c.safetensors"), {f"diffusion_model.{key}": t for key, t in tensors.items()})


def test_bare_names_without_alpha_are_none_of_onetrainers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(AUTHORS, "", AB))
    assert ao.inspect(path).dialect == "bfl"


@pytest.mark.parametrize("target", ["comfy", "diffusers-bundled"])
def test_embeddings_alone_are_kohyas(target: str, tmp_path: Path) -> None:
    alone = write(tmp_path / "a.safetensors", {"bundle_emb.ohwx.string_to_param.*": torch.ones(2, 8)})
    with pytest.raises(CannotRepresent, match=r"ohwx.*--to kohya"):
        ao.convert(alone, target, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()
