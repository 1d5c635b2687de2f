"""Every published file: converted with proof and no key lost, or refused for the right reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpus_files import files, fill, skeletons
from raw import load_tensors

import adapterops as ao

REFUSED = {
    "cloneofsimo-": "cloneofsimo's spelling",
    "timohavdk-sd-lora/new": "botched Kohya name",
    "sam-lora/": "Sam_LoRA's spelling",
    "mlx-wyek1n/": "MLX's spelling",
    "mlx-npz": "numpy archive (older MLX adapters)",
    "mlx-dpo": "MLX's spelling",
    "bloomz-560m-prompt": "peft_type is PROMPT_TUNING",
    "granite-3b-broken": "not a safetensors file",
    "bert-lora-xiaoshutong": "loralib's spelling",
    "not-an-adapter-textual-inversion": "is an embedding",
    "not-an-adapter-invokeai-embedding": "is an embedding",
    "not-an-adapter-optimizer": "optimizer state",
    "convnext-mountain-tommyroar/classifier": "model's own weights",
    "tfew-t03b-ia3": "(IA)³",
    "lycoris-lokr": "is LoKr",
    "bloom-sentiment-tgis-decoder": "bare Tensor",
    "peft-regression-0.6.1-ia3_mlp/adapter": "peft_type is IA3",
    "peft-regression-0.6.1-ia3_no_ff_mlp/adapter": "peft_type is IA3",
    "peft-regression-0.6.1-ia3_opt": "peft_type is IA3",
    "finegates": "peft_type is FINEGATES",
    "softprompt-json": "JSON",
    "output.pt": "bare Tensor",
    "invokeai-anima_lora_kohya": "Anima",
    "invokeai-anima_lora_lokr": "Comfy's generic spelling",
    "invokeai-anima_lora_peft": "Comfy's generic spelling",
    "invokeai-flux_control": "Flux.1's own module names",
    "invokeai-flux_lokr_bfl": "Comfy's generic spelling",
    "invokeai-flux_lora_aitoolkit": "Comfy's generic spelling",
    "invokeai-flux_lora_diffusers_base_model": "PEFT stores",
    "invokeai-flux_lora_kohya": "Flux.1 adapter in Kohya's spelling",
    "invokeai-qwen_image_lora_diffusers": "without a component",
    "invokeai-qwen_image_lora_kohya": "LoKr",
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
    written = sum(len(load_tensors(f)) for f in output.glob("**/adapter_model.safetensors"))
    assert written + len(result.folded) == len(load_tensors(path)), "a key is neither written nor listed as folded"


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
