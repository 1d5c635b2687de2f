"""Pipelines' files with what peft, torch.compile and distributed training put around a model left in the keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterops as ao

UNET = {f"down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_{p}": 640 for p in "qk"}
ENCODER = {"text_model.encoder.layers.0.self_attn.q_proj": 768, "text_model.encoder.layers.11.self_attn.v_proj": 768}


def pairs(prefix: str, modules: dict[str, int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(len(modules))
    out = {}
    for name, size in modules.items():
        out[f"{prefix}{name}.lora_A.weight"], out[f"{prefix}{name}.lora_B.weight"] = (
            torch.randn(4, size),
            torch.randn(size, 4),
        )
    return out


@pytest.mark.parametrize("wrapper", ["base_model.model.", "_orig_mod.", "module.", "_orig_mod.base_model.model."])
@pytest.mark.parametrize("encoder", [False, True])
def test_the_modules_are_those_of_the_pipeline(wrapper: str, encoder: bool, tmp_path: Path) -> None:
    """diffusers' examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py saves a PEFT model's state dict so."""

    def both(around: str) -> dict[str, torch.Tensor]:
        return pairs(f"unet.{around}", UNET) | (pairs(f"text_encoder.{around}", ENCODER) if encoder else {})

    save_file(both(wrapper), tmp_path / "a.safetensors")
    adapter = ao.load(tmp_path / "a.safetensors")
    assert adapter.architecture.value == "sdxl"
    assert any("are read as of" in note for note in adapter.provenance.notes)
    for target in ("diffusers", "kohya"):
        save_file(both(""), tmp_path / "plain.safetensors")
        got = ao.convert(tmp_path / "a.safetensors", target, tmp_path / f"{target}.safetensors").path
        want = ao.convert(tmp_path / "plain.safetensors", target, tmp_path / f"{target}-plain.safetensors").path
        one, other = load_file(got), load_file(want)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert load_file(tmp_path / "diffusers.safetensors").keys() == both("").keys()


def test_names_that_are_nobodys_wrapper_stay(tmp_path: Path) -> None:
    """One module inside a `module` beside others that are not."""
    save_file(pairs("transformer.", {"module.proj": 16, "norm.proj": 16}), tmp_path / "a.safetensors")
    assert {u.module for u in ao.load(tmp_path / "a.safetensors")} == {"module.proj", "norm.proj"}
