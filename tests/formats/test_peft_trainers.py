"""PEFT folders with a trainer's own names: Tinker's, held to tinker-cookbook's own conversion, and wrappers that torch leaves.

`fixtures/tinker/` has the keys and shapes of tinker-cookbook's tests; `peft/wanted.safetensors` is what its `_convert_adapter`
makes of each (scripts/trainer_fixtures.py).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import adapterops as ao
from adapterops.errors import BrokenAdapter, UnsupportedFormat

FIXTURES = Path(__file__).parents[2] / "fixtures" / "tinker"
PREFIX = "base_model.model."
LORA: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip


def folder(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("name", ["dense", "experts", "gpt-oss", "nemotron"])
def test_tinker_s_names_become_what_its_cookbook_makes_of_them(name: str, tmp_path: Path) -> None:
    result = ao.convert(FIXTURES / name, "peft", tmp_path / "out")
    assert any("Tinker's" in note for note in result.notes)
    wanted = load_file(FIXTURES / name / "peft" / "wanted.safetensors")
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[key], wanted[key]) for key in wanted)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 8)


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "k_proj", "v_proj", "o_proj", "unembed_tokens"]])
def test_peft_computes_with_the_head(targets: Any, tmp_path: Path) -> None:
    """all-linear leaves the model's output out, so that it must not stay in the config."""
    tensors = load_file(FIXTURES / "dense" / "adapter_model.safetensors")
    said = {**LORA, "target_modules": targets} if targets else {"lora_alpha": 8, "r": 3}
    ao.convert(folder(tmp_path / "in", tensors, **said), "peft", tmp_path / "out", fields={"task_type": "CAUSAL_LM"})
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=20,
    )
    model = LlamaForCausalLM(config)
    head = model.lm_head.weight.detach().clone()
    merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()
    a, b = (tensors[f"{PREFIX}model.unembed_tokens.lora_{role}.weight"] for role in "AB")
    torch.testing.assert_close(merged.lm_head.weight.detach(), head + 8 / 3 * b @ a)


def test_stacks_that_do_not_belong_together(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "experts" / "adapter_model.safetensors")
    key = f"{PREFIX}model.layers.0.mlp.experts.w2.lora_A.weight"
    tensors |= {key: tensors[key][:2], key.replace("_A", "_B"): tensors[key.replace("_A", "_B")].repeat(3, 1, 1)}
    with pytest.raises(BrokenAdapter, match="no stack of 3 experts"):
        ao.convert(folder(tmp_path / "in", tensors, lora_alpha=8, r=3), "peft", tmp_path / "out")


def test_parts_of_a_projection_are_refused(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "dense" / "adapter_model.safetensors")
    tensors = {key.replace("self_attn.q_proj", "linear_attn.in_proj_q"): value for key, value in tensors.items()}
    with pytest.raises(UnsupportedFormat, match="build_lora_adapter"):
        ao.convert(folder(tmp_path / "in", tensors, lora_alpha=8, r=3), "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def plain() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"{PREFIX}model.layers.{layer}.self_attn.{part}.lora_{role}.weight": torch.randn(shape, generator=generator)
        for layer in range(2)
        for part in ("q_proj", "v_proj")
        for role, shape in (("A", (3, 8)), ("B", (8, 3)))
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PREFIX, f"_fsdp_wrapped_module.{PREFIX}"),
        (PREFIX, f"{PREFIX}_orig_mod."),
        (PREFIX, f"llm.{PREFIX}"),
        (".self_attn.", "._checkpoint_wrapped_module.self_attn."),
        (".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."),
        (".q_proj.", ".q_proj._orig_mod."),
    ],
)
def test_wrappers_are_no_part_of_a_name(old: str, new: str, tmp_path: Path) -> None:
    tensors = plain()
    source = folder(tmp_path / "in", {key.replace(old, new): value for key, value in tensors.items()}, **LORA)
    result = ao.convert(source, "peft", tmp_path / "out")
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[key], tensors[key]) for key in tensors)
    assert any("are read as of" in note for note in result.notes)


def test_two_models_in_one_file_keep_their_beginnings(tmp_path: Path) -> None:
    tensors = {f"{own}.{key}": value for own in ("llm", "tower") for key, value in plain().items()}
    ao.convert(folder(tmp_path / "in", tensors, **LORA), "peft", tmp_path / "out")
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(made) == len(tensors)


def test_what_is_as_peft_writes_it_is_told_nothing(tmp_path: Path) -> None:
    result = ao.convert(folder(tmp_path / "in", plain(), **LORA), "peft", tmp_path / "out")
    assert not [note for note in result.notes if "read as of" in note or "Tinker" in note]


def test_weights_beside_the_adapter_are_told_of(tmp_path: Path) -> None:
    """LLaVA's projector, a value head, a vision tower: trained as well, and in files of their own."""
    source = folder(tmp_path / "in", plain(), **LORA)
    torch.save({"model.mm_projector.0.weight": torch.ones(2, 2)}, source / "non_lora_trainables.bin")
    shutil.copy(source / "non_lora_trainables.bin", source / "optimizer.pt")
    result = ao.convert(source, "peft", tmp_path / "out")
    assert [note for note in result.notes if note.startswith("non_lora_trainables.bin stands beside")]
    assert not [note for note in result.notes if "optimizer" in note]


def test_ms_swift_s_own_fields_do_not_matter_and_its_merged_layers_do(tmp_path: Path) -> None:
    """swift/tuners/lora.py: names without peft's wrapper, and `swift_type` beside `peft_type`."""
    tensors = {key.removeprefix(PREFIX): value for key, value in plain().items()}
    own = {
        "swift_type": "LORA",
        "lorap_lr_ratio": 16.0,
        "lorap_emb_lr": 1e-6,
        "use_merged_linear": False,
        "enable_lora": None,
    }
    ao.convert(folder(tmp_path / "in", tensors, **LORA, **own, lora_dtype="bf16"), "peft", tmp_path / "out")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == plain().keys()
    with pytest.raises(UnsupportedFormat, match="use_merged_linear"):
        ao.convert(folder(tmp_path / "2", tensors, **LORA, use_merged_linear=True), "peft", tmp_path / "other")


def test_a_peft_type_that_says_nothing_is_not_handed_on(tmp_path: Path) -> None:
    ao.convert(folder(tmp_path / "in", plain(), **{**LORA, "peft_type": None}), "peft", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
