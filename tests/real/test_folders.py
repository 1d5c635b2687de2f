"""Folders as trainers leave them: what stands beside an adapter's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import DEFAULT, DOWN_UP, FLUX, QWEN, WAN, Tensors, pairs, some, write

import adapterops as ao

KOHYA = {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (640, 640)}


def diffusion_pipe(folder: Path, tensors: Tensors, **fields: Any) -> Path:
    """tdrussell/diffusion-pipe `models/qwen_image.py` (`save_adapter`): Comfy's keys in peft's file, beside peft's config."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q", "add_k_proj"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write(folder / "adapter_model.safetensors", tensors, format="pt")
    return folder


def codes(path: Path, **options: Any) -> list[str]:
    """The rules that `validate` has something to say by."""
    return [f.code for f in ao.validate(path, ignore=["D601"], **options)]


def test_diffusion_pipe(tmp_path: Path) -> None:
    """Comfy reads the weights and no config; peft, asked for, would find nothing of its own."""
    folder = diffusion_pipe(tmp_path / "a", pairs(QWEN, "diffusion_model."))
    assert ao.inspect(folder).dialect == "comfy"
    (finding,) = ao.validate(folder, ignore=["D601"])
    assert (finding.code, str(finding.severity)) == ("C220", "info")
    assert "C208" in codes(folder, targets=["peft"])
    assert "C208" not in codes(folder, targets=["comfy"])


@pytest.mark.parametrize("fields", [{"lora_alpha": 8}, {"use_rslora": True}])
def test_a_config_of_another_scale_than_its_readers_apply(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = diffusion_pipe(tmp_path / "a", pairs(QWEN, "diffusion_model."), **fields)
    (finding,) = ao.validate(folder, ignore=["D601"])
    assert (finding.code, finding.field) == ("C208", "lora_alpha")
    assert "--to comfy --alpha X" in finding.remedy
    folder = diffusion_pipe(tmp_path / "b", pairs(QWEN, "diffusion_model.", alpha=2.0), **fields)
    assert codes(folder) == ["C220"]  # the tensors say their scale


def test_kohyas_keys_beside_a_config(tmp_path: Path) -> None:
    folder = diffusion_pipe(tmp_path / "a", pairs(KOHYA, "lora_unet_", DOWN_UP, 4.0, flat=True))
    assert codes(folder) == ["C220"]


def test_keys_like_pefts_are_an_error_still(tmp_path: Path) -> None:
    """Without anything before the modules' names nobody but peft would be meant."""
    folder = diffusion_pipe(tmp_path / "a", pairs(FLUX, "", DOWN_UP, 4.0))
    assert ao.inspect(folder).dialect == "diffusers-down"
    assert codes(folder) == ["C208"]


STATE = ("optimizer.bin", "scheduler.bin", "training_args.bin", "rng_state_0.pth", "random_states_0.pkl", "scaler.pt")


def left_by_a_trainer(folder: Path, *more: str) -> Path:
    """What transformers' `trainer.py` and accelerate's `save_accelerator_state` leave."""
    for name in (*STATE, *more):
        torch.save({"state": torch.ones(2)}, folder / name)
    (folder / "trainer_state.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"])
@pytest.mark.parametrize("whole", [(), ("pytorch_model.bin",), ("pytorch_model.bin", "pytorch_model_1.bin")])
def test_a_checkpoint_of_diffusers_scripts(name: str, whole: tuple[str, ...], tmp_path: Path) -> None:
    """huggingface/diffusers `examples/text_to_image/train_text_to_image_lora.py`: accelerate saves beside the weights."""
    tensors = pairs(FLUX, "transformer.")
    if name.endswith(".bin"):
        torch.save(tensors, tmp_path / name)
    else:
        write(tmp_path / name, tensors)
    left_by_a_trainer(tmp_path, *whole)
    found = ao.inspect(tmp_path)
    assert (found.dialect, found.modules) == ("diffusers", len(FLUX))
    note, alike = found.notes
    assert "chroma alike" in alike
    left = [other for other in (*STATE, *whole) if not other.endswith(".pkl")]  # no weights are called so
    assert sorted(note.partition(": ")[0].split(", ")) == sorted(left)
    expected = {"F050"} | ({"F049"} if whole else set()) | ({"F011"} if name.endswith(".bin") else set())
    assert set(codes(tmp_path)) == expected
    ao.convert(tmp_path, "peft", tmp_path / "peft")


def test_a_whole_model_is_a_candidate_where_no_trainer_left_it(tmp_path: Path) -> None:
    write(tmp_path / "style.safetensors", pairs(FLUX, "transformer."))
    write(tmp_path / "model.safetensors", {"a.weight": some(2, 2)})
    with pytest.raises(ao.errors.NotAnAdapter, match=r"several weight files \(model.safetensors, style.safetensors\)"):
        ao.inspect(tmp_path)


def test_two_adapters_are_two_whatever_a_trainer_left(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors"):
        write(left_by_a_trainer(tmp_path) / name, pairs(FLUX, "transformer."))
    with pytest.raises(ao.errors.NotAnAdapter, match=r"several weight files \(one.safetensors, two.safetensors\)"):
        ao.inspect(tmp_path)


def test_a_trainers_state_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(
        ao.errors.NotAnAdapter, match=r"holds no weights \(optimizer.bin, .*: by the name what a trainer"
    ):
        ao.inspect(left_by_a_trainer(tmp_path))


@pytest.mark.parametrize("name", ["optimizer-prime.safetensors", "sampler_art.safetensors", "schedulers.safetensors"])
def test_an_adapter_that_is_called_almost_so(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, pairs(FLUX, "transformer."))
    assert ao.inspect(tmp_path).modules == len(FLUX)
    assert codes(tmp_path) == []


def test_diffsynths_keys_of_a_base_without_a_table(tmp_path: Path) -> None:
    """modelscope/DiffSynth-Studio `diffsynth/utils/lora/general.py`: scale 1 without an alpha; the message tells which X."""
    path = write(tmp_path / "a.safetensors", pairs({f"own_{name}": shape for name, shape in WAN.items()}, "", DEFAULT))
    with pytest.raises(ao.errors.UnknownFact, match=r"DiffSynth-Studio's, whose scale is 1: --alpha 4\)"):
        ao.convert(path, "peft", tmp_path / "peft")
    plain = {f"base_model.model.{key}": t for key, t in pairs(WAN, "", DEFAULT).items()}
    with pytest.raises(ao.errors.UnknownFact) as told:
        ao.convert(write(tmp_path / "b.safetensors", plain), "peft", tmp_path / "peft")
    assert "DiffSynth" not in str(told.value)
