"""litgpt's checkpoints, held to what litgpt's own merging adds to each weight.

`fixtures/litgpt/` is written by litgpt 0.5.13 (scripts/trainer_fixtures.py): q and v, all three, and k alone, on a Llama with
fewer keys than queries; `change.safetensors` is what `merge_lora_weights` added.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import adapterops as ao
from adapterops.errors import BrokenAdapter, CannotRepresent, UnknownFact, UnreadableFile, UnsupportedFormat, UsageError

FIXTURES = Path(__file__).parents[2] / "fixtures" / "litgpt"
NAMES = {
    "self_attn.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
}
WIDTH, KEYS = 16, 8
SCALE = 4 / 3


def copied(name: str, tmp_path: Path, *without: str) -> Path:
    folder = tmp_path / name
    shutil.copytree(FIXTURES / name, folder)
    for file in ("change.safetensors", *without):
        (folder / file).unlink()
    return folder


def delta(tensors: dict[str, Tensor], module: str, rows: int = 0) -> Tensor:
    a = tensors.get(f"base_model.model.{module}.lora_A.weight")
    return torch.zeros(rows, WIDTH) if a is None else SCALE * tensors[f"base_model.model.{module}.lora_B.weight"] @ a


@pytest.mark.parametrize("name", ["qv", "qkv", "k"])
def test_it_adds_what_litgpt_adds(name: str, tmp_path: Path) -> None:
    base = FIXTURES / name / "config.json"
    result = ao.convert(copied(name, tmp_path), "peft", tmp_path / "out", base=base)
    assert result.source_dialect == "litgpt"
    wanted = load_file(FIXTURES / name / "change.safetensors")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    adapted = {key.split(".lora_")[0].rpartition(".")[2] for key in tensors if "self_attn" in key}
    assert adapted == {f"{part}_proj" for part in name} | {"o_proj"}
    for layer in range(2):
        stem = f"model.layers.{layer}."
        parts = [
            delta(tensors, f"{stem}self_attn.{p}_proj", rows) for p, rows in (("q", WIDTH), ("k", KEYS), ("v", KEYS))
        ]
        own = {"attn.qkv": torch.cat(parts)} | {new: delta(tensors, stem + old) for old, new in NAMES.items()}
        for module, made in own.items():
            change = wanted[f"transformer.h.{layer}.{module}.linear.weight"]
            assert change.abs().sum()
            torch.testing.assert_close(made, change, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(delta(tensors, "lm_head"), wanted["lm_head.linear.weight"], rtol=1e-4, atol=1e-5)


def test_without_settings_rows_tell_which_parts_or_the_user_does(tmp_path: Path) -> None:
    base = FIXTURES / "qv" / "config.json"
    whole = copied("qkv", tmp_path, "hyperparameters.yaml")
    ao.convert(whole, "peft", tmp_path / "whole", base=base, alpha=4.0)
    keys = copied("k", tmp_path, "hyperparameters.yaml")
    with pytest.raises(UnknownFact, match=r"which; put litgpt's hyperparameters\.yaml"):
        ao.convert(keys, "peft", tmp_path / "out", base=base, alpha=4.0)
    flags = {"enable_lora": [False, True, False]}
    ao.convert(keys, "peft", tmp_path / "out", base=base, alpha=4.0, fields=flags)
    said = load_file(tmp_path / "out" / "adapter_model.safetensors")
    ao.convert(copied("k", tmp_path / "again"), "peft", tmp_path / "other", base=base)
    other = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert said.keys() == other.keys()
    assert all(torch.equal(said[key], other[key]) for key in said)


def test_alpha_is_asked_for_where_nothing_says_it(tmp_path: Path) -> None:
    folder = copied("qkv", tmp_path, "hyperparameters.yaml")
    with pytest.raises(UnknownFact, match="alpha"):
        ao.convert(folder, "peft", tmp_path / "out", base=FIXTURES / "qkv" / "config.json")


def test_the_base_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UnknownFact, match="--base CONFIG"):
        ao.convert(copied("qv", tmp_path), "peft", tmp_path / "out")


@pytest.mark.parametrize("flags", ["qv", [True], [1, 0, 1]])
def test_flags_that_are_none(flags: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="three of true and false"):
        ao.convert(copied("qv", tmp_path), "peft", tmp_path / "out", fields={"enable_lora": flags})


def test_flags_of_other_parts_than_the_tensors_have(tmp_path: Path) -> None:
    base = FIXTURES / "qv" / "config.json"
    with pytest.raises(BrokenAdapter, match="is not of 3 parts"):
        ao.convert(copied("qv", tmp_path), "peft", tmp_path / "out", base=base, fields={"enable_lora": [True] * 3})
    with pytest.raises(BrokenAdapter, match="has 16 rows"):
        ao.convert(
            copied("qv", tmp_path / "2"),
            "peft",
            tmp_path / "out",
            base=base,
            fields={"enable_lora": [False, True, True]},
        )


@pytest.mark.parametrize("text", ["- 1\n", "a: [", "lora_query: 1\nlora_key: 0\nlora_value: 1\n"])
def test_settings_that_are_none(text: str, tmp_path: Path) -> None:
    folder = copied("qv", tmp_path)
    (folder / "hyperparameters.yaml").write_text(text)
    with pytest.raises(UnreadableFile, match=r"hyperparameters\.yaml"):
        ao.convert(folder, "peft", tmp_path / "out", base=FIXTURES / "qv" / "config.json")


def test_models_that_litgpt_builds_otherwise_are_refused(tmp_path: Path) -> None:
    state = torch.load(FIXTURES / "qv" / "lit_model.pth.lora")["model"]
    for old, new, why in ((".fc_1.", ".fc.", "Pythia"), (".attn.qkv.", ".attn.attn.", "earlier litgpt")):
        other = {key.replace(old, new): value for key, value in state.items() if ".fc_2." not in key}
        torch.save({"model": other}, tmp_path / "lit_model.pth.lora")
        with pytest.raises(UnsupportedFormat, match=why):
            ao.convert(tmp_path, "peft", tmp_path / "out", alpha=4.0, base=FIXTURES / "qv" / "config.json")


@pytest.mark.parametrize("key", ["transformer.h.2.attn.gating_factor", "lm_head.adapter_scale"])
def test_llama_adapter_is_refused_by_name(key: str, tmp_path: Path) -> None:
    torch.save({"model": {key: torch.ones(4)}}, tmp_path / "a.pth")
    with pytest.raises(UnsupportedFormat, match="LLaMA-Adapter"):
        ao.convert(tmp_path / "a.pth", "peft", tmp_path / "out")


def test_it_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(CannotRepresent, match="read and never written"):
        ao.convert(copied("qv", tmp_path), "litgpt", tmp_path / "out", base=FIXTURES / "qv" / "config.json")
