"""`--repair`: configs that contradict their tensors, made to say what the tensors are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft_models as pm
import pytest
from peft import LoraConfig
from peft_zoo import LINE, Case

import adapterops as ao
from adapterops import errors

CASE = Case(LINE, LoraConfig(r=4, lora_alpha=8, target_modules=["wide", "square"], modules_to_save=["other"]))
WRONG: dict[str, tuple[dict[str, Any], set[str]]] = {
    "rank": ({"r": 16}, {"r"}),
    "target that is nowhere": ({"target_modules": ["wide", "square", "v_proj"]}, {"target_modules"}),
    "target that is missing": ({"target_modules": ["wide"]}, {"target_modules"}),
    "saved modules listed again and again": (
        {"modules_to_save": ["other", "score", "other"]}, {"modules_to_save"},
    ),
    "a DoRA without magnitudes": ({"use_dora": True}, {"use_dora"}),
    "layers that are none": ({"layers_to_transform": [3]}, {"layers_to_transform"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_repaired_config_does_what_the_tensors_say(name: str, tmp_path: Path) -> None:
    changes, repaired = WRONG[name]
    original, folder = CASE.adapter(tmp_path / "original")
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), {**pm.config_of(folder), **changes})
    result = ao.convert(source, to="peft", output=tmp_path / "out", repair=True)
    loaded = pm.load(CASE.base(), tmp_path / "out")
    assert pm.adapted(loaded) == {"wide", "square"}
    assert pm.wrapped(loaded) == {"other.weight", "other.bias"}
    pm.same_tensors(pm.loaded_tensors(loaded), pm.weights_of(folder))
    assert pm.apart(CASE.outputs(loaded), CASE.outputs(original)) < 1e-6
    told = {note.split()[1].rstrip(":") for note in result.notes if note.startswith("repaired ")}
    assert told == repaired


@pytest.mark.parametrize(
    "name", ["rank", "target that is missing", "a DoRA without magnitudes", "layers that are none"]
)
def test_without_it_a_contradiction_is_an_error(name: str, tmp_path: Path) -> None:
    _, folder = CASE.adapter(tmp_path / "original")
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), {**pm.config_of(folder), **WRONG[name][0]})
    with pytest.raises(errors.Conflict, match=r"--set|--repair"):
        ao.convert(source, to="peft", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_true_config_is_left_as_it_is(tmp_path: Path) -> None:
    _, folder = CASE.adapter(tmp_path / "original")
    result = ao.convert(folder, to="peft", output=tmp_path / "out", repair=True)
    written = pm.config_of(tmp_path / "out")
    assert {name: written[name] for name in pm.config_of(folder)} == pm.config_of(folder)
    assert not [note for note in result.notes if "repaired" in note]
