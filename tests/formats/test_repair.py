"""`--repair`: configs that contradict their tensors, made to say what the tensors are."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import peft
import peft_models as pm
import pytest
from peft import LoraConfig
from peft_zoo import LINE, Case
from test_peft_methods import architecture_of

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS

CASE = Case(LINE, LoraConfig(r=4, lora_alpha=8, target_modules=["wide", "square"], modules_to_save=["other"]))
WRONG: dict[str, tuple[dict[str, Any], set[str]]] = {
    "rank": ({"r": 16}, {"r"}),
    "target that is nowhere": ({"target_modules": ["wide", "square", "v_proj"]}, {"target_modules"}),
    "target that is missing": ({"target_modules": ["wide"]}, {"target_modules"}),
    "saved modules listed again and again": (
        {"modules_to_save": ["other", "score", "other"]}, {"modules_to_save"},
    ),
    "a DoRA without magnitudes": ({"use_dora": True}, {"use_dora"}),
    "layers that are none": ({"layers_to_transform": [3]}, {"layers_to_transform", "target_modules"}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_repaired_config_does_what_the_tensors_say(name: str, tmp_path: Path) -> None:
    changes, repaired = WRONG[name]
    original, folder = CASE.adapter(tmp_path / "original")
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), {**pm.config_of(folder), **changes})
    alpha = 8 if name == "rank" else None
    result = ao.convert(source, to="peft", output=tmp_path / "out", repair=True, alpha=alpha)
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


def _wrong(tmp_path: Path, config: Any, **wrong: Any) -> Path:
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    return pm.folder_with(tmp_path / "source", pm.weights_of(folder), {**pm.config_of(folder), **wrong})


TARGETS = ["wide", "square"]
SCALES = {
    "lora": (LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), {"r": 32, "lora_alpha": 64}, ("64/32 = 2", "16"), 8),
    "rslora": (
        LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=TARGETS), {"r": 16, "lora_alpha": 64},
        ("64/√16 = 16", "32"), 32,
    ),
    "gralora": (
        peft.GraloraConfig(r=4, alpha=8, gralora_k=2, target_modules=TARGETS), {"r": 32, "alpha": 64},
        ("64/32 = 2", "16"), 8,
    ),
    "lokr": (peft.LoKrConfig(r=2, alpha=4, target_modules=TARGETS), {"r": 1}, ("4/1 = 4", "2"), 8),
    "adalora": (
        peft.AdaLoraConfig(init_r=6, lora_alpha=8, total_step=9, target_modules=TARGETS), {"init_r": 64},
        ("8/64 = 0.125", "1.33333"), 0.75,
    ),
}  # fmt: skip
"""By method: its config, what is wrong in it, the two readings of its scale, and the alpha that keeps the one it says."""


def _scales(folder: Path) -> list[float]:
    adapter = ao.load(folder)
    return [METHODS[u.method].scale(u) or 0.0 for u in adapter]


@pytest.mark.parametrize("kind", SCALES)
def test_which_scale_is_meant_is_asked_for(kind: str, tmp_path: Path) -> None:
    config, wrong, (said, shown), keeps = SCALES[kind]
    source = _wrong(tmp_path, config, **wrong)
    alpha = pm.config_of(source)["alpha" if "alpha" in pm.config_of(source) else "lora_alpha"]
    with pytest.raises(errors.Conflict) as refusal:
        ao.convert(source, to="peft", output=tmp_path / "out", repair=True)
    for part in (said, f"would be {shown}", f"--alpha {alpha} keeps alpha", f"--alpha {keeps} keeps the scale"):
        assert part in str(refusal.value)
    for given, scale in ((alpha, shown), (keeps, said.rpartition(" ")[2])):
        place = tmp_path / f"out-{given}"
        ao.convert(source, to="peft", output=place, repair=True, alpha=given)
        assert _scales(place) == pytest.approx([float(scale)] * 2, rel=1e-4)
        pm.load(LINE(), place)


def test_the_scale_that_a_config_says_may_be_believed(tmp_path: Path) -> None:
    source = _wrong(tmp_path, SCALES["adalora"][0], init_r=64)
    ao.convert(source, to="peft", output=tmp_path / "out", repair=True, fields={"init_r": 64})
    assert _scales(tmp_path / "out") == pytest.approx([8 / 64] * 2, rel=1e-4)


def test_scales_of_modules_of_several_ranks(tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, rank_pattern={"square": 2}, target_modules=TARGETS)
    source = _wrong(tmp_path, config, rank_pattern={}, r=8)
    with pytest.raises(errors.Conflict) as refusal:
        ao.convert(source, to="peft", output=tmp_path / "out", repair=True)
    pattern = re.search(r"--set lora_alpha=(\S+) --set alpha_pattern='(\{.*\})' keeps", str(refusal.value))
    assert pattern is not None
    fields = {"lora_alpha": int(pattern[1]), "alpha_pattern": json.loads(pattern[2])}
    ao.convert(source, to="peft", output=tmp_path / "out", repair=True, fields=fields)
    assert _scales(tmp_path / "out") == [1.0, 1.0]


def test_an_alpha_for_a_rank_that_is_right_is_refused(tmp_path: Path) -> None:
    source = _wrong(tmp_path, SCALES["lora"][0], target_modules=["wide"])
    with pytest.raises(errors.Conflict, match="leave --alpha out"):
        ao.convert(source, to="peft", output=tmp_path / "out", repair=True, alpha=3)


@pytest.mark.parametrize("known", [False, True])
def test_a_mini_beside_standard_blocks(known: bool, tmp_path: Path) -> None:
    config = peft.MissConfig(r=4, target_modules=["wide", "tall", "square"])
    source = _wrong(tmp_path, config, init_weights="mini", mini_r=64)
    base = architecture_of(LINE()) if known else None
    with pytest.raises(errors.Conflict, match="mini"):
        ao.convert(source, to="peft", output=tmp_path / "out", base=base)
    ao.convert(source, to="peft", output=tmp_path / "out", base=base, repair=True)
    assert pm.config_of(tmp_path / "out")["init_weights"] is True
    pm.load(LINE(), tmp_path / "out")


def test_notes_are_one_short_line_a_field(tmp_path: Path) -> None:
    wrong = {"r": 32, "target_modules": [f"layer_{n}.nowhere" for n in range(50)]}
    source = _wrong(tmp_path, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS), **wrong)
    notes = ao.convert(source, to="peft", output=tmp_path / "out", repair=True, alpha=8).notes
    told = {note.split()[1].rstrip(":"): note for note in notes if note.startswith("repaired ")}
    assert told.keys() == {"r", "target_modules"}
    assert re.fullmatch(r"repaired r: 32 → 4 \(2 modules; e\.g\. tensor '[^']*' has rank 4\)", told["r"])
    assert len(re.split(r": | → | \(", told["target_modules"])[1]) <= 80
    assert not [note for note in notes if "--set" in note or str(tmp_path) in note]
    assert len(notes) == len(told) + 1
