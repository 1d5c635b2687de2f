"""MLX-LM's config: what it says of the base model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from loader_files import mlx_folder
from sound import codes, found


def test_a_local_base_is_found_once_a_folder(tmp_path: Path) -> None:
    weights = mlx_folder(tmp_path, model="/Users/ann/models/Qwen2.5-0.5B-Instruct")
    shutil.copy(weights, weights.with_name("0000100_adapters.safetensors"))
    (finding,) = [f for f in found(weights.parent) if f.code == "C214"]
    assert (finding.file, finding.field) == (str(weights.with_name("adapter_config.json")), "model")
    assert '"model": "owner/name"' in finding.remedy


@pytest.mark.parametrize("name", ["mlx-community/Qwen2.5-0.5B-Instruct-4bit", "Qwen/Qwen2.5-0.5B", None, 3])
def test_a_name_on_the_hub_is_sound(tmp_path: Path, name: object) -> None:
    assert codes(mlx_folder(tmp_path, model=name)) == []


@pytest.mark.parametrize("name", ["./models/qwen", "~/models/qwen", "C:\\models\\qwen", "C:/models/qwen"])
def test_other_ways_to_name_a_path(tmp_path: Path, name: str) -> None:
    assert codes(mlx_folder(tmp_path, model=name)) == ["C214"]
