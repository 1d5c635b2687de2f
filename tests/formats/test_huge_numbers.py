"""Whole numbers that no float holds, where files say a scale: JSON, YAML and pickles can have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterops as ao

HUGE = 10**400
FIXTURES = Path(__file__).parents[2] / "fixtures"


def peft(folder: Path) -> Path:
    shutil.copytree(FIXTURES / "peft-llama", folder / "a")
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    (folder / "a" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": HUGE}))
    return folder / "a"


def diffusers(folder: Path) -> Path:
    tensors = load_file(FIXTURES / "diffusers-sd15.safetensors")
    said = json.dumps({"unet.r": 4, "unet.lora_alpha": HUGE})
    save_file(tensors, folder / "a.safetensors", {"lora_adapter_metadata": said})
    return folder / "a.safetensors"


def genmo(folder: Path) -> Path:
    stem = "blocks.0.attn.proj_x"
    tensors = {f"{stem}.lora_A": torch.ones(4, 3072), f"{stem}.lora_B": torch.ones(3072, 4)}
    save_file(tensors, folder / "a.safetensors", {"kwargs": json.dumps({"out_proj_lora_alpha": HUGE})})
    return folder / "a.safetensors"


def clip_lora(folder: Path) -> Path:
    pair = {"w_lora_A": torch.ones(2, 8), "w_lora_B": torch.ones(8, 2)}
    metadata = {"alpha": HUGE, "encoder": "text", "position": "top1"}
    torch.save({"weights": {"layer_0": {"q_proj": pair}}, "metadata": metadata}, folder / "a.pt")
    return folder / "a.pt"


def adapterhub(folder: Path) -> Path:
    shutil.copytree(next((FIXTURES / "adapterhub").glob("*lora*")), folder / "a")
    config = json.loads((folder / "a" / "adapter_config.json").read_text())
    (folder / "a" / "adapter_config.json").write_text(
        json.dumps({**config, "config": {**config["config"], "alpha": HUGE}})
    )
    return folder / "a"


@pytest.mark.parametrize("made", [peft, diffusers, genmo, clip_lora, adapterhub], ids=lambda made: made.__name__)
def test_an_alpha_that_no_float_holds(made: object, tmp_path: Path) -> None:
    assert callable(made)
    with pytest.raises(ao.AdapterOpsError, match=r"alpha.* number"):
        ao.load(made(tmp_path))


def test_litgpts_settings(tmp_path: Path) -> None:
    source = next((FIXTURES / "litgpt").iterdir())
    shutil.copytree(source, tmp_path / "a")
    (tmp_path / "a" / "hyperparameters.yaml").write_text(f"lora_alpha: {HUGE}\n")
    (weights,) = (tmp_path / "a").glob("lit_model*")
    torch.save({"model": {"lm_head.lora_A": torch.ones(2, 8), "lm_head.lora_B": torch.ones(9, 2)}}, weights)
    (update,) = ao.load(weights)
    assert update.alpha.value is None


def test_finetrainers_entry(tmp_path: Path) -> None:
    tensors = {
        f"transformer.proj_out.lora_{x}.weight": torch.ones(*size) for x, size in (("A", (4, 3072)), ("B", (64, 4)))
    }
    save_file(tensors, tmp_path / "a.safetensors", {"lora_config": json.dumps({"lora_alpha": HUGE})})
    assert not any("finetrainers" in note for note in ao.inspect(tmp_path / "a.safetensors").notes)
