"""Adapters of Flux.2 (dev, klein 4B and 9B) and of Chroma as their trainers write them, and as their readers take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checks import comes_back, ours_and_theirs, same, sound
from image_bases import CHROMA, FLUX_AND_CHROMA, KLEIN_4B, KLEINS_QKV
from safetensors.torch import load_file
from trainers import DOWN_UP, FLUX, Modules, ai_toolkit, comfy, lokr, musubi, pairs, write

import adapterops as ao
from adapterops.errors import CannotRepresent, UnknownModule


def test_fused_projections_are_split_and_joined(tmp_path: Path) -> None:
    """The queries, keys and values of the double blocks are three modules of diffusers; those of the single blocks are one."""
    path = write(tmp_path / "a.safetensors", musubi({**KLEINS_QKV, "single_blocks.0.linear1": (27648, 3072)}))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", fold_alpha=True)
    keys = {key.removeprefix("transformer.").partition(".lora_")[0] for key in load_file(tmp_path / "b.safetensors")}
    attention = "transformer_blocks.1.attn."
    assert keys == {
        *(f"{attention}to_{p}" for p in "qkv"),
        *(f"{attention}add_{p}_proj" for p in "qkv"),
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    }
    comes_back(path, "kohya", tmp_path, ("diffusers-alpha", "diffusers-lycoris", "lycoris", "comfy", "peft"))


def test_lokr_of_a_fused_projection_is_not_split(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.safetensors", lokr({**KLEINS_QKV, **KLEIN_4B.authors}, "diffusion_model.", 16, None, 1.0)
    )
    comes_back(path, "comfy", tmp_path, ("kohya",))
    with pytest.raises(CannotRepresent, match=r"to_qkv.*cannot be cut.*--to comfy"):
        ao.convert(path, "diffusers-lycoris", tmp_path / "b.safetensors")


def test_lokr_that_diffusers_reads_is_not_reported(tmp_path: Path) -> None:
    """`Flux2LoraLoaderMixin` has a converter for each of these spellings; that of Flux.1 has none."""
    path = write(tmp_path / "a.safetensors", lokr(KLEIN_4B.authors, "diffusion_model.", 16, None, 1.0))
    assert [
        f for f in ao.validate(path, targets=["diffusers"], ignore=["D601"]) if f.rule.name == "diffusers-lokr"
    ] == []
    path = write(tmp_path / "b.safetensors", lokr(FLUX, "transformer.", 16, None, 1.0))
    assert [f.rule.name for f in ao.validate(path, targets=["diffusers"]) if f.rule.code == "L523"] == [
        "diffusers-lokr"
    ]


def test_the_last_modulation_is_swapped(tmp_path: Path) -> None:
    """The authors' rows are shift and scale, diffusers' are scale and shift: its conversion of checkpoints turns them
    (`swap_scale_shift` in `loaders/single_file_utils.py`), its conversion of LoRAs, 0.42.1, forgets to."""
    last: Modules = {**KLEIN_4B.authors, "final_layer.adaLN_modulation.1": (6144, 3072)}
    path = write(tmp_path / "a.safetensors", comfy(last))
    ours, theirs = ours_and_theirs("Flux2LoraLoaderMixin", path, tmp_path)
    one, other = ours["transformer.norm_out.linear"], theirs["transformer.norm_out.linear"]
    assert torch.allclose(one, torch.cat([other[3072:], other[:3072]]), atol=0.1)
    assert not torch.allclose(one, other, atol=0.1)
    comes_back(path, "comfy", tmp_path, ("diffusers", "kohya", "peft", "lycoris"))


AUTHORS = {
    "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
    "transformer_blocks.18.ff.net.0.proj": "double_blocks.18.img_mlp.0",
    "single_transformer_blocks.37.proj_out": "single_blocks.37.linear2",
}


@pytest.mark.parametrize("writer", [comfy, musubi])
def test_flux_1_stays_flux_1(writer: Any, tmp_path: Path) -> None:
    """klein 4B has the width of Flux.1 and its names: the MLPs, the single blocks and the number of blocks tell them apart."""
    path = write(tmp_path / "a.safetensors", writer({AUTHORS[name]: shape for name, shape in FLUX.items()}))
    assert ao.inspect(path).architecture.value == "flux"
    path = write(tmp_path / "b.safetensors", writer({"single_blocks.0.linear1": (21504, 3072)}))
    assert ao.inspect(path).architecture.value == "flux"
    path = write(tmp_path / "c.safetensors", writer({"double_blocks.0.img_mlp.0": (18432, 3072)}))
    assert ao.inspect(path).architecture.value == "flux2_klein_4b"


def test_what_fits_both_is_the_older_ones_with_a_note(tmp_path: Path) -> None:
    """A few attention modules alone are the same in both; so is what becomes of them, and `--arch` decides."""
    path = write(tmp_path / "a.safetensors", comfy({"double_blocks.0.img_attn.proj": (3072, 3072), **KLEINS_QKV}))
    found = ao.inspect(path)
    assert found.architecture.value == "flux"
    assert any("flux2_klein_4b" in note and "alike" in note for note in found.notes)
    asked = ao.inspect(path, arch="flux2_klein_4b")
    assert (asked.architecture.value, asked.notes) == ("flux2_klein_4b", ())
    for arch in ("flux", "flux2_klein_4b"):
        ao.convert(path, "diffusers", tmp_path / f"{arch}.safetensors", arch=arch)
    same(*(load_file(tmp_path / f"{arch}.safetensors") for arch in ("flux", "flux2_klein_4b")))


@pytest.mark.parametrize("dialect", ["xlabs", "bfl"])
def test_what_only_flux_1_has_is_not_written_for_flux_2(dialect: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy({"double_blocks.0.img_attn.proj": (6144, 6144)}))
    with pytest.raises(CannotRepresent):
        ao.convert(path, dialect, tmp_path / "b.safetensors")


MODULATED: Modules = {**FLUX_AND_CHROMA, "double_blocks.3.img_mod.lin": (18432, 3072)}


def test_ai_toolkits_chroma_is_told_by_its_modules(tmp_path: Path) -> None:
    """`diffusion_models/chroma/chroma_model.py`: every linear layer, those of the network that makes modulations, too."""
    path = ai_toolkit(tmp_path / "a.safetensors", comfy(CHROMA.authors))
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value, found.notes) == ("comfy", "chroma", ())
    sound(path)
    comes_back(path, "comfy", tmp_path, ("kohya", "kohya-diffusers", "lycoris", "diffusers", "comfy-diffusers", "peft"))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    layers = "transformer.distilled_guidance_layer.layers.4."
    keys = {key for key in load_file(tmp_path / "b.safetensors") if key.startswith(layers)}
    assert keys == {f"{layers}linear_{n}.lora_{f}.weight" for n in (1, 2) for f in "AB"}


@pytest.mark.parametrize(
    ("header", "base"),
    [
        # kohya-ss/sd-scripts `flux_train_network.py`, `library/sai_model_spec.py`, for either model type.
        ({"ss_base_model_version": "chroma", "modelspec.architecture": "chroma/lora"}, "chroma"),
        ({"ss_base_model_version": "flux1", "modelspec.architecture": "flux-1-dev/lora"}, "flux"),
        # Nerogar/OneTrainer `resources/sd_model_spec`.
        ({"modelspec.architecture": "Chroma1/lora"}, "chroma"),
        ({"modelspec.architecture": "Flux.1-dev/lora"}, "flux"),
        # ostris/ai-toolkit `toolkit/stable_diffusion_model.py` (`get_base_model_version`).
        ({"ss_base_model_version": "flux.1"}, "flux"),
    ],
)
def test_where_modules_fit_both_the_header_decides(header: dict[str, str], base: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", musubi(FLUX_AND_CHROMA), **header)
    found = ao.inspect(path)
    assert (found.architecture.value, str(found.architecture.certainty), found.notes) == (base, "read", ())
    sound(path)
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", fold_alpha=True)
    assert ao.inspect(tmp_path / "b.safetensors").architecture.value == base


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"ss_base_model_version": "sdxl_base_v1-0"},
        {"modelspec.architecture": "chroma_radiance"},
        {"ss_base_model_version": "flux1", "modelspec.architecture": "chroma/lora"},
    ],
)
def test_without_a_telling_header_it_is_the_older_ones_with_a_note(header: dict[str, str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", musubi(FLUX_AND_CHROMA), **header)
    found = ao.inspect(path)
    assert (found.architecture.value, str(found.architecture.certainty)) == ("flux", "assumed")
    assert any("flux and chroma alike" in note for note in found.notes)
    asked = ao.inspect(path, arch="chroma")
    assert (asked.architecture.value, asked.notes) == ("chroma", ())
    # Nothing depends on it: what becomes of the file is the same.
    for arch in ("flux", "chroma"):
        ao.convert(path, "diffusers", tmp_path / f"{arch}.safetensors", arch=arch, fold_alpha=True)
    same(*(load_file(tmp_path / f"{arch}.safetensors") for arch in ("flux", "chroma")))


def test_modules_go_before_the_header(tmp_path: Path) -> None:
    """Chroma has no modulation in its blocks; a header that says so is another's, and `validate` tells."""
    path = write(tmp_path / "a.safetensors", musubi(MODULATED), **{"modelspec.architecture": "chroma/lora"})
    found = ao.inspect(path)
    assert (found.architecture.value, str(found.architecture.certainty)) == ("flux", "derived")
    assert {f.rule.name for f in ao.validate(path, ignore=["D601"])} == {"other-base"}


def test_onetrainers_chroma_comes_back(tmp_path: Path) -> None:
    """`modelSaver/chroma/ChromaLoRASaver.py` (`_convert_legacy`), and what it bundles beside."""
    own: Modules = {
        "transformer_blocks.0.attn.to_q": (3072, 3072),
        "single_transformer_blocks.37.proj_mlp": (12288, 3072),
        "distilled_guidance_layer.layers.0.linear_1": (5120, 5120),
    }
    tensors = pairs(own, "lora_transformer_", DOWN_UP, 1.0, flat=True)
    path = write(tmp_path / "a.safetensors", tensors, **{"modelspec.architecture": "Chroma1/lora"})
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("onetrainer", "chroma")
    sound(path)
    comes_back(path, "onetrainer", tmp_path, ("kohya", "comfy", "diffusers-alpha", "lycoris", "diffusers", "peft"))


def test_diffusers_converts_chroma_as_we_do(tmp_path: Path) -> None:
    """ChromaPipeline is loaded by `FluxLoraLoaderMixin`."""
    path = write(tmp_path / "a.safetensors", musubi(FLUX_AND_CHROMA), ss_base_model_version="chroma")
    ours, theirs = ours_and_theirs("FluxLoraLoaderMixin", path, tmp_path)
    assert set(ours) == set(theirs)
    assert [n for n, delta in ours.items() if not torch.allclose(delta, theirs[n], rtol=0.05, atol=0.1)] == []


def test_chroma_radiance_is_not_taken_for_chroma(tmp_path: Path) -> None:
    """Its pixels go through blocks of their own (ai-toolkit `chroma/src/radiance.py`)."""
    radiance: Modules = {**CHROMA.authors, "nerf_blocks.0.param_generator": (49152, 3072)}
    path = write(tmp_path / "a.safetensors", comfy(radiance))
    with pytest.raises(UnknownModule, match=r"chroma has no module 'nerf_blocks"):
        ao.load(path)
