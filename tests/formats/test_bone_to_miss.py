"""Bone converted: the fixtures of peft 0.17 in every container, loaded by today's peft, against the outputs beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft_models as pm
import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file
from test_peft_methods import architecture_of
from torch import Tensor, nn

import adapterops as ao
from adapterops import errors

BONE = Path(__file__).parents[2] / "fixtures" / "bone"
SOURCES = {"bone": "bone", "bat": "bat", "bin": "bin", "bare.safetensors": "bat"}
"""The fixtures, and the folder that has the outputs of each."""


class Tiny(nn.Module):
    """The base of the fixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"up": nn.Linear(10, 12), "down": nn.Linear(12, 8, bias=False)})
        self.head = nn.Linear(8, 3)
        self.config = {"model_type": "tiny"}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.encoder["down"](torch.tanh(self.encoder["up"](x)))))
        return out


def base(measured: dict[str, Tensor]) -> Tiny:
    model = Tiny()
    model.load_state_dict({k.removeprefix("base."): t for k, t in measured.items() if k.startswith("base.")})
    return model.eval()


def check(folder: Path, like: str) -> PeftModel:
    """Hold what today's peft makes of a folder against the outputs of Bone's layers."""
    measured = load_file(BONE / like / "outputs.safetensors")
    model = pm.load(base(measured), folder)
    with torch.no_grad():
        torch.testing.assert_close(model(measured["input"]), measured["output"], rtol=1e-5, atol=1e-6)
        apart = base(measured)(measured["input"]) - measured["output"]
    assert float(apart.norm()) > 0.1 * float(measured["output"].norm())
    return model


def renamed(folder: Path) -> dict[str, Tensor]:
    return {key.replace("bone_block", "miss_block"): t for key, t in pm.weights_of(folder).items()}


@pytest.mark.parametrize("known", [False, True], ids=["", "base known"])
@pytest.mark.parametrize("to", ["miss", "peft"])
@pytest.mark.parametrize("source", SOURCES)
def test_outputs_are_bones(source: str, to: str, known: bool, tmp_path: Path) -> None:
    like = SOURCES[source]
    adapter = ao.load(BONE / source, base=architecture_of(Tiny()) if known else None)
    assert any("Bone is read as MiSS" in note for note in adapter.provenance.notes)
    result = ao.save(adapter, tmp_path / "out", format=to)
    assert result.proof is not None
    assert result.proof.exact
    check(tmp_path / "out", like)
    pm.same_tensors(pm.weights_of(tmp_path / "out"), renamed(BONE / like))
    assert pm.config_of(tmp_path / "out")["peft_type"] == "MISS"


@pytest.mark.parametrize("to", ["miss", "peft"])
@pytest.mark.parametrize("source", ["bone", "bat", "bin"])
def test_the_config_keeps_all_that_it_said(source: str, to: str, tmp_path: Path) -> None:
    ao.convert(BONE / source, to=to, output=tmp_path / "out")
    before, after = pm.config_of(BONE / source), pm.config_of(tmp_path / "out")
    assert after == {**before, "peft_type": "MISS", "mini_r": 1, "miss_dropout": 0.0}


def test_a_single_file_gets_a_config_of_its_own(tmp_path: Path) -> None:
    ao.convert(BONE / "bare.safetensors", to="miss", output=tmp_path / "out", base=architecture_of(Tiny()))
    config = pm.config_of(tmp_path / "out")
    told = {name: config[name] for name in ("init_weights", "r", "modules_to_save", "target_modules")}
    assert told == {"init_weights": "bat", "r": 2, "modules_to_save": ["head"], "target_modules": ["down", "up"]}


def test_bone_without_its_config_is_never_mini(tmp_path: Path) -> None:
    """Bone had no mini, so nothing is assumed."""
    weights = BONE / "bone" / "adapter_model.safetensors"
    shutil.copy(weights, tmp_path / "bone.safetensors")
    adapter = ao.load(tmp_path / "bone.safetensors")
    assert not [note for note in adapter.provenance.notes if "mini" in note]
    ao.save(adapter, tmp_path / "out", format="miss")
    check(tmp_path / "out", "bone")


@pytest.mark.parametrize("source", ["bone", "bin"])
def test_from_the_hub(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    repo = tmp_path / "cache" / "models--me--bone"
    shutil.copytree(BONE / source, repo / "snapshots" / commit)
    (repo / "snapshots" / commit / "outputs.safetensors").unlink()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ao.convert("hf://me/bone", to="miss", output=tmp_path / "out")
    check(tmp_path / "out", source)


def test_a_state_dict_saved_by_hand(tmp_path: Path) -> None:
    """The adapter's name is still in its keys."""
    named = {key.replace("bone_block", "bone_block.default"): t for key, t in pm.weights_of(BONE / "bat").items()}
    pm.folder_with(tmp_path / "in", named, pm.config_of(BONE / "bat"))
    ao.convert(tmp_path / "in", to="miss", output=tmp_path / "out")
    check(tmp_path / "out", "bat")


def test_the_outcome_is_a_peft_folder_for_every_reader(tmp_path: Path) -> None:
    ao.convert(BONE / "bone", to="miss", output=tmp_path / "out")
    assert ao.load(tmp_path / "out").provenance.dialect == "peft"
    again = ao.convert(tmp_path / "out", to="miss", format="miss", output=tmp_path / "again")
    assert again.proof is not None
    assert again.proof.exact
    assert pm.config_of(tmp_path / "again") == pm.config_of(tmp_path / "out")
    check(tmp_path / "again", "bone")


def test_only_miss_is_held(tmp_path: Path) -> None:
    lora = BONE.parent / "peft-llama"
    with pytest.raises(errors.CannotRepresent, match=r"lora_A.*--to miss holds MiSS and Bone alone.*--to peft"):
        ao.convert(lora, to="miss", output=tmp_path / "out")
    with pytest.raises(errors.CannotRepresent, match="nothing of it is left"):
        ao.convert(lora, to="miss", output=tmp_path / "out", allow_drop=True)
    assert not (tmp_path / "out").exists()


def test_a_rank_above_the_inputs(tmp_path: Path) -> None:
    """Bone's layers padded what MiSS refuses; where the base is known that is told before peft finds out."""
    wide = {"base_model.model.encoder.up.bone_block": torch.ones(11, 12)}
    config = {**pm.config_of(BONE / "bin"), "r": 11, "target_modules": ["up"]}
    folder = pm.folder_with(tmp_path / "in", wide, config)
    with pytest.raises(errors.Conflict, match=r"bone_block.*r is 11.*encoder.up has 10 inputs"):
        ao.convert(folder, to="miss", output=tmp_path / "out", base=architecture_of(Tiny()))
    assert not (tmp_path / "out").exists()


def test_a_config_of_the_other_kind(tmp_path: Path) -> None:
    config = {**pm.config_of(BONE / "bat"), "init_weights": True}
    folder = pm.folder_with(tmp_path / "in", pm.weights_of(BONE / "bat"), config)
    with pytest.raises(errors.Conflict, match=r"is of bat.*init_weights=true; --set init_weights=null"):
        ao.load(folder)
    ao.convert(folder, to="miss", fields={"init_weights": None}, output=tmp_path / "out")
    check(tmp_path / "out", "bat")


def test_bone_and_bat_in_one_file(tmp_path: Path) -> None:
    one = {key: t for key, t in pm.weights_of(BONE / "bone").items() if "up" in key}
    two = {"base_model.model.encoder.down.bone_block": torch.ones(2, 4, 4)}
    folder = pm.folder_with(tmp_path / "in", {**one, **two})
    with pytest.raises(errors.CannotRepresent, match=r"encoder.*the kind.*bat.*split the adapter"):
        ao.convert(folder / "adapter_model.safetensors", to="miss", output=tmp_path / "out")
