"""Files that lost what belonged to them: the message says what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import adapterops as ao
from adapterops import errors


def test_a_config_beside_a_file_of_another_name_is_spoken_of(tmp_path: Path) -> None:
    pair = {"x.q_proj.lora_A.weight": torch.randn(2, 4), "x.q_proj.lora_B.weight": torch.randn(4, 2)}
    save_file({f"base_model.model.{key}": value for key, value in pair.items()}, tmp_path / "my.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    with pytest.raises(
        errors.UnknownFact, match=r"is of an adapter_model\.safetensors: if it is theirs, call the file so"
    ):
        ao.convert(tmp_path / "my.safetensors", "peft", tmp_path / "out")
    (tmp_path / "my.safetensors").rename(tmp_path / "adapter_model.safetensors")
    ao.convert(tmp_path, "peft", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 8


def test_alphas_without_factors(tmp_path: Path) -> None:
    """What a published adapter held whose trainer looked for parameters of each layer itself."""
    state = {
        f"layers.{i}.q_proj.{name}": torch.tensor(value)
        for i in range(4)
        for name, value in (("alpha", 16), ("p", 0.5))
    }
    save_file(state, tmp_path / "lora.safetensors")
    with pytest.raises(errors.NotAnAdapter, match=r"8 single numbers .* and no factor"):
        ao.load(tmp_path / "lora.safetensors")
