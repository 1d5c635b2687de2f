"""Adapters of CogVideoX, CogView4, Mochi 1, Sana and PixArt as their trainers write them, and as their readers take them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from base_rows import Base
from checks import comes_back, deltas, same, sound
from image_bases import PIXART
from safetensors.torch import load_file
from trainers import Modules, pairs, some, write
from video_bases import COGVIDEOX_1_5_I2V, COGVIDEOX_2B, MOCHI

import adapterops as ao
from adapterops.adapter import Certainty


def read_as(path: Path, base: Base, dialect: str) -> None:
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, base.name)
    assert found.architecture.others == base.others
    sound(path)


@pytest.mark.parametrize("base", [COGVIDEOX_2B, COGVIDEOX_1_5_I2V, MOCHI, PIXART], ids=lambda base: base.name)
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


def test_diffusers_has_no_loader_of_pixarts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(PIXART.diffusers, "transformer."))
    assert {f.rule.code for f in ao.validate(path, targets=["diffusers"], select=["L5"])} == {"L509"}
    assert not list(ao.validate(path, targets=["comfy"], select=["L5"]))
    (told,) = ao.validate(path, targets=["diffusers"], load_test=True, select=["L59"])
    assert told.rule.code == "L593"
