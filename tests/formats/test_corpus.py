"""Every published file: converted with proof and no key lost, or refused for the right reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from corpus_files import files, fill, skeletons
from raw import load_tensors

import adapterops as ao

REFUSED = {
    "cloneofsimo-disney": "no place for it (bundled textual inversions",
    "timohavdk-sd-lora/new": "the nearest known: 'down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k",
    "mlx-npz": "--set scale=X",
    "granite-3b-broken": "not a safetensors file",
    "bert-lora-xiaoshutong": "loralib stores no alpha",
    "not-an-adapter-textual-inversion": "is an embedding",
    "not-an-adapter-invokeai-embedding": "is an embedding",
    "not-an-adapter-optimizer": "optimizer state",
    "convnext-mountain-tommyroar/classifier": "model's own weights",
    "lycoris-lokr": "write it as --to kohya",
    "bloom-sentiment-tgis-decoder": "bare Tensor",
    "finegates": "peft_type is FINEGATES",
    "softprompt-json": "holds a pickle as text",
    "output.pt": "bare Tensor",
    "invokeai-anima_lora_lokr": "fits none of the known base models",  # made up
    "invokeai-anima_lora": "cannot act on",  # made up: what comes from the text has 1024 inputs, not 2048
    "invokeai-flux_lokr_bfl": "fits none of the known base models",  # made up: 32·32 rows are no Flux.1
    "invokeai-flux_lora_diffusers_base_model": "PEFT stores",
    "invokeai-qwen_image_lora_kohya": "fits none of the known base models",  # made up, too
}
"""What the message of a refused file must say, by part of its name."""


def judge(name: str, path: Path, output: Path) -> None:
    """Convert a file, or insist that it is refused as the table says."""
    reason = next((words for part, words in REFUSED.items() if part in name), None)
    if reason is not None:
        with pytest.raises(ao.AdapterOpsError) as caught:
            ao.convert(path, "peft", output)
        assert reason in str(caught.value), str(caught.value)
        assert path.name in str(caught.value) or path.parent.name in str(caught.value)
        assert not output.exists()
        return
    result = ao.convert(path, "peft", output)
    assert result.proof is not None
    assert result.proof.exact
    assert not result.dropped
    before = load_tensors(path)
    written = sum(len(load_tensors(f)) for f in output.glob("**/adapter_model.safetensors"))
    if "sam-lora/" not in name and not any("are split into their parts" in note for note in result.notes):
        assert written + len(result.folded) == len(before), "a key is neither written nor listed as folded"
        return
    # Nothing was lost when projections were split, or queries and values joined, or it could not come back.
    back = load_tensors(Path(ao.convert(output, result.source_dialect, output / "back.safetensors").path))
    assert back.keys() == before.keys()
    assert all(back[key].dtype == tensor.dtype and torch.equal(back[key], tensor) for key, tensor in before.items())


def test_every_file(corpus: Path, tmp_path: Path, subtests: pytest.Subtests) -> None:
    found = files(corpus)
    assert len(found) > 50
    for number, (name, path) in enumerate(found):
        with subtests.test(name):
            judge(name, path, tmp_path / str(number))


def test_every_skeleton(corpus: Path, tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name, path in skeletons(corpus):
        with subtests.test(name):
            fill(path, tmp_path / f"{name}.safetensors")
            judge(name, tmp_path / f"{name}.safetensors", tmp_path / name)
            (tmp_path / f"{name}.safetensors").unlink()
