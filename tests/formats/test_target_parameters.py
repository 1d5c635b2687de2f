"""LoRA on bare parameters in PEFT folders: nested keys, told apart by shape or by the config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft_models as pm
import pytest
import torch
from adapterops_formats.peft_parameters import nesting
from expert_models import BOTH, base_of, loaded, model, qwen, tuned
from torch import Tensor, nn

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS
from adapterops.methods.base import Own

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6]])


def same(one: nn.Module, two: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        outputs = [m(x) for m in (one, two)]
    first, second = (out if isinstance(out, Tensor) else out.logits for out in outputs)
    torch.testing.assert_close(first, second)


X = torch.linspace(-1, 1, 30).view(5, 6)
TARGETS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": BOTH},
    "the last": {"target_parameters": BOTH[1:]},
    "one layer": {"target_parameters": ["layers.1.experts.gate_up_proj"]},
    "beside modules": {"target_parameters": BOTH, "target_modules": ["q_proj"], "use_rslora": True},
    "ranks": {
        "target_parameters": BOTH,
        "rank_pattern": {"experts.down_proj": 3},
        "alpha_pattern": {"gate_up_proj": 7},
    },
}


KNOWN = [(name, known) for name in TARGETS for known in (False, True) if known or name != "ranks"]


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("name", "known"), KNOWN)
def test_with_the_config(name: str, is_transposed: bool, known: bool, tmp_path: Path) -> None:
    adapted, folder = tuned(model(is_transposed=is_transposed), tmp_path / "old", **TARGETS[name])
    base = base_of(model(is_transposed=is_transposed)) if known else None
    result = ao.convert(folder, to="peft", output=tmp_path / "new", base=base)
    assert result.proof is not None
    assert result.proof.exact
    pm.same_tensors(pm.weights_of(tmp_path / "new"), pm.weights_of(folder))
    published, written = pm.config_of(folder), pm.config_of(tmp_path / "new")
    assert {field: written[field] for field in published} == published
    same(adapted, loaded(model(is_transposed=is_transposed), tmp_path / "new"), X)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("name", [name for name in TARGETS if name != "ranks"])
def test_with_the_config_thrown_away(name: str, is_transposed: bool, tmp_path: Path) -> None:
    """Which parameter is whose, is found by its shape in the base."""
    adapted, folder = tuned(model(is_transposed=is_transposed), tmp_path / "old", **TARGETS[name])
    weights = pm.folder_with(tmp_path / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"
    base, rslora = base_of(model(is_transposed=is_transposed)), bool(TARGETS[name].get("use_rslora"))
    fields = {"use_rslora": True} if rslora else {}
    ao.convert(weights, to="peft", output=tmp_path / "new", base=base, alpha=5.0, fields=fields)
    pm.same_tensors(pm.weights_of(tmp_path / "new"), pm.weights_of(folder))
    same(adapted, loaded(model(is_transposed=is_transposed), tmp_path / "new"), X)


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_changes_are_pefts(name: str, is_transposed: bool, tmp_path: Path) -> None:
    adapted, folder = tuned(model(is_transposed=is_transposed), tmp_path / "old", **TARGETS[name])
    base = model(is_transposed=is_transposed)
    for update in ao.load(folder, base=base_of(base)):
        owner, _, parameter = update.module.rpartition(".")
        linear = update.method == "lora"
        weight = base.get_parameter(f"{update.module}.weight" if linear else f"{owner}.{parameter}")
        change = METHODS[update.method].change(update, Own(weight.detach()))
        weight.data += change.weight
    same(adapted, base, X)


def test_a_model_of_transformers(tmp_path: Path) -> None:
    adapted, folder = tuned(qwen(), tmp_path / "old", target_parameters=BOTH, target_modules=["q_proj"])
    (tmp_path / "config.json").write_text(
        json.dumps({**qwen().config.to_dict(), "architectures": ["Qwen3MoeForCausalLM"]})
    )
    ao.convert(folder, to="peft", output=tmp_path / "new", base=tmp_path / "config.json")
    pm.same_tensors(pm.weights_of(tmp_path / "new"), pm.weights_of(folder))
    weights = pm.folder_with(tmp_path / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"
    ao.convert(weights, to="peft", output=tmp_path / "again", base=tmp_path / "config.json", alpha=5.0)
    config = pm.config_of(tmp_path / "again")
    assert sorted(config["target_parameters"]) == sorted(BOTH)
    for written in ("new", "again"):
        same(adapted, loaded(qwen(), tmp_path / written), TOKENS)


def test_nothing_tells_which_parameter(tmp_path: Path) -> None:
    _, folder = tuned(model(), tmp_path / "old", target_parameters=BOTH)
    weights = pm.folder_with(tmp_path / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"
    with pytest.raises(errors.AdapterOpsError, match=r"--base CONFIG|--set num_experts"):
        ao.convert(weights, to="peft", output=tmp_path / "new", alpha=5.0)
    assert not (tmp_path / "new").exists()


def test_square_experts_are_told_by_the_config(tmp_path: Path) -> None:
    """With gate_up_proj (E, 20, 10) and down_proj (E, 10, 10), one of each shape; alike ones are ambiguous."""
    adapted, folder = tuned(model(hidden=10, inner=10), tmp_path / "old", target_parameters=BOTH[1:])
    base = base_of(model(hidden=10, inner=10))
    ao.convert(folder, to="peft", output=tmp_path / "new", base=base)
    same(adapted, loaded(model(hidden=10, inner=10), tmp_path / "new"), torch.linspace(-1, 1, 50).view(5, 10))


def test_another_bases_shapes(tmp_path: Path) -> None:
    _, folder = tuned(model(), tmp_path / "old", target_parameters=BOTH)
    with pytest.raises(errors.BrokenAdapter, match=r"no parameters of the base's module fit.*gate_up_proj"):
        ao.load(folder, base=base_of(model(inner=11)))


def test_a_level_that_is_missing(tmp_path: Path) -> None:
    _, folder = tuned(model(), tmp_path / "old", target_parameters=BOTH)
    kept = {key: tensor for key, tensor in pm.weights_of(folder).items() if ".base_layer." in key}
    weights = pm.folder_with(tmp_path / "alone", kept) / "adapter_model.safetensors"
    with pytest.raises(errors.BrokenAdapter, match="some are missing"):
        ao.load(weights, alpha=5.0)


@pytest.mark.parametrize("targets", ["experts.down_proj", [1]])
def test_a_field_that_is_no_list_of_names(targets: Any, tmp_path: Path) -> None:
    _, folder = tuned(model(), tmp_path / "old", target_parameters=BOTH)
    config = {**pm.config_of(folder), "target_parameters": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(errors.UnreadableFile, match="target_parameters is"):
        ao.load(folder)


def test_the_config_targets_another_parameter(tmp_path: Path) -> None:
    _, folder = tuned(model(), tmp_path / "old", target_parameters=BOTH[:1])
    config = {**pm.config_of(folder), "target_parameters": ["experts.down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(errors.AdapterOpsError, match=r"no parameters of the base's module fit"):
        ao.load(folder, base=base_of(model()))


def test_nested_names() -> None:
    assert nesting("a.experts.base_layer.base_layer") == ("a.experts", 2)
    assert nesting("a.experts") == ("a.experts", 0)


def test_it_is_a_lora_already(tmp_path: Path) -> None:
    adapted, folder = tuned(model(), tmp_path / "old", target_parameters=BOTH, target_modules=["q_proj"])
    ao.to_lora(folder, tmp_path / "lora", to="peft", reading={"base": base_of(model())})
    same(adapted, loaded(model(), tmp_path / "lora"), X)
    with pytest.raises(errors.CannotRepresent, match="does not make smaller"):
        ao.to_lora(folder, tmp_path / "less", to="peft", rank=1, reading={"base": base_of(model())})
