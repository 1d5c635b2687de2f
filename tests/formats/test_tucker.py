"""LoCon with a Tucker core, against the library that defines it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lycoris.modules.locon import LoConModule
from safetensors.torch import load_file, save_file

import adapterops as ao
from adapterops.errors import CannotRepresent
from adapterops.methods import METHODS

STEM = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.fixture
def module() -> LoConModule:
    torch.manual_seed(0)
    made = LoConModule("x", torch.nn.Conv2d(320, 320, 3, padding=1), lora_dim=4, alpha=2, use_tucker=True)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)
    return made


@pytest.fixture
def path(module: LoConModule, tmp_path: Path) -> Path:
    keys = {k: t.detach().contiguous() for k, t in module.state_dict().items() if k.startswith("lora_") or k == "alpha"}
    assert "lora_mid.weight" in keys
    save_file({f"{STEM}.{k}": t for k, t in keys.items()}, tmp_path / "k.safetensors")
    return tmp_path / "k.safetensors"


def test_the_delta_is_lycoris_own(module: LoConModule, path: Path) -> None:
    (update,) = ao.load(path)
    wanted, _ = module.get_diff_weight(multiplier=1.0)
    torch.testing.assert_close(
        METHODS["lora"].delta(update), wanted.detach().reshape(320, 320, 3, 3), rtol=1e-4, atol=1e-6
    )


def test_what_cannot_hold_a_core_says_so(path: Path, tmp_path: Path) -> None:
    for target in ("peft", "diffusers"):
        with pytest.raises(CannotRepresent, match="mid"):
            ao.convert(path, target, tmp_path / "out")
    same = ao.convert(path, "kohya", tmp_path / "same.safetensors")
    assert load_file(same.path).keys() == load_file(path).keys()
