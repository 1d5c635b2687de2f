"""Configs of MiSS, GraLoRA, C3A, SHiRA, DeLoRA and HiRA that are wrong, missing, or cannot say what the tensors are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft_models as pm
import pytest
import torch
from peft import C3AConfig, GraloraConfig, HiraConfig
from peft_zoo import LINE, Case
from test_peft_methods import architecture_of
from torch import Tensor
from zoo_blocks import CASES

import adapterops as ao
from adapterops import errors

NEW = {"init_weights": None, "mini_r": None}
WRONG: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("miss, standard", {"init_weights": "bat"}, r"is of standard MiSS or mini.*init_weights=\"bat\"", NEW),
    ("miss, standard", {"init_weights": "mini", "mini_r": 4}, r"has mini_r \d\d.*mini_r=4", NEW),
    ("miss, bat", {"init_weights": True}, r"miss_block.*is of bat.*init_weights=true", NEW),
    ("miss, standard", {"r": 5}, r"has rank 4.*says 5.*--set r=4", {"r": 4}),
    ("gralora, linear", {"gralora_k": 4}, r"gralora_k of \w+ is 2.*says 4", {"gralora_k": None}),
    ("gralora, hybrid", {"hybrid_r": 0}, r"hybrid_r of \w+ is 3.*says 0", {"hybrid_r": None}),
    ("gralora, linear", {"r": 8}, r"r of \w+ is 4.*says 8", {"r": None}),
    ("c3a, linear", {"block_size": 4}, "has block_size 8.*says 4.*--set block_size=8", {"block_size": 8}),
    ("c3a, linear", {"block_size_pattern": {"tall": 2}}, "tall has block_size 8.*says 2", {"block_size_pattern": {}}),
    ("shira, linear", {"r": 3}, r"says r=3.*--set r=R", {"r": 2}),
    ("delora, linear", {"r": 4}, r"has rank 3.*says 4.*--set r=3", {"r": 3}),
    ("hira, linear", {"r": 4}, r"has r 3.*says r=4", {"r": None}),
]


def stored(name: str, folder: Path) -> tuple[Any, Case, dict[str, Tensor], dict[str, Any]]:
    case = CASES[name]
    original, path = case.adapter(folder / "original")
    return original, case, pm.weights_of(path), pm.config_of(path)


@pytest.mark.parametrize(("name", "changed", "message", "remedy"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_config_that_contradicts_its_tensors(
    name: str, changed: Mapping[str, Any], message: str, remedy: Mapping[str, Any], tmp_path: Path
) -> None:
    original, case, tensors, config = stored(name, tmp_path)
    folder = pm.folder_with(tmp_path / "wrong", tensors, {**config, **changed})
    with pytest.raises(errors.Conflict, match=message) as told:
        ao.load(folder)
    assert "tensor 'base_model.model." in str(told.value)
    ao.save(
        ao.load(folder, fields=remedy, base=architecture_of(case.base())),
        tmp_path / "out",
        format="peft",
        fields=remedy,
    )
    expected = case.outputs(original)
    assert pm.apart(case.outputs(pm.load(case.base(), tmp_path / "out")), expected) < 1e-6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("miss, mini", r"block \[4, 8\] of \w+ is of mini.*init_weights=true"),
        ("shira, linear", r"r is 2, but.*says 4; --set r=2"),
    ],
)
def test_what_the_base_shows(name: str, message: str, tmp_path: Path) -> None:
    """Contradictions that only the base's shapes make plain."""
    _, case, tensors, config = stored(name, tmp_path)
    folder = pm.folder_with(
        tmp_path / "wrong", tensors, {**config, **({"r": 4} if "shira" in name else {"init_weights": True})}
    )
    ao.load(folder)
    with pytest.raises(errors.Conflict, match=message):
        ao.load(folder, base=architecture_of(case.base()))


def test_r_of_shira_is_asked_for_without_the_base(tmp_path: Path) -> None:
    _, _, tensors, _ = stored("shira, linear", tmp_path)
    weights = pm.folder_with(tmp_path / "alone", tensors) / "adapter_model.safetensors"
    adapter = ao.load(weights)
    with pytest.raises(errors.UnknownFact, match=r"shira_\w+.*--base CONFIG.*--set r=VALUE"):
        ao.save(adapter, tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "told"), [("miss, standard", True), ("miss, bat", False)])
def test_standard_miss_is_assumed_aloud(name: str, told: bool, tmp_path: Path) -> None:
    _, _, tensors, _ = stored(name, tmp_path)
    weights = pm.folder_with(tmp_path / "alone", tensors) / "adapter_model.safetensors"
    notes = [note for note in ao.load(weights).provenance.notes if "standard MiSS" in note]
    assert len(notes) == int(told)
    assert not ao.load(weights, fields={"init_weights": "mini"}).provenance.notes


MIXED: dict[str, tuple[str, Callable[[str, Tensor], Tensor], str]] = {
    "r of MiSS": ("miss, standard", lambda k, t: t[:3] if "wide" in k else t, "rank"),
    "r of GraLoRA": (
        "gralora, linear",
        lambda k, t: (t[..., :2] if "_A" in k else t[:, :2]) if "wide" in k else t,
        "has r 4 and wide 2|has r 2 and",
    ),
    "r of HiRA": ("hira, linear", lambda k, t: (t[:2] if "_A" in k else t[:, :2]) if "wide.hira" in k else t, "has r"),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_no_config_can_say(name: str, tmp_path: Path) -> None:
    case, cut, message = MIXED[name]
    _, _, tensors, _ = stored(case, tmp_path)
    cuts = {key: cut(key, t) for key, t in tensors.items()}
    weights = pm.folder_with(tmp_path / "alone", cuts) / "adapter_model.safetensors"
    with pytest.raises(errors.CannotRepresent, match=message):
        ao.save(ao.load(weights, alpha=6.0), tmp_path / "out", format="peft")


def test_two_alphas_of_gralora(tmp_path: Path) -> None:
    """Its config has no alpha_pattern, so one would be lost on peft."""
    _, _, tensors, config = stored("gralora, linear", tmp_path)
    folder = pm.folder_with(tmp_path / "wrong", tensors, {**config, "alpha_pattern": {"wide": 3}})
    with pytest.raises(errors.UnsupportedFormat, match=r"alpha_pattern.*does not have"):
        ao.load(folder)


def test_the_scale_of_a_hybrid_is_folded_whole(tmp_path: Path) -> None:
    original, case, *_ = stored("gralora, hybrid", tmp_path)
    ao.convert(tmp_path / "original", to="peft", fold_alpha=True, output=tmp_path / "out")
    config = pm.config_of(tmp_path / "out")
    assert (config["alpha"], config["r"], config["hybrid_r"]) == (7, 4, 3)
    expected = case.outputs(original)
    assert pm.apart(case.outputs(pm.load(case.base(), tmp_path / "out")), expected) < 1e-5


def test_patterns_of_c3a_as_peft_looks_them_up(tmp_path: Path) -> None:
    """By a regular expression behind a dot, or by the whole name: not as in any other method's tables."""
    table = {"wide": 2, "x.tall": 4, "square$": 16}
    case = Case(LINE, C3AConfig(block_size=8, block_size_pattern=table, target_modules=["wide", "tall", "square"]))
    original, folder = case.adapter(tmp_path / "original")
    sizes = {key.split(".")[2]: t.shape[2] for key, t in pm.weights_of(folder).items()}
    assert sizes == {"wide": 2, "tall": 8, "square": 8}
    ao.convert(folder, to="peft", output=tmp_path / "out")
    assert pm.apart(case.outputs(pm.load(case.base(), tmp_path / "out")), case.outputs(original)) < 1e-6


def test_names_that_c3a_cannot_tell_apart(tmp_path: Path) -> None:
    """`wide` of its own size, and another module that ends so: peft would take the pattern for both."""
    tensors = {
        "base_model.model.wide.c3a_kernel": torch.ones(6, 4, 4),
        "base_model.model.inner.wide.c3a_kernel": torch.ones(3, 2, 8),
        "base_model.model.tall.c3a_kernel": torch.ones(4, 3, 8),
    }
    weights = pm.folder_with(tmp_path / "alone", tensors) / "adapter_model.safetensors"
    with pytest.raises(errors.CannotRepresent, match=r"wide.*block_size_pattern.*the end of another"):
        ao.save(ao.load(weights), tmp_path / "out", format="peft")


def test_a_rank_pattern_of_hira_does_no_harm(tmp_path: Path) -> None:
    """peft 0.21 ignores it, so the tensors have the one r; a later one may heed it."""
    case = Case(LINE, HiraConfig(r=3, rank_pattern={"tall": 2}, target_modules=["wide", "tall"]))
    _, folder = case.adapter(tmp_path / "original")
    tensors = pm.weights_of(folder)
    assert {t.shape[0] for key, t in tensors.items() if "hira_A" in key} == {3}
    heeded = {k: (t[:2] if "_A" in k else t[:, :2]) if "tall" in k else t for k, t in tensors.items()}
    for number, stored_tensors in enumerate((tensors, heeded)):
        path = pm.folder_with(tmp_path / str(number), stored_tensors, pm.config_of(folder))
        assert len(ao.load(path)) == 2


def test_a_bias_that_is_saved_beside_it(tmp_path: Path) -> None:
    """As the method's own config calls it where it is made anew."""
    case = Case(LINE, GraloraConfig(r=4, alpha=6, bias="gralora_only", target_modules=["wide", "square"]))
    original, folder = case.adapter(tmp_path / "original")
    weights = pm.folder_with(tmp_path / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"
    ao.save(ao.load(weights, alpha=6.0), tmp_path / "out", format="peft")
    assert pm.config_of(tmp_path / "out")["bias"] == "gralora_only"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = pm.load(case.base(), tmp_path / "out")
    assert pm.apart(case.outputs(loaded), case.outputs(original)) < 1e-6
    with pytest.raises(errors.UsageError, match="--set bias=lora_only: must be one of none, all, gralora_only"):
        ao.load(folder, fields={"bias": "lora_only"})
