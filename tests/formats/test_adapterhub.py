"""AdapterHub's folders, held to what that library's own merging makes of the weights.

`fixtures/adapterhub/` is written by adapters 1.3.0 (scripts/trainer_fixtures.py); `change.safetensors` beside each adapter is
what `merge_adapter` added to each weight, or, for (IA)³, the weights before and after.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import adapterops as ao
from adapterops.errors import CannotRepresent, UnknownFact, UnreadableFile, UnsupportedFormat

FIXTURES = Path(__file__).parents[2] / "fixtures" / "adapterhub"
BASES = ("llama", "bert", "gpt2")


def deltas(folder: Path) -> dict[str, Tensor]:
    """ΔW of each module of a PEFT folder, by PEFT's formula."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    out = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = (config.get("rank_pattern") or {}).get(module, a.shape[0])
            alpha = next(
                (v for k, v in (config.get("alpha_pattern") or {}).items() if module.endswith(k)), config["lora_alpha"]
            )
            assert rank == a.shape[0]
            scale = alpha / a.shape[0]
            out[module] = scale * tensors[key.replace("lora_A", "lora_B")] @ a
    return out


@pytest.mark.parametrize("kind", ["lora", "kv", "early"])
@pytest.mark.parametrize("base", BASES)
def test_lora_adds_what_the_library_adds(base: str, kind: str, tmp_path: Path) -> None:
    folder = FIXTURES / f"{base}-{kind}"
    result = ao.convert(folder, "peft", tmp_path / "out")
    assert result.source_dialect == "adapterhub"
    wanted = load_file(folder / "change.safetensors")
    own = deltas(tmp_path / "out")
    assert {f"{module}.weight" for module in own} == set(wanted)
    for module, delta in own.items():
        change = wanted[f"{module}.weight"]
        # GPT-2's layers keep their weight as (in, out).
        torch.testing.assert_close(delta, change.T if base == "gpt2" else change, rtol=1e-4, atol=1e-5)
    early = [note for note in result.notes if "below 1.1" in note]
    assert len(early) == (kind == "early")


@pytest.mark.parametrize("base", BASES)
def test_ia3_multiplies_as_the_library_does(base: str, tmp_path: Path) -> None:
    folder = FIXTURES / f"{base}-ia3"
    ao.convert(folder, "peft", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "IA3"
    assert config["feedforward_modules"] == []
    wanted = load_file(folder / "change.safetensors")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    modules = {key.removeprefix("base_model.model.").removesuffix(".ia3_l"): t for key, t in tensors.items()}
    assert {f"after.{module}.weight" for module in modules} == {key for key in wanted if key.startswith("after.")}
    for module, vector in modules.items():
        before, after = (wanted[f"{when}.{module}.weight"] for when in ("before", "after"))
        made = before * vector.reshape(-1) if base == "gpt2" else before * vector.reshape(-1, 1)
        torch.testing.assert_close(made, after)


@pytest.mark.parametrize("kind", sorted(path.name for path in (FIXTURES / "others").iterdir()))
def test_what_is_no_change_of_weights_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFormat, match="AdapterHub"):
        ao.convert(FIXTURES / "others" / kind, "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_beside_the_adapter_is_told_of(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "llama-lora", tmp_path / "a")
    (tmp_path / "a" / "change.safetensors").unlink()
    torch.save({"lm_head.weight": torch.ones(20, 16)}, tmp_path / "a" / "pytorch_model_head.bin")
    result = ao.convert(tmp_path / "a", "peft", tmp_path / "out")
    assert any("pytorch_model_head.bin stands beside pytorch_adapter.bin" in note for note in result.notes)
    # … and no finding takes it for a broken adapter.
    assert {finding.code for finding in ao.validate(tmp_path / "a")} <= {"F011", "F049", "D601"}


def test_without_the_config_alpha_and_the_parts_are_asked_for(tmp_path: Path) -> None:
    for name in ("llama-lora", "gpt2-lora"):
        shutil.copy(FIXTURES / name / "pytorch_adapter.bin", tmp_path / f"{name}.bin")
    with pytest.raises(UnknownFact, match="alpha"):
        ao.convert(tmp_path / "llama-lora.bin", "peft", tmp_path / "out")
    result = ao.convert(tmp_path / "llama-lora.bin", "peft", tmp_path / "out", alpha=4.0)
    assert result.source_dialect == "adapterhub"
    with pytest.raises(UnknownFact, match="attn_matrices"):
        ao.convert(tmp_path / "gpt2-lora.bin", "peft", tmp_path / "other", alpha=4.0)


def test_an_alpha_that_is_no_number(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "llama-lora", tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["config"]["alpha"] = "much"
    file.write_text(json.dumps(config))
    with pytest.raises(UnreadableFile, match="alpha is 'much'"):
        ao.convert(tmp_path / "a", "peft", tmp_path / "out")


def test_it_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CannotRepresent, match="read and never written"):
        ao.convert(FIXTURES / "llama-lora", "adapterhub", tmp_path / "out")
