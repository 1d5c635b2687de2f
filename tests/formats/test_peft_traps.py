"""What is hard about PEFT folders, each case made by peft, converted, loaded by peft and compared.

Every case is converted twice: with its config, and (where the tensors hold enough) with the config thrown away and
alpha said again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft_models as pm
import pytest
import torch
from adapterops_formats.peft import FORMAT, PEFT
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import adapterops as ao
from adapterops import errors
from adapterops.architectures import Architecture, Component, ModuleSpec
from adapterops.methods import METHODS
from adapterops.plugin import Target

WIDTH = 8
TOKENS = torch.tensor([[1, 2, 3, 4]])


class Tree(nn.Module):
    """A module with children of any names; its forward is the sum of what they make of their input."""

    def __init__(self, children: Mapping[str, Any]) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, Tree(child) if isinstance(child, dict) else child())

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([child(x) for child in self.children()]).sum(0)


def linear(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(WIDTH, WIDTH, **options)


def base_of(tree: Mapping[str, Any]) -> nn.Module:
    return pm.fill(Tree(tree), 7)


def numbers(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)


NAMES = {
    "bar": {"0": {"query": linear()}},
    "foo_bar": {"0": {"query": linear(), "key": linear()}},
    "x": {"bar": {"0": {"query": linear()}}, "bar_0": {"query": linear()}},
    "other": {"0": {"query": linear()}},
}


@dataclass(frozen=True)
class Case:
    """A base, the config of an adapter on it, and an input."""

    base: Callable[[], nn.Module]
    config: Mapping[str, Any]
    given: tuple[Tensor, ...] = (numbers(3, WIDTH),)
    said: Mapping[str, Any] = field(default_factory=dict)
    """What must be said of the adapter without its config, beside alpha."""
    embeddings: bool = False
    alone: bool = True
    """Whether the tensors hold enough to do without the config."""

    def outputs(self, model: nn.Module) -> pm.Outputs:
        with torch.no_grad():
            out = model(*self.given)
        return [out if isinstance(out, Tensor) else out[0]]


def _tree(tree: Mapping[str, Any]) -> Callable[[], nn.Module]:
    return lambda: base_of(tree)


def _gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return pm.fill(GPT2LMHeadModel(config), 7)


def _llama(tied: bool = True) -> nn.Module:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return pm.fill(LlamaForCausalLM(config), 7)


def _bert() -> nn.Module:
    config = BertConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    return pm.fill(BertForSequenceClassification(config), 7)


def _trained_norm() -> nn.Module:
    """A base whose normalisation has seen data, so that its buffers matter."""
    model = base_of({"body": {"query": linear(), "norm": lambda: nn.BatchNorm1d(WIDTH)}})
    model.train()
    model(numbers(6, WIDTH) + 3)
    return model.eval()


CASES: dict[str, Case] = {
    "names that end like others": Case(
        _tree(NAMES), {"r": 2, "lora_alpha": 4, "target_modules": r"(foo_bar|x\.bar|bar)\.0\.query"}
    ),
    "only the shortest of names that end alike": Case(
        _tree(NAMES), {"r": 2, "lora_alpha": 4, "target_modules": r"bar\.0\.query"}
    ),
    "ranks of names that end alike": Case(
        _tree(NAMES),
        {
            "r": 2, "lora_alpha": 4, "target_modules": r"(foo_bar|x\.bar|bar|other)\.0\.query",
            "rank_pattern": {"^bar.0.query": 3, "^foo_bar.0.query": 4, "x.bar.0.query": 5},
        },
    ),
    "alphas of names that end alike": Case(
        _tree(NAMES),
        {
            "r": 2, "lora_alpha": 4, "target_modules": r"(foo_bar|x\.bar|bar|other)\.0\.query",
            "rank_pattern": {"^bar.0.query": 3}, "alpha_pattern": {"^bar.0.query": 5, "x.bar.0.query": 1.5},
        },
        alone=False,
    ),
    "names of tensors as names of modules": Case(
        _tree({
            "weight": linear(), "lora": {"weight": linear()}, "my_lora_B": {"lora_A": linear(), "bias": linear()},
            "base_layer": linear(), "base_model": {"model": linear()}, "lora_magnitude_vector": linear(),
        }),
        {"r": 2, "lora_alpha": 4, "target_modules": ["weight", "lora_A", "base_layer", "model"]},
    ),
    "the adapter's own name": Case(
        _tree({
            "default": {"query": linear()}, "x": {"default": linear(), "default_query": linear()}, "query": linear(),
        }),
        {"r": 2, "lora_alpha": 4, "target_modules": ["default.query", "x.default"]},
    ),
    "saved module": Case(
        _tree({"body": {"query": linear()}, "head": linear(), "other": linear()}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["query"], "modules_to_save": ["head"]},
    ),
    "saved module that holds modules": Case(
        _tree({"body": {"query": linear()}, "head": {"dense": linear(), "out": linear(bias=False)}}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["query"], "modules_to_save": ["head"]},
    ),
    "buffers of a saved module": Case(
        _trained_norm, {"r": 2, "lora_alpha": 4, "target_modules": ["query"], "modules_to_save": ["norm"]},
        (numbers(6, WIDTH),),
    ),
    "fan_in_fan_out": Case(
        _tree({"c_attn": lambda: Conv1D(12, WIDTH), "c_fc": lambda: Conv1D(12, WIDTH)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    ),
    "fan_in_fan_out in GPT-2": Case(
        _gpt2, {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, (TOKENS,)
    ),
    "DoRA on Conv1D": Case(
        _tree({"c_attn": lambda: Conv1D(12, WIDTH)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True},
    ),
    "convolution, 1 dimension": Case(
        _tree({"conv": lambda: nn.Conv1d(3, 5, 3, stride=2), "other": lambda: nn.Conv1d(3, 5, 3, stride=2)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["conv"]}, (numbers(1, 3, 9),),
    ),
    "convolution, 2 dimensions": Case(
        _tree({"conv": lambda: nn.Conv2d(3, 5, (3, 2)), "other": lambda: nn.Conv2d(3, 5, (3, 2))}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["conv"]}, (numbers(1, 3, 5, 5),),
    ),
    "convolution, 3 dimensions": Case(
        _tree({"conv": lambda: nn.Conv3d(3, 5, 2), "other": lambda: nn.Conv3d(3, 5, 2)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["conv"]}, (numbers(1, 3, 4, 4, 4),),
    ),
    "embedding": Case(
        _tree({"tokens": lambda: nn.Embedding(10, WIDTH), "places": lambda: nn.Embedding(10, WIDTH)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["tokens"]}, (TOKENS,),
    ),
    "DoRA": Case(
        _tree({"query": linear(), "key": lambda: nn.Linear(WIDTH, WIDTH)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["query"], "use_dora": True},
    ),
    "DoRA on a convolution": Case(
        _tree({"conv": lambda: nn.Conv2d(3, 5, 3), "other": lambda: nn.Conv2d(3, 5, 3)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["conv"], "use_dora": True}, (numbers(1, 3, 5, 5),),
    ),
    "DoRA on an embedding": Case(
        _tree({"tokens": lambda: nn.Embedding(10, WIDTH)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["tokens"], "use_dora": True}, (TOKENS,),
    ),
    "lora_bias": Case(
        _tree({"query": linear(), "key": linear()}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["query"], "lora_bias": True},
    ),
    "rsLoRA": Case(
        _tree({"query": linear(), "key": linear()}),
        {"r": 4, "lora_alpha": 6, "target_modules": ["query"], "use_rslora": True}, said={"use_rslora": True},
    ),
    "bias of everything": Case(
        _tree({"query": linear(), "norm": lambda: nn.LayerNorm(WIDTH)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["query"], "bias": "all"},
    ),
    "bias of adapted modules": Case(
        _tree({"query": linear(), "norm": lambda: nn.LayerNorm(WIDTH)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["query"], "bias": "lora_only"},
    ),
    "layers_to_transform": Case(
        _llama, {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}, (TOKENS,)
    ),
    "all-linear": Case(_llama, {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}, (TOKENS,)),
    "exclude_modules": Case(
        _llama,
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*v_proj"},
        (TOKENS,),
    ),
    "classifier that peft saves by itself": Case(
        _bert, {"r": 2, "lora_alpha": 4, "target_modules": ["query"], "task_type": "SEQ_CLS"}, (TOKENS,)
    ),
    "adapted embedding, saved too": Case(
        lambda: _llama(tied=False), {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"]}, (TOKENS,),
        embeddings=True,
    ),
    "saved embedding of tied weights": Case(
        _llama, {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, (TOKENS,)
    ),
    "saved embedding and head of tied weights": Case(
        _llama,
        {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        (TOKENS,),
    ),
    "trainable tokens, a list": Case(
        _llama, {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "trainable_token_indices": [2, 3]}, (TOKENS,),
        said={"trainable_token_indices": [2, 3]},
    ),
    "trainable tokens, a table": Case(
        _tree({"tokens": lambda: nn.Embedding(10, WIDTH), "places": lambda: nn.Embedding(10, WIDTH)}),
        {"r": 2, "lora_alpha": 4, "target_modules": ["places"], "trainable_token_indices": {"tokens": [4, 1]}},
        (TOKENS,),
        said={"trainable_token_indices": {"tokens": [4, 1]}},
    ),
}  # fmt: skip


def make(case: Case, folder: Path) -> tuple[Any, Path]:
    """The adapted model of a case, and the folder that peft writes for it."""
    model = pm.trained(case.base(), LoraConfig(**case.config))
    return model, pm.saved(model, folder, save_embedding_layers=case.embeddings)


def alone(folder: Path, target: Path) -> Path:
    """The weights of a folder without their config."""
    return pm.folder_with(target, pm.weights_of(folder)) / "adapter_model.safetensors"


def compare(case: Case, original: Any, folder: Path, converted: Path) -> None:
    """Assert that peft makes of `converted` what it made of `folder`, and that this is `original`."""
    loaded = pm.load(case.base(), converted)
    for look in (pm.adapted, pm.token_wrapped):
        assert look(loaded) == look(original)
    tensors = pm.weights_of(folder)
    pm.same_tensors(pm.weights_of(converted), tensors)
    pm.same_tensors(pm.loaded_tensors(loaded, case.embeddings), tensors)
    expected = case.outputs(original)
    assert pm.apart(expected, case.outputs(case.base())) > 1e-4, "the adapter does nothing, so nothing is shown"
    assert pm.apart(case.outputs(loaded), expected) < 1e-6


@pytest.mark.parametrize("name", CASES)
def test_with_its_config(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    original, folder = make(case, tmp_path / "original")
    ao.convert(folder, to="peft", output=tmp_path / "converted")
    compare(case, original, folder, tmp_path / "converted")
    written = pm.config_of(tmp_path / "converted")
    published = pm.config_of(folder)
    assert {name: written[name] for name in published} == published


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.alone])
def test_with_its_config_thrown_away(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    original, folder = make(case, tmp_path / "original")
    weights = alone(folder, tmp_path / "alone")
    ao.convert(weights, to="peft", output=tmp_path / "converted", alpha=case.config["lora_alpha"], fields=case.said)
    compare(case, original, folder, tmp_path / "converted")
    if "layers_to_transform" not in case.config and "rank_pattern" not in case.config:
        with pytest.raises(errors.UnknownFact, match="--alpha"):
            ao.convert(weights, to="peft", output=tmp_path / "not said", fields=case.said)


def test_alphas_that_differ_can_be_said(tmp_path: Path) -> None:
    case = CASES["alphas of names that end alike"]
    original, folder = make(case, tmp_path / "original")
    said = {"lora_alpha": 4, "alpha_pattern": case.config["alpha_pattern"]}
    ao.convert(alone(folder, tmp_path / "alone"), to="peft", output=tmp_path / "converted", fields=said)
    compare(case, original, folder, tmp_path / "converted")


def test_scale_rule_survives_when_only_the_reader_is_told(tmp_path: Path) -> None:
    case = CASES["rsLoRA"]
    original, folder = make(case, tmp_path / "original")
    adapter = ao.load(alone(folder, tmp_path / "alone"), alpha=6, fields={"use_rslora": True})
    ao.save(adapter, tmp_path / "converted", format="peft")
    compare(case, original, folder, tmp_path / "converted")


@pytest.mark.parametrize("name", CASES)
def test_deltas_are_those_of_peft(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    original, folder = make(case, tmp_path / "original")
    layers = {key.removeprefix(pm.PREFIX): layer for key, layer in original.named_modules()}
    updates = [u for u in ao.load(folder) if u.method == "lora"]
    assert {u.module for u in updates} == pm.adapted(original)
    for update in updates:
        layer = layers[update.module]
        ours = METHODS["lora"].delta(update)
        theirs = layer.get_delta_weight("default")
        if getattr(layer, "fan_in_fan_out", False):
            # peft gives it as Conv1D stores its weight, (in, out); ours is (out, in) whatever the base.
            theirs = theirs.T
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-6)


def _architecture(*names: str, kind: str = "linear") -> Architecture:
    modules = {name: ModuleSpec(name, name, (WIDTH, WIDTH), kind, True, params=("weight", "bias")) for name in names}
    return Architecture("toy", "toy", {"model": Component("model", modules, "toy.Tree", {})}, builtin=False)


def test_targets_are_compact_and_exact_where_the_base_is_known(tmp_path: Path) -> None:
    for targets in (r"(foo_bar|x\.bar|bar)\.0\.query", r"bar\.0\.query", r".*query", r".*\.0\.query"):
        case = Case(_tree(NAMES), {"r": 2, "lora_alpha": 4, "target_modules": targets})
        original, folder = make(case, tmp_path / f"original{len(targets)}")
        adapter = ao.load(alone(folder, tmp_path / f"alone{len(targets)}"), alpha=4)
        leaves = [name for name, module in case.base().named_modules() if isinstance(module, nn.Linear)]
        files = FORMAT.write(adapter, Target(PEFT, _architecture(*leaves))).files
        config = next(file.text for file in files if file.text)
        converted = pm.folder_with(tmp_path / f"converted{len(targets)}", pm.weights_of(folder))
        (converted / "adapter_config.json").write_text(config)
        compare(case, original, folder, converted)
        # A whole name at the root is an ending of others too, and no list can say "only that one".
        written = pm.config_of(converted)["target_modules"]
        assert isinstance(written, str) == (targets == r"bar\.0\.query")


def test_saved_module_whose_name_ends_another_is_refused(tmp_path: Path) -> None:
    tree = {"body": {"query": linear()}, "head": linear()}
    case = Case(_tree(tree), {"r": 2, "lora_alpha": 4, "target_modules": ["query"], "modules_to_save": ["head"]})
    _, folder = make(case, tmp_path / "original")
    adapter = ao.load(folder)
    FORMAT.write(adapter, Target(PEFT, _architecture("body.query", "head")))
    with pytest.raises(errors.CannotRepresent, match=r"head is saved.*lm_head"):
        FORMAT.write(adapter, Target(PEFT, _architecture("body.query", "head", "lm_head")))
    with pytest.raises(errors.CannotRepresent, match=r"head is saved.*x\.overhead"):
        FORMAT.write(adapter, Target(PEFT, _architecture("body.query", "head", "x.overhead.query")))


@pytest.mark.parametrize(
    ("module", "message"),
    [("x.head.q", r"head is saved.*take x\.head,"), ("head.q", r"head\.q is adapted, but its name")],
)
def test_saved_module_in_the_way_of_an_adapted_one_is_refused(module: str, message: str, tmp_path: Path) -> None:
    """peft itself cannot write such a file, but another writer's tensors can say it."""
    factors = {f"{pm.PREFIX}{module}.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    folder = pm.folder_with(tmp_path / "made", {**factors, f"{pm.PREFIX}head.weight": torch.ones(2, 2)})
    with pytest.raises(errors.CannotRepresent, match=message):
        ao.convert(folder, to="peft", output=tmp_path / "converted", alpha=4)
    assert not (tmp_path / "converted").exists()


def test_trainable_tokens_need_their_indices(tmp_path: Path) -> None:
    _, folder = make(CASES["trainable tokens, a list"], tmp_path / "original")
    weights = alone(folder, tmp_path / "alone")
    with pytest.raises(errors.UnknownFact, match=r"embed_tokens.*--set trainable_token_indices"):
        ao.convert(weights, to="peft", output=tmp_path / "converted", alpha=4)
    with pytest.raises(errors.BrokenAdapter, match="2 rows, but trainable_token_indices lists 3"):
        ao.convert(
            weights, to="peft", output=tmp_path / "converted", alpha=4, fields={"trainable_token_indices": [1, 2, 3]}
        )
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("known", [False, True])
def test_fan_in_fan_out_with_its_base(known: bool, tmp_path: Path) -> None:
    case = CASES["fan_in_fan_out in GPT-2"]
    original, folder = make(case, tmp_path / "original")
    base: Any = case.base()
    base.config.architectures = ["GPT2LMHeadModel"]
    base.config.save_pretrained(tmp_path / "base")
    weights = alone(folder, tmp_path / "alone")
    options = {"base": tmp_path / "base"} if known else {}
    ao.convert(weights, to="peft", output=tmp_path / "converted", alpha=4, **options)
    compare(case, original, folder, tmp_path / "converted")
    assert pm.config_of(tmp_path / "converted")["fan_in_fan_out"] is known


# ---- keys as people leave them --------------------------------------------------------------------------------


def _renamed(key: str, adapter: str) -> str:
    """A key with the adapter's name left in, as in the model's own state dict."""
    for stem in (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector"):
        key = key.replace(stem, f"{stem}.{adapter}")
    return key + ".weight" if key.endswith(f"lora_magnitude_vector.{adapter}") else key


SPELLINGS: dict[str, Callable[[str], str]] = {
    "adapter name": lambda key: _renamed(key, "default"),
    "another adapter name": lambda key: _renamed(key, "my_adapter"),
    "prefix twice": lambda key: pm.PREFIX + key,
    "no prefix": lambda key: key.removeprefix(pm.PREFIX),
    "compiled": lambda key: "_orig_mod." + key,
    "wrapped": lambda key: "module." + key,
    "compiled, with the adapter's name": lambda key: "_orig_mod." + _renamed(key, "default"),
}


@pytest.mark.parametrize("name", ["saved module", "DoRA", "embedding", "the adapter's own name", "lora_bias"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(name: str, spelling: str, tmp_path: Path) -> None:
    case = CASES[name]
    original, folder = make(case, tmp_path / "original")
    respelled = {SPELLINGS[spelling](key): tensor for key, tensor in pm.weights_of(folder).items()}
    for config in (pm.config_of(folder), None):
        source = pm.folder_with(tmp_path / f"respelled {config is None}", respelled, config)
        out = tmp_path / f"converted {config is None}"
        result = ao.convert(source, to="peft", output=out, alpha=None if config else 4)
        if spelling == "no prefix" and name == "saved module" and config is None:
            # Then nothing tells the saved module's keys from any other writer's: they are read as somebody's own.
            assert result.source_dialect == "handmade-straight"
        compare(case, original, folder, out)


def test_state_dict_with_wrappers_of_saved_modules(tmp_path: Path) -> None:
    """A state dict saved by hand has each saved module twice: the trained one, and the base's."""
    case = CASES["saved module that holds modules"]
    original, folder = make(case, tmp_path / "original")
    state = {k: v for k, v in original.state_dict().items() if "lora_" in k or "modules_to_save" in k}
    source = pm.folder_with(tmp_path / "by hand", state)
    ao.convert(source, to="peft", output=tmp_path / "converted", alpha=4)
    compare(case, original, folder, tmp_path / "converted")

    whole = {k: v for k, v in original.state_dict().items() if k in state or "original_module" in k}
    source = pm.folder_with(tmp_path / "whole", whole)
    result = ao.convert(source, to="peft", output=tmp_path / "without", alpha=4)
    assert any("original_module" in note and "left out" in note for note in result.notes)
    compare(case, original, folder, tmp_path / "without")
    lone = {k: v for k, v in whole.items() if "modules_to_save" not in k}
    with pytest.raises(errors.UnsupportedFormat, match=r"original_module.*--allow-drop"):
        ao.convert(pm.folder_with(tmp_path / "lone", lone), to="peft", output=tmp_path / "refused", alpha=4)


@pytest.mark.parametrize("extra", ["model.", "language_model.model.", "-"])
def test_leading_segments_by_the_base(extra: str, tmp_path: Path) -> None:
    """Wrappers add segments and class versions lose some; the base's own modules say which."""
    case = Case(_llama, {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}, (TOKENS,))
    original, folder = make(case, tmp_path / "original")

    def respell(key: str) -> str:
        name = key.removeprefix(pm.PREFIX)
        return pm.PREFIX + (name.removeprefix("model.") if extra == "-" else extra + name)

    source = pm.folder_with(tmp_path / "respelled", {respell(k): v for k, v in pm.weights_of(folder).items()})
    base: Any = case.base()
    base.config.architectures = ["LlamaForCausalLM"]
    base.config.save_pretrained(tmp_path / "base")
    result = ao.convert(source, to="peft", output=tmp_path / "converted", alpha=4, base=tmp_path / "base")
    assert any("module names are" in note for note in result.notes)
    compare(case, original, folder, tmp_path / "converted")


# ---- configs --------------------------------------------------------------------------------------------------


PLAIN = Case(
    _tree({"query": linear(), "key": linear(), "value": linear()}),
    {"r": 4, "lora_alpha": 4, "target_modules": ["query", "key"]},
)


@pytest.mark.parametrize(
    "extra",
    [
        {"a_field_of_peft_1_0": None, "another": False, "peft_version": "1.0.0"},
        {"loftq_config": {}, "megatron_core": "megatron.core", "revision": "abc"},
        {"task_type": "FEATURE_EXTRACTION", "base_model_name_or_path": "some/where", "lora_dropout": 0.25},
        {"auto_mapping": {"base_model_class": "Tree", "parent_library": "toys"}, "inference_mode": False},
    ],
)
def test_other_fields_of_a_config_travel(extra: dict[str, Any], tmp_path: Path) -> None:
    original, folder = make(PLAIN, tmp_path / "original")
    config = {**pm.config_of(folder), **extra}
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), config)
    ao.convert(source, to="peft", output=tmp_path / "converted")
    written = pm.config_of(tmp_path / "converted")
    assert {name: written[name] for name in config} == config
    if extra.get("task_type") is None:
        compare(PLAIN, original, folder, tmp_path / "converted")


def test_field_of_a_later_peft_that_says_something_is_refused(tmp_path: Path) -> None:
    _, folder = make(PLAIN, tmp_path / "original")
    config = {**pm.config_of(folder), "a_field_of_peft_1_0": {"new": True}}
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), config)
    with pytest.raises(
        errors.UnsupportedFormat,
        match=r"adapter_config.json: a_field_of_peft_1_0 is .*--set a_field_of_peft_1_0=null takes it out",
    ):
        ao.convert(source, to="peft", output=tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_config_of_an_old_peft(tmp_path: Path) -> None:
    """peft 0.3 knew neither patterns nor rsLoRA; what it does not say is what it meant."""
    original, folder = make(PLAIN, tmp_path / "original")
    old = ("r", "lora_alpha", "target_modules", "peft_type", "task_type", "fan_in_fan_out", "bias")
    config = {name: value for name, value in pm.config_of(folder).items() if name in old}
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), config)
    ao.convert(source, to="peft", output=tmp_path / "converted")
    compare(PLAIN, original, folder, tmp_path / "converted")


DORA = Case(PLAIN.base, {**PLAIN.config, "use_dora": True})
CONTRADICTIONS: dict[str, tuple[Case, dict[str, Any], type[Exception], str, dict[str, Any]]] = {
    "rank": (PLAIN, {"r": 8}, errors.Conflict, "has rank 4, but .* says 8 .*--set r=4", {"r": 4}),
    "rank of one": (
        PLAIN, {"rank_pattern": {"key": 2}}, errors.Conflict, "key.* has rank 4, but .* says 2 .*--set rank_pattern",
        {"rank_pattern": {}},
    ),
    "DoRA not there": (
        PLAIN, {"use_dora": True}, errors.Conflict, "has no magnitude, but .*--set use_dora=false", {"use_dora": False},
    ),
    "DoRA not said": (
        DORA, {"use_dora": False}, errors.Conflict, "has a magnitude, but .*--set use_dora=true", {"use_dora": True},
    ),
    "bias not there": (
        PLAIN, {"lora_bias": True}, errors.Conflict, "has no bias, but .*--set lora_bias=false", {"lora_bias": False},
    ),
    "target missed": (
        PLAIN, {"target_modules": ["query"]}, errors.Conflict, "key.*targets no such module.*--set target_modules=null",
        {"target_modules": None},
    ),
    "target excluded": (
        PLAIN, {"exclude_modules": ["key"]}, errors.Conflict, "key.*targets no such module", {"target_modules": None},
    ),
    "target in no such layer": (
        PLAIN, {"layers_to_transform": [3]}, errors.Conflict, "targets no such module", {"target_modules": None},
    ),
    "rank of the wrong type": (PLAIN, {"r": "8"}, errors.UnreadableFile, 'r is "8", not a positive number', {"r": 4}),
    "rank 0": (PLAIN, {"r": 0}, errors.UnreadableFile, "r is 0, not a positive number", {"r": 4}),
    "alpha of the wrong type": (
        PLAIN, {"lora_alpha": [4]}, errors.UnreadableFile, "lora_alpha is .4., not a number", {"lora_alpha": 4},
    ),
    "alpha not a number": (
        PLAIN, {"lora_alpha": float("nan")}, errors.UnreadableFile, "lora_alpha is NaN, not a number",
        {"lora_alpha": 4},
    ),
    "pattern of the wrong type": (
        PLAIN, {"alpha_pattern": {"key": "2"}}, errors.UnreadableFile, "alpha_pattern.*not a number",
        {"alpha_pattern": {}},
    ),
    "pattern broken": (
        PLAIN, {"rank_pattern": {"(key": 2}}, errors.UnreadableFile, "rank_pattern.*regular expression",
        {"rank_pattern": {}},
    ),
    "targets of the wrong type": (
        PLAIN, {"target_modules": {"query": 1}}, errors.UnreadableFile, "target_modules is .*, not a list",
        {"target_modules": None},
    ),
    "targets broken": (
        PLAIN, {"target_modules": "(query"}, errors.UnreadableFile, "target_modules.*regular expression",
        {"target_modules": None},
    ),
    "saved modules of the wrong type": (
        PLAIN, {"modules_to_save": "head"}, errors.UnreadableFile, "modules_to_save is", {"modules_to_save": None},
    ),
    "layers of the wrong type": (
        PLAIN, {"layers_to_transform": "1"}, errors.UnreadableFile, "layers_to_transform is",
        {"layers_to_transform": None},
    ),
    "flag of the wrong type": (
        PLAIN, {"use_rslora": "no"}, errors.UnreadableFile, "use_rslora is", {"use_rslora": False},
    ),
    "bare parameters": (PLAIN, {"target_parameters": ["x"]}, errors.Conflict, "target_parameters", {"target_parameters": None}),
    "another method": (
        PLAIN, {"peft_type": "LOHA"}, errors.Conflict, "tensor of LoRA, but .* peft_type LOHA.*--set peft_type=LORA",
        {"peft_type": "LORA"},
    ),
    "a fork's method": (
        PLAIN, {"peft_type": "VERRA"}, errors.UnsupportedFormat,
        "VERRA, .*tensors are LoRA's.*--set peft_type=LORA", {"peft_type": "LORA"},
    ),
    "no known method": (PLAIN, {"peft_type": "MAGIC"}, errors.UnsupportedFormat, "peft_type is MAGIC", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradiction_is_shown_with_its_remedy(name: str, tmp_path: Path) -> None:
    case, wrong, error, message, remedy = CONTRADICTIONS[name]
    original, folder = make(case, tmp_path / "original")
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), {**pm.config_of(folder), **wrong})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=message) as refusal:
        ao.convert(source, to="peft", output=tmp_path / "converted")
    assert str(source) in str(refusal.value)
    assert sorted(tmp_path.iterdir()) == before
    if remedy:
        ao.convert(source, to="peft", output=tmp_path / "converted", fields=remedy)
        compare(case, original, folder, tmp_path / "converted")


def test_alpha_that_contradicts_the_config(tmp_path: Path) -> None:
    _, folder = make(PLAIN, tmp_path / "original")
    with pytest.raises(errors.Conflict, match=r"--alpha 8, but the file says 4"):
        ao.convert(folder, to="peft", output=tmp_path / "converted", alpha=8)
    ao.convert(folder, to="peft", output=tmp_path / "converted", alpha=4)


def test_config_without_alpha_is_not_guessed(tmp_path: Path) -> None:
    original, folder = make(PLAIN, tmp_path / "original")
    config = {k: v for k, v in pm.config_of(folder).items() if k != "lora_alpha"}
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), config)
    with pytest.raises(errors.UnknownFact, match=r"says no lora_alpha.*--alpha"):
        ao.convert(source, to="peft", output=tmp_path / "refused")
    for options in ({"alpha": 4}, {"fields": {"lora_alpha": 4}}):
        ao.convert(source, to="peft", output=tmp_path / "converted", overwrite=True, **options)
        compare(PLAIN, original, folder, tmp_path / "converted")


def test_mixed_adapter_has_no_config(tmp_path: Path) -> None:
    """A PEFT config says `use_dora` for all modules or none."""
    _, folder = make(DORA, tmp_path / "original")
    tensors = copy.copy(pm.weights_of(folder))
    del tensors[f"{pm.PREFIX}key.lora_magnitude_vector"]
    with pytest.raises(errors.CannotRepresent, match=r"query has a magnitude and .*key has none.*use_dora"):
        ao.convert(pm.folder_with(tmp_path / "source", tensors), to="peft", output=tmp_path / "converted", alpha=4)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("weight", ["score.weight", "score.base_layer.weight"])  # peft 0.6, and 0.8 to 0.12
@pytest.mark.parametrize("repair", [False, True])
def test_a_head_that_an_early_peft_wrapped_twice_is_not_guessed_at(weight: str, repair: bool, tmp_path: Path) -> None:
    """What `PeftModelForSequenceClassification` saved with target_modules ["q_proj", "score"]: today's peft loads no head."""
    folder = tmp_path / "twice"
    folder.mkdir()
    keys = ["q_proj", *(f"score{part}" for part in ("", ".modules_to_save", ".original_module"))]
    tensors = {
        f"base_model.model.{key}.lora_{role}.weight": torch.ones(2, WIDTH) if role == "A" else torch.ones(WIDTH, 2)
        for key in keys
        for role in "AB"
    }
    save_file(tensors | {f"base_model.model.{weight}": torch.ones(WIDTH, WIDTH)}, folder / "adapter_model.safetensors")
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "score"], task_type="SEQ_CLS")
    config.save_pretrained(folder)
    base = base_of({"q_proj": linear(bias=False), "score": linear(bias=False)})
    if "base_layer" in weight:
        with pytest.raises(KeyError, match=r"score\.weight"):
            PeftModel.from_pretrained(base, str(folder))
    else:
        loaded = PeftModel.from_pretrained(base, str(folder))
        assert not any("score" in name and "lora_" in name for name, _ in loaded.named_parameters())
    with pytest.raises(errors.UnsupportedFormat, match=r"modules_to_save.lora_A.*save this sum as score\.weight"):
        ao.convert(folder, "peft", tmp_path / "out", repair=repair)
    assert not (tmp_path / "out").exists()
