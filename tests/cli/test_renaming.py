"""`--rename`: keys of a broken script, repaired before they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcome import Outcome
from safetensors.torch import load_file, save_file

import adapterops as ao
from adapterops.errors import UsageError

STEM = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
RULES = (r"_lora_(down|up)\.weight$=.lora_\1.weight", "^lora_unet_unet_=lora_unet_")


@pytest.fixture
def botched(tmp_path: Path) -> Path:
    path = tmp_path / "botched.safetensors"
    tensors = {
        f"lora_unet_unet_{STEM}_lora_down.weight": torch.randn(4, 320),
        f"lora_unet_unet_{STEM}_lora_up.weight": torch.randn(320, 4),
    }
    save_file(tensors, path)
    return path


def test_repaired_keys_are_read(botched: Path, tmp_path: Path) -> None:
    result = ao.convert(botched, "kohya", tmp_path / "k.safetensors", rename=RULES)
    assert result.proof is not None
    assert result.proof.exact
    assert "2 keys are renamed as --rename says" in result.notes
    before, after = load_file(botched), load_file(result.path)
    assert after.keys() == {f"lora_unet_{STEM}.lora_down.weight", f"lora_unet_{STEM}.lora_up.weight"} | {
        key for key in after if key.endswith(".alpha")
    }
    for half in ("down", "up"):
        old, new = before[f"lora_unet_unet_{STEM}_lora_{half}.weight"], after[f"lora_unet_{STEM}.lora_{half}.weight"]
        assert torch.equal(old, new)


def test_unrepaired_the_nearest_name_is_told(botched: Path) -> None:
    with pytest.raises(ao.AdapterOpsError, match=f"nearest known: '{STEM}'.*--rename PATTERN=REPLACEMENT"):
        ao.load(botched)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (["nothing=x"], "no key of .* matches"),
        ([*RULES, "nothing=x"], "--rename nothing=x: no key"),
        (["no equals sign"], "is not PATTERN=REPLACEMENT"),
        (["=x"], "is not PATTERN=REPLACEMENT"),
        (["(=x"], "unterminated"),
        ([r"_lora_down=\2"], "invalid group reference"),
        ([".*=x"], "matches an empty text"),
        (["_lora_(down|up)="], "makes .* of both"),
    ],
)
def test_rules_that_cannot_be_meant(rules: list[str], words: str, botched: Path) -> None:
    with pytest.raises(UsageError, match=words):
        ao.load(botched, rename=rules)


def test_on_the_command_line(botched: Path, tmp_path: Path, command: Callable[..., Outcome]) -> None:
    options = [text for rule in RULES for text in ("--rename", rule)]
    outcome = command("convert", botched, "--to", "diffusers", "-o", tmp_path / "d.safetensors", *options)
    assert outcome.code == 0, outcome
    outcome = command("inspect", botched, "--rename", "(=x")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
