"""Adapters whose configs say different things of different modules: the merged config, judged by peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_merges as pm
import pytest
import torch
from peft import LoraConfig, PeftModel
from small_adapters import pair, peft
from torch import nn

import adapterops as ao

pytestmark = pytest.mark.usefixtures("one_thread")

LINE = ["line"]


class Biased(nn.Module):
    """For `bias="lora_only"`: a norm, and a layer with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.line, self.other = nn.LayerNorm(12), nn.Linear(12, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.line(self.norm(x)))  # type: ignore[no-any-return]


class Classifier(nn.Module):
    """With a head of two layers, as RoBERTa's, under a name that peft wraps for the task's sake."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(12, 10)
        self.classifier = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 3))


class Layers(nn.Module):
    """Names that a pattern of layers fits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([pm.Block() for _ in range(11)])


CONFIGS: dict[str, Callable[[], list[LoraConfig]]] = {
    "rank-stabilised": lambda: [pm.config(4, 6.0, use_rslora=True), pm.config(2, 5.0, use_rslora=True)],
    "one rank-stabilised": lambda: [pm.config(4, 6.0), pm.config(2, 5.0, use_rslora=True)],
    "the first rank-stabilised": lambda: [pm.config(4, 6.0, use_rslora=True), pm.config(4, 5.0)],
    "ranks by pattern": lambda: [
        pm.config(4, 6.0, rank_pattern={"first": 3, "blocks.1.mix": 1}),
        pm.config(2, 5.0, rank_pattern={"mix": 5, "embed": 2}),
    ],
    "alphas by pattern": lambda: [
        pm.config(4, 6.0, alpha_pattern={"first": 1.0, "blocks.1.mix": 9.0}),
        pm.config(4, 4.0, alpha_pattern={"mix": 2.0, "point": 3.0}),
    ],
    "both, and rank-stabilised": lambda: [
        pm.config(3, 6.0, use_rslora=True, rank_pattern={"first": 2, "square": 5}, alpha_pattern={"first": 7.0}),
        pm.config(2, 4.0, use_rslora=True, rank_pattern={r"blocks\.\d\.mix": 4}, alpha_pattern={"flipped": 3.0}),
        pm.config(1, 1.0),
    ],
    "other modules": lambda: [
        pm.config(3, 6.0, ["first", "embed", "blocks.0.mix"]),
        pm.config(2, 4.0, ["first", "flipped", "square", "lonely"]),
        pm.config(5, 4.0, ["blocks.0.mix", "point", "lonely"]),
    ],
    "a name and a pattern": lambda: [
        pm.config(3, 6.0, ["mix"]),
        LoraConfig(r=3, lora_alpha=5, target_modules=r".*\.1\.mix|first"),
    ],
    "some excluded": lambda: [
        pm.config(3, 6.0, ["mix", "first"], exclude_modules=["blocks.1.mix"]),
        pm.config(3, 5.0, ["mix", "point"], exclude_modules=["blocks.0.mix"]),
        pm.config(3, 5.0, ["mix"]),
    ],
}
WEIGHTS = [0.7, -0.4, 0.9]


def insist_on_agreement(folder: Path, model: Any) -> None:
    """The ranks and scales that peft reads from the config are those of the tensors, and no pattern is idle."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert not settings["use_rslora"]
    found = pm.layers(model)
    for name, layer in found.items():
        factors = pm.pair(layer, "default")
        assert factors is not None
        assert layer.r["default"] == factors[0].shape[1] == factors[1].shape[0], name
    for pattern in ("rank_pattern", "alpha_pattern"):
        for key in settings[pattern]:
            assert any(name == key.strip("^$").replace("\\", "") or name.endswith(key) for name in found), key


@pytest.mark.parametrize("kind", ["svd", "cat"])
@pytest.mark.parametrize("name", CONFIGS)
def test_exact_methods_give_the_weighted_sum(name: str, kind: str, tmp_path: Path) -> None:
    model = pm.adapted(CONFIGS[name]())
    weights = WEIGHTS[: len(model.peft_config)]
    sources = pm.saved(model, tmp_path / "in")
    ao.merge(sources, tmp_path / "out", kind, weights=weights, **pm.ranked(kind, 20))
    found = pm.loaded(tmp_path / "out")
    insist_on_agreement(tmp_path / "out", found)
    pm.assert_close(pm.deltas(found), pm.exact(model, weights))


@pytest.mark.parametrize("name", ["the first rank-stabilised", "alphas by pattern", "some excluded"])
def test_factors(name: str, tmp_path: Path) -> None:
    model = pm.adapted(CONFIGS[name]())
    weights = WEIGHTS[: len(model.peft_config)]
    ao.merge(pm.saved(model, tmp_path / "in"), tmp_path / "out", "linear", weights=weights)
    found = pm.loaded(tmp_path / "out")
    insist_on_agreement(tmp_path / "out", found)
    pm.assert_close(pm.deltas(found), pm.linear_by_hand(model, weights))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_layers_that_only_one_config_names(order: tuple[int, int], tmp_path: Path) -> None:
    configs = [
        pm.config(2, 3.0, ["mix"], layers_to_transform=[0, 2], layers_pattern="layers"),
        pm.config(3, 4.0, ["mix"]),
    ]
    model = pm.adapted([configs[n] for n in order], Layers)
    ao.merge(pm.saved(model, tmp_path / "in"), tmp_path / "out", "svd", weights=[0.7, -0.4], rank=5)
    found = pm.loaded(tmp_path / "out", Layers)
    assert len(pm.layers(found)) == 11
    pm.assert_close(pm.deltas(found), pm.exact(model, [0.7, -0.4]))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_bias_that_only_one_adapter_has(order: tuple[int, int], tmp_path: Path) -> None:
    """Of a module that the other adapter changes as well; the output of the layer is the judge."""
    configs = [pm.config(2, 3.0, LINE, lora_bias=True), pm.config(3, 4.0, LINE)]
    weights = [0.7, -0.4]
    model = pm.adapted([configs[n] for n in order], pm.Line)
    layer = pm.layers(model)["line"]
    owner = f"a{order.index(0)}"
    bias = weights[order.index(0)] * layer.scaling[owner] * layer.lora_B[owner].bias.data
    ao.merge(pm.saved(model, tmp_path / "in"), tmp_path / "out", "svd", weights=weights, rank=5)
    merged = pm.loaded(tmp_path / "out", pm.Line)
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = merged.base_model.model.line(x) - pm.made(pm.Line).line(x)
    torch.testing.assert_close(found, x @ pm.exact(model, weights)["line"].float().T + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_head_that_only_one_adapter_saves(order: tuple[int, int], tmp_path: Path) -> None:
    configs = [pm.config(2, 3.0, LINE, modules_to_save=["head"]), pm.config(3, 4.0, LINE)]
    model = pm.adapted([configs[n] for n in order], pm.Line)
    sources = pm.saved(model, tmp_path / "in")
    if order.index(0) == 1:
        with pytest.raises(ao.AdapterOpsError, match="cannot be taken away"):
            ao.merge(sources, tmp_path / "out", "svd", weights=[0.7, -0.4], rank=5)
    ao.merge(sources, tmp_path / "out", "svd", weights=[0.7, -0.4], rank=5, saved="first")
    merged = pm.loaded(tmp_path / "out", pm.Line)
    pm.assert_close(pm.deltas(merged), pm.exact(model, [0.7, -0.4]))
    saved = pm.weights_of(sources[order.index(0)])
    head = merged.base_model.model.head.modules_to_save["default"].state_dict()
    for key, tensor in head.items():
        assert torch.equal(tensor, saved[f"{pm.PREFIX}head.{key}"])


def test_heads_that_a_task_brings_along(tmp_path: Path) -> None:
    """peft adds `classifier` to `modules_to_save` where the task is SEQ_CLS, and cannot wrap inside a wrapper."""
    configs = [pm.config(2, 3.0, LINE, task_type="SEQ_CLS"), pm.config(3, 4.0, LINE, task_type="SEQ_CLS")]
    model = pm.adapted(configs, Classifier)
    sources = pm.saved(model, tmp_path / "in")
    ao.merge(sources, tmp_path / "out", "svd", rank=5, saved="mean")
    found = pm.loaded(tmp_path / "out", Classifier)
    pm.assert_close(pm.deltas(found), pm.exact(model, [1.0, 1.0]))
    one, two = (pm.weights_of(source) for source in sources)
    for key, tensor in found.base_model.model.classifier.modules_to_save["default"].state_dict().items():
        name = f"{pm.PREFIX}classifier.{key}"
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_magnitudes_of_modules_that_no_other_adapter_has(order: tuple[int, int], tmp_path: Path) -> None:
    """DoRA on one layer and a plain LoRA on another cannot be one config of peft, which has one `use_dora`."""
    configs = [pm.config(2, 3.0, ["blocks.0.mix"], use_dora=True), pm.config(2, 4.0, ["blocks.1.mix"])]
    model = pm.adapted([configs[n] for n in order], pm.Tiny)
    with pytest.raises(ao.AdapterOpsError, match="use_dora for all or none"):
        ao.merge(pm.saved(model, tmp_path / "in"), tmp_path / "out", "svd", allow_disjoint=True)
    assert not (tmp_path / "out").exists()


def test_biases_of_the_base_that_both_trained(tmp_path: Path) -> None:
    """`bias="all"` saves the base's biases as they became: they replace, so that different ones have no sum."""
    model = pm.adapted([pm.config(2, 3.0, LINE, bias="all")], Biased)
    (one,) = pm.saved(model, tmp_path / "one")
    with torch.no_grad():
        model.base_model.model.norm.bias.add_(1.0)
    (two,) = pm.saved(model, tmp_path / "two")
    assert any(key.endswith("norm.bias") for key in pm.weights_of(one))
    with pytest.raises(ao.AdapterOpsError, match=r"--saved mean"):
        ao.merge([one, two], tmp_path / "out", "svd")
    ao.merge([one, two], tmp_path / "out", "svd", saved="mean", weights=[1.0, 1.0])
    key = f"{pm.PREFIX}norm.bias"
    wanted = (pm.weights_of(one)[key] + pm.weights_of(two)[key]) / 2
    torch.testing.assert_close(pm.weights_of(tmp_path / "out")[key], wanted)
    assert torch.equal(pm.loaded(tmp_path / "out", Biased).base_model.model.norm.bias.data, wanted)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_tokens_trained_by_one_adapter(order: tuple[int, int], tmp_path: Path) -> None:
    """Each from a model of its own: peft cannot save one of two that do not both train tokens."""
    configs = [pm.config(2, 3.0, ["first"], trainable_token_indices={"embed": [3, 7]}), pm.config(3, 4.0, ["first"])]
    models = [pm.adapted([config]) for config in configs]
    sources = [pm.saved(model, tmp_path / str(n))[0] for n, model in enumerate(models)]
    ao.merge([sources[n] for n in order], tmp_path / "out", "svd", weights=[(0.7, -0.4)[n] for n in order], rank=5)
    key = next(key for key in pm.weights_of(sources[0]) if "token" in key)
    assert torch.equal(pm.weights_of(tmp_path / "out")[key], pm.weights_of(sources[0])[key])
    found = pm.loaded(tmp_path / "out")
    assert found.peft_config["default"].trainable_token_indices == {"embed": [3, 7]}
    wanted = pm.exact(models[0], [0.7])["first"] + pm.exact(models[1], [-0.4])["first"]
    pm.assert_close({"first": pm.deltas(found)["first"]}, {"first": wanted})


def test_different_bases_are_told(tmp_path: Path) -> None:
    model = pm.adapted([pm.config(2, 3.0, LINE), pm.config(2, 3.0, LINE)], pm.Line)
    model.peft_config["a0"].base_model_name_or_path = "org/one"
    model.peft_config["a1"].base_model_name_or_path = "org/two"
    result = ao.merge(pm.saved(model, tmp_path / "in"), tmp_path / "out", "svd")
    assert any("org/one" in note and "org/two" in note for note in result.notes)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/one"


@pytest.mark.parametrize("given", [["head"], r".*head"])
def test_exclude_modules_stay_where_they_take_nothing_away(given: Any, tmp_path: Path) -> None:
    """What `--set` says of the sources and of no tensor is said of the output, too: peft adapts the same modules by it."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line, self.head = nn.Linear(10, 12), nn.Linear(12, 12)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.line(x))  # type: ignore[no-any-return]

    sources = [peft(tmp_path / name, pair(seed, "line"), target_modules=["line"]) for seed, name in enumerate("ab")]
    fields = {"exclude_modules": given}
    ao.merge(sources, tmp_path / "out", "svd", rank=6, fields=fields, reading={"fields": fields})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["exclude_modules"] == given
    assert config["r"] == 6
    model = PeftModel.from_pretrained(Model(), str(tmp_path / "out"))
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert adapted == ["base_model.model.line"]
