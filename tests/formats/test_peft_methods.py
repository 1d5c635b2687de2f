"""LoHa, LoKr and (IA)³ in PEFT folders, each case made by peft, converted, loaded by peft and compared.

Every case is converted with its config, with the config made again from what the adapter says, and (where the tensors
hold enough) with the config thrown away and alpha said again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import peft_models as pm
import pytest
import torch
from adapterops_formats.peft_lokr import factors
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import adapterops as ao
from adapterops import errors
from adapterops.adapter import Adapter, Certainty, Fact, Update
from adapterops.architectures import Architecture, Component
from adapterops.architectures.listing import list_modules
from adapterops.methods import METHODS
from adapterops.storage.tensor import LazyTensor, MemorySource

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.tensor([[1, 2, 3, 4]])


class Net(nn.Module):
    """Convolutions and linear layers in a row; `other` is the neighbour that must stay alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 12, 3)
        self.point = nn.Conv2d(12, 16, 1)
        self.square = nn.Conv2d(16, 16, 3)
        self.line = nn.Conv1d(16, 12, 3)
        self.dense = nn.Linear(12, 24)
        self.out = nn.Linear(24, 16)
        self.other = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.square(self.point(self.conv(x).tanh()).tanh()).tanh().flatten(2)
        return self.other(self.out(self.dense(self.line(x).tanh().mean(-1)).tanh()).tanh())


def net() -> nn.Module:
    return pm.fill(Net(), 7)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return pm.fill(LlamaForCausalLM(config), 7)


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    return pm.fill(GPT2LMHeadModel(config), 7)


class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv3d(3, 5, 2), nn.Conv3d(5, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.conv(x))


def picture() -> Tensor:
    return torch.linspace(-1, 1, 8 * 8 * 8).view(1, 8, 8, 8)


@dataclass(frozen=True)
class Case:
    """A base, the config of an adapter on it, and an input."""

    base: Callable[[], nn.Module]
    config: Any
    given: Tensor = TOKENS
    said: Mapping[str, Any] = field(default_factory=dict)
    """What must be said of the adapter without its config, beside alpha."""
    alone: bool = True
    """Whether the tensors hold enough to do without the config."""

    @property
    def alpha(self) -> float | None:
        return getattr(self.config, "alpha", None)

    def outputs(self, model: nn.Module) -> pm.Outputs:
        with torch.no_grad():
            out = model(self.given)
        return [out if isinstance(out, Tensor) else out[0]]


FLAT = ["conv", "point", "square", "dense", "out"]
ALL = [*FLAT, "line"]
CASES: dict[str, Case] = {
    "loha": Case(llama, peft.LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "down_proj"])),
    "loha, patterns": Case(
        llama,
        peft.LoHaConfig(
            r=3, alpha=5, target_modules=["q_proj", "down_proj", "up_proj"],
            rank_pattern={"down_proj": 2, r"model\.layers\.1\..*q_proj": 4}, alpha_pattern={"up_proj": 1.5},
        ),
        alone=False,
    ),
    "loha, one layer": Case(
        llama, peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj", "v_proj"], layers_to_transform=[1])
    ),
    "loha, saved module": Case(
        llama, peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
    "loha, convolutions": Case(net, peft.LoHaConfig(r=3, alpha=4, target_modules=ALL), picture()),
    "loha, cores": Case(
        net, peft.LoHaConfig(r=3, alpha=4, target_modules=ALL, use_effective_conv2d=True), picture()
    ),
    "lokr": Case(llama, peft.LoKrConfig(r=1, alpha=3, target_modules=["q_proj", "down_proj"])),
    "lokr, one layer": Case(
        llama,
        peft.LoKrConfig(r=1, alpha=3, target_modules=["down_proj"], exclude_modules=r".*\.0\..*", decompose_both=True),
    ),
    "lokr, saved module": Case(
        llama, peft.LoKrConfig(r=1, alpha=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
    "lokr, patterns": Case(
        llama,
        peft.LoKrConfig(
            r=1, alpha=2, target_modules=["q_proj", "v_proj", "down_proj"], decompose_factor=2,
            rank_pattern={"q_proj": 3, "v_proj": 16}, alpha_pattern={"down_proj": 5, "v_proj": 7},
        ),
        alone=False,
    ),
    "lokr, whole factors": Case(
        llama, peft.LoKrConfig(r=8, alpha=3, target_modules=["q_proj", "up_proj"]), said={"r": 8}
    ),
    "lokr, whole factors at scale 1": Case(
        llama, peft.LoKrConfig(r=9, alpha=9, target_modules=["q_proj", "up_proj"]), said={"r": 9}
    ),
    "lokr, whole factors of convolutions": Case(
        net, peft.LoKrConfig(r=16, alpha=20, target_modules=FLAT, decompose_factor=4), picture(), said={"r": 16}
    ),
    "lokr, a core in one dimension": Case(
        net,
        peft.LoKrConfig(r=2, alpha=2, target_modules=["line"], use_effective_conv2d=True, decompose_factor=2),
        picture(),
    ),
    "lokr, one dimension": Case(net, peft.LoKrConfig(r=1, alpha=2, target_modules=["line"]), picture()),
    "ia3": Case(
        llama, peft.IA3Config(target_modules=["q_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    ),
    "ia3, no feedforward": Case(llama, peft.IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=[])),
    "ia3, feedforward only": Case(
        llama, peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    ),
    "ia3, a pattern": Case(
        llama,
        peft.IA3Config(
            target_modules=r".*\.(0\.self_attn\.q_proj|1\.mlp\.(up|down)_proj)",
            feedforward_modules=r".*\.1\.mlp\.down_proj",
        ),
    ),
    "ia3, saved module": Case(
        llama,
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], modules_to_save=["lm_head"]),
    ),
    "ia3, transposed": Case(
        gpt2,
        peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    ),
    "ia3, convolutions": Case(
        net,
        peft.IA3Config(target_modules=["conv", "point", "square", "out"], feedforward_modules=["point", "square"]),
        picture(), said={"feedforward_modules": ["point", "square"]},
    ),
    "ia3, volume": Case(
        lambda: pm.fill(Volume(), 7), peft.IA3Config(target_modules=["conv"], feedforward_modules=["conv"]),
        torch.linspace(-1, 1, 81).view(1, 3, 3, 3, 3), said={"feedforward_modules": ["conv"]},
    ),
    **{
        f"lokr, r {r}, both {both}, core {core}, factor {factor}": Case(
            net,
            peft.LoKrConfig(
                r=r, alpha=3, target_modules=FLAT, decompose_both=both, use_effective_conv2d=core, decompose_factor=factor
            ),
            picture(),
            # At r 2 some factors are whole.
            said={"r": r},
        )
        for r in (1, 2)
        for both in (False, True)
        for core in (False, True)
        for factor in (-1, 4)
    },
}  # fmt: skip


def make(case: Case, folder: Path) -> tuple[Any, Path]:
    """The adapted model of a case, and the folder that peft writes for it."""
    base = case.base()
    untouched = {id(parameter) for parameter in base.parameters()}
    model = peft.get_peft_model(base, replace(case.config))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if id(parameter) not in untouched:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval(), pm.saved(model, folder, save_embedding_layers=False)


def alone(folder: Path, target: Path) -> Path:
    """The weights of a folder without their config."""
    return pm.folder_with(target, pm.weights_of(folder)) / "adapter_model.safetensors"


def compare(case: Case, original: Any, folder: Path, converted: Path) -> None:
    """Assert that peft makes of `converted` what it made of `folder`, and that this is `original`."""
    loaded = pm.load(case.base(), converted)
    assert pm.adapted(loaded) == pm.adapted(original)
    assert pm.wrapped(loaded) == pm.wrapped(original)
    tensors, written = pm.weights_of(folder), pm.weights_of(converted)
    pm.same_tensors(written, tensors)
    assert {k: t.shape for k, t in written.items()} == {k: t.shape for k, t in tensors.items()}
    pm.same_tensors(pm.loaded_tensors(loaded), tensors)
    expected = case.outputs(original)
    assert pm.apart(expected, case.outputs(case.base())) > 1e-4, "the adapter does nothing, so nothing is shown"
    assert pm.apart(case.outputs(loaded), expected) < 1e-6


def architecture_of(model: nn.Module) -> Architecture:
    """A base model's table, as `--base` makes it."""
    modules = list_modules(model)
    bare = frozenset(name for name, _ in model.named_modules() if name not in modules)
    component = Component("model", modules, "tests.Model", {}, bare)
    return Architecture("custom", "custom", {"model": component}, builtin=False)


@pytest.mark.parametrize("name", CASES)
def test_with_its_config(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    original, folder = make(case, tmp_path / "original")
    result = ao.convert(folder, to="peft", output=tmp_path / "converted")
    assert result.proof is not None
    assert result.proof.exact
    compare(case, original, folder, tmp_path / "converted")
    written, published = pm.config_of(tmp_path / "converted"), pm.config_of(folder)
    assert {name: written[name] for name in published} == published


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_config_made_again(name: str, known: bool, tmp_path: Path) -> None:
    """As an adapter from another format comes: with every fact, but without a config."""
    case = CASES[name]
    original, folder = make(case, tmp_path / "original")
    adapter = replace(ao.load(folder), config={}, base=architecture_of(case.base()) if known else None)
    ao.save(adapter, tmp_path / "converted", format="peft")
    compare(case, original, folder, tmp_path / "converted")
    if known and name in ("ia3", "loha", "lokr"):
        written = pm.config_of(tmp_path / "converted")
        assert sorted(written["target_modules"]) == sorted(case.config.target_modules)
        if name == "ia3":
            assert written["feedforward_modules"] == ["down_proj"]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.alone])
def test_with_its_config_thrown_away(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    original, folder = make(case, tmp_path / "original")
    weights = alone(folder, tmp_path / "alone")
    ao.convert(weights, to="peft", output=tmp_path / "converted", alpha=case.alpha, fields=case.said)
    compare(case, original, folder, tmp_path / "converted")
    if case.alpha is not None:
        with pytest.raises(errors.UnknownFact, match=r"PEFT stores no alpha among the tensors.*--alpha") as refusal:
            ao.convert(weights, to="peft", output=tmp_path / "not said")
        assert str(weights) in str(refusal.value)
        assert not (tmp_path / "not said").exists()


def test_rank_of_whole_factors_is_not_guessed(tmp_path: Path) -> None:
    _, folder = make(CASES["lokr, whole factors"], tmp_path / "original")
    weights = alone(folder, tmp_path / "alone")
    with pytest.raises(errors.UnknownFact, match=r"lokr_w1.*alpha / r.*--set r=R"):
        ao.convert(weights, to="peft", output=tmp_path / "converted", alpha=3)


def test_inputs_or_outputs_of_a_convolution_are_not_guessed(tmp_path: Path) -> None:
    _, folder = make(CASES["ia3, convolutions"], tmp_path / "original")
    weights = alone(folder, tmp_path / "alone")
    with pytest.raises(errors.UnknownFact, match=r"ia3_l.*does not tell.*--set feedforward_modules="):
        ao.convert(weights, to="peft", output=tmp_path / "converted")


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("ia3")])
def test_deltas_are_those_of_peft(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    original, folder = make(case, tmp_path / "original")
    layers = {key.removeprefix(pm.PREFIX): layer for key, layer in original.named_modules()}
    updates = [u for u in ao.load(folder) if u.method != "saved"]
    assert {u.module for u in updates} == pm.adapted(original)
    for update in updates:
        theirs = layers[update.module].get_delta_weight("default")
        ours = METHODS[update.method].delta(update)
        assert torch.allclose(ours.reshape(theirs.shape), theirs, atol=1e-6)


@pytest.mark.parametrize("adapter", ["default", "my_adapter"])
@pytest.mark.parametrize("name", ["loha, cores", "lokr, r 1, both True, core True, factor -1", "ia3, saved module"])
def test_adapter_name_in_keys(name: str, adapter: str, tmp_path: Path) -> None:
    case = CASES[name]
    original, folder = make(case, tmp_path / "original")
    own = ("hada_", "lokr_", "ia3_")
    respelled = {
        f"{key}.{adapter}" if key.rpartition(".")[2].startswith(own) else key: tensor
        for key, tensor in pm.weights_of(folder).items()
    }
    for config in (pm.config_of(folder), None):
        source = pm.folder_with(tmp_path / f"respelled {config is None}", respelled, config)
        out = tmp_path / f"converted {config is None}"
        ao.convert(source, to="peft", output=out, alpha=None if config else case.alpha)
        compare(case, original, folder, out)


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], type[Exception], str, dict[str, Any]]] = {
    "another method": (
        "loha", {"peft_type": "LOKR"}, errors.Conflict, "tensor of LoHa, but .* peft_type LOKR.*--set peft_type=LOHA",
        {"peft_type": "LOHA"},
    ),
    "LoRA": ("ia3", {"peft_type": "LORA"}, errors.Conflict, "peft_type LORA", {"peft_type": "IA3"}),
    "a fork's": ("loha", {"peft_type": "FINEGATES"}, errors.UnsupportedFormat, "peft_type is FINEGATES, .*a fork's", {}),
    "rank": ("loha", {"r": 4}, errors.Conflict, "has rank 3, but .* says 4 .*--set r=3", {"r": 3}),
    "alpha of the wrong type": ("loha", {"alpha": "x"}, errors.UnreadableFile, "alpha is .x., not a number", {"alpha": 5}),
    "cores not said": (
        "loha, cores", {"use_effective_conv2d": False}, errors.Conflict,
        "conv.*Tucker core, but .*--set use_effective_conv2d=null", {"use_effective_conv2d": None},
    ),
    "cut otherwise": (
        "lokr", {"decompose_factor": 2}, errors.Conflict, "factors are 4×4 .*decompose_factor=2.*=null",
        {"decompose_factor": None},
    ),
    "decomposed otherwise": (
        "lokr, one layer", {"decompose_both": False}, errors.Conflict, "w1 of .* is decomposed.*decompose_both=null",
        {"decompose_both": None},
    ),
    "whole otherwise": ("lokr, whole factors", {"r": 1}, errors.Conflict, "w2 of .* is whole", {"r": 8}),
    "factor of the wrong type": (
        "lokr", {"decompose_factor": 2.5}, errors.UnreadableFile, "decompose_factor is 2.5, not", {"decompose_factor": -1},
    ),
    "outputs for inputs": (
        "ia3", {"feedforward_modules": []}, errors.Conflict, r"\[1, 24\] multiplies .*inputs.*feedforward_modules=null",
        {"feedforward_modules": None},
    ),
    "inputs for outputs": (
        "ia3", {"feedforward_modules": ["q_proj"]}, errors.Conflict, "feedforward_modules", {"feedforward_modules": None},
    ),
    "feedforward of the wrong type": (
        "ia3", {"feedforward_modules": 3}, errors.UnreadableFile, "feedforward_modules is 3", {"feedforward_modules": None},
    ),
    "target missed": (
        "ia3", {"target_modules": ["q_proj"]}, errors.Conflict, "targets no such module", {"target_modules": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_contradiction_is_shown_with_its_remedy(what: str, tmp_path: Path) -> None:
    name, wrong, error, message, remedy = CONTRADICTIONS[what]
    case = CASES[name]
    original, folder = make(case, tmp_path / "original")
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), {**pm.config_of(folder), **wrong})
    with pytest.raises(error, match=message) as refusal:
        ao.convert(source, to="peft", output=tmp_path / "converted")
    assert str(source) in str(refusal.value)
    assert not (tmp_path / "converted").exists()
    if remedy:
        ao.convert(source, to="peft", output=tmp_path / "converted", fields=remedy)
        compare(case, original, folder, tmp_path / "converted")


def test_feedforward_that_a_config_leaves_to_the_model_is_said(tmp_path: Path) -> None:
    """peft would look it up by the model's type, which the file does not hold."""
    case = CASES["ia3"]
    original, folder = make(case, tmp_path / "original")
    config = {k: v for k, v in pm.config_of(folder).items() if k != "feedforward_modules"}
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), config)
    ao.convert(source, to="peft", output=tmp_path / "converted")
    compare(case, original, folder, tmp_path / "converted")


def test_more_modules_of_the_base_are_left_alone(tmp_path: Path) -> None:
    """A base with modules that the config's endings would take too: targets and inputs are made anew together."""
    case = CASES["ia3, a pattern"]
    original, folder = make(case, tmp_path / "original")
    loose = {**pm.config_of(folder), "target_modules": ["q_proj", "up_proj", "down_proj"]}
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), {**loose, "feedforward_modules": ["down_proj"]})
    adapter = replace(ao.load(source), base=architecture_of(case.base()))
    result = ao.save(adapter, tmp_path / "converted", format="peft")
    assert any("target_modules is made anew" in note for note in result.notes)
    compare(case, original, folder, tmp_path / "converted")


def test_fields_are_those_of_the_method(tmp_path: Path) -> None:
    _, folder = make(CASES["loha"], tmp_path / "original")
    for name in ("lora_alpha", "decompose_both", "feedforward_modules"):
        with pytest.raises(errors.UsageError, match=f"--set {name}: PEFT's LoHa config has no such field"):
            ao.convert(folder, to="peft", output=tmp_path / "converted", fields={name: 1})


def test_whole_factor_in_one_dimension_is_refused(tmp_path: Path) -> None:
    """peft multiplies it along the wrong axes."""
    case = Case(net, peft.LoKrConfig(r=16, alpha=4, target_modules=["line"]), picture())
    _, folder = make(case, tmp_path / "original")
    with pytest.raises(errors.UnsupportedFormat, match=r"line\.lokr_w2.*wrong axes"):
        ao.convert(folder, to="peft", output=tmp_path / "converted")


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 320, 360, 768, 1024, 3072, 11008])
def test_factors_are_those_of_peft(size: int) -> None:
    tried = (-1, *range(1, 40), 128, 4000)
    assert [factors(size, f) for f in tried] == [factorization(size, f) for f in tried]


# ---- from LyCORIS ---------------------------------------------------------------------------------------------


def lazy(key: str, tensor: Tensor) -> LazyTensor:
    data = tensor.detach().contiguous().float().numpy().tobytes()
    return LazyTensor(key, "F32", tuple(tensor.shape), MemorySource(data), 0)


def from_lycoris(layers: Mapping[str, nn.Module], kind: Any, **options: Any) -> Adapter:
    """The adapter that LyCORIS makes for these layers, with noise in every tensor."""
    generator, updates = torch.Generator().manual_seed(2), []
    for name, layer in layers.items():
        module = kind(name, layer, alpha=3, **options)
        for parameter in module.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        state = module.state_dict()
        alpha = float(state.pop("alpha"))
        tensors = {key.partition("_")[2]: lazy(f"{name}.{key}", t) for key, t in state.items() if "_" in key}
        method = "loha" if kind is LohaModule else "lokr"
        updates.append(Update("model", name, method, tensors, Fact(alpha, Certainty.READ, "alpha")))
    return Adapter({u.key: u for u in updates}, Fact(None, Certainty.UNKNOWN))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (LohaModule, {"lora_dim": 2}),
        (LohaModule, {"lora_dim": 2, "use_tucker": True}),
        (LokrModule, {"lora_dim": 1}),
        (LokrModule, {"lora_dim": 1, "use_tucker": True}),
        (LokrModule, {"lora_dim": 1, "decompose_both": True, "factor": 4}),
        (LokrModule, {"lora_dim": 1, "factor": 2}),
        (LokrModule, {"lora_dim": 10000}),
        (LokrModule, {"lora_dim": 10000, "factor": 4}),
        (LokrModule, {"lora_dim": 3}),
        (LokrModule, {"lora_dim": 1, "full_matrix": True}),
    ],
)
def test_lycoris_adapter_in_peft(kind: Any, options: dict[str, Any], known: bool, tmp_path: Path) -> None:
    base: Any = net()
    adapter = from_lycoris({name: base.get_submodule(name) for name in FLAT}, kind, **options)
    if known:
        adapter = replace(adapter, base=architecture_of(base))
    result = ao.save(adapter, tmp_path / "converted", format="peft")
    assert result.proof is not None
    assert result.proof.exact
    model = pm.load(base, tmp_path / "converted")
    assert pm.adapted(model) == set(FLAT)
    layers = {key.removeprefix(pm.PREFIX): layer for key, layer in model.named_modules()}
    for update in adapter:
        theirs = layers[update.module].get_delta_weight("default")
        ours = METHODS[update.method].delta(update)
        assert torch.allclose(ours.reshape(theirs.shape), theirs, atol=1e-6)
    assert ao.load(tmp_path / "converted").updates.keys() == adapter.updates.keys()


def test_rank_that_no_config_gives_is_refused(tmp_path: Path) -> None:
    """LyCORIS keeps any factor whole on demand; peft only by its rank."""
    layers = {"dense": nn.Linear(64, 64), "out": nn.Linear(64, 64)}
    adapter = from_lycoris(layers, LokrModule, lora_dim=1, full_matrix=True)
    half = from_lycoris(layers, LokrModule, lora_dim=1, decompose_both=True)
    mixed = {role: t for role, t in half.updates["model", "out", "lokr"].tensors.items() if role.startswith("w1")}
    mixed["w2"] = adapter.updates["model", "out", "lokr"].tensors["w2"]
    odd = replace(adapter.updates["model", "out", "lokr"], tensors=mixed)
    with pytest.raises(errors.CannotRepresent, match=r"model: out: its factor w2 is whole at rank 1.*--to kohya"):
        ao.save(adapter.with_updates([odd]), tmp_path / "converted", format="peft")


def test_modules_cut_differently_are_refused(tmp_path: Path) -> None:
    one = from_lycoris({"dense": nn.Linear(64, 64)}, LokrModule, lora_dim=1, factor=2)
    two = from_lycoris({"out": nn.Linear(64, 64)}, LokrModule, lora_dim=1, factor=4)
    with pytest.raises(errors.CannotRepresent, match=r"model: \w+: its LoKr factors are .*no decompose_factor.*kohya"):
        ao.save(one.with_updates([*one, *two]), tmp_path / "converted", format="peft")


def test_some_cores_are_refused(tmp_path: Path) -> None:
    base: Any = net()
    one = from_lycoris({"conv": base.conv}, LohaModule, lora_dim=2, use_tucker=True)
    two = from_lycoris({"square": base.square}, LohaModule, lora_dim=2)
    adapter = replace(one.with_updates([*one, *two]), base=architecture_of(base))
    with pytest.raises(errors.CannotRepresent, match=r"conv has a Tucker core and .*square has none.*kohya"):
        ao.save(adapter, tmp_path / "converted", format="peft")


def test_two_methods_have_no_config(tmp_path: Path) -> None:
    one = from_lycoris({"dense": nn.Linear(16, 16)}, LohaModule, lora_dim=2)
    two = from_lycoris({"out": nn.Linear(16, 16)}, LokrModule, lora_dim=2)
    with pytest.raises(errors.CannotRepresent, match=r"dense has LoHa and model: out LoKr.*one method"):
        ao.save(one.with_updates([*one, *two]), tmp_path / "converted", format="peft")


@pytest.mark.parametrize("initial", [0, 1])
def test_vectors_that_start_from_zero(initial: int, tmp_path: Path) -> None:
    options = {"on_input": False, "initial": initial}
    updates = [
        Update("model", name, "ia3", {"vector": lazy(f"{name}.v", torch.rand(16, 1))}, options=options)
        for name in ("one", "two")
    ]
    adapter = Adapter({u.key: u for u in updates}, Fact(None, Certainty.UNKNOWN))
    if initial:
        ao.save(adapter, tmp_path / "converted", format="peft")
        assert pm.config_of(tmp_path / "converted")["feedforward_modules"] == []
        return
    with pytest.raises(errors.CannotRepresent, match=r"factor minus one.*--to kohya"):
        ao.save(adapter, tmp_path / "converted", format="peft")


# ---- published ------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """The model of peft's own regression tests."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin1(self.lin0(x).relu())


def opt() -> nn.Module:
    config = OPTConfig(
        hidden_size=1024, ffn_dim=4096, num_hidden_layers=24, num_attention_heads=16, word_embed_proj_dim=8,
        vocab_size=32, max_position_embeddings=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    return pm.cut_from_one_block(model).eval()


PUBLISHED: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "ia3_mlp": (Mlp, torch.linspace(-1, 1, 30).view(3, 10)),
    "ia3_no_ff_mlp": (Mlp, torch.linspace(-1, 1, 30).view(3, 10)),
    "ia3_opt-350m": (opt, TOKENS),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_vectors(corpus: Path, name: str, tmp_path: Path) -> None:
    """With its config and with one made again: the same modules, inputs or outputs, and tensors."""
    source = corpus / "files" / f"peft-regression-0.6.1-{name}"
    make_base, _ = PUBLISHED[name]
    ao.convert(source, to="peft", output=tmp_path / "kept")
    published, written = pm.config_of(source), pm.config_of(tmp_path / "kept")
    assert {field: written[field] for field in published} == published
    weights = alone(source, tmp_path / "alone")
    ao.convert(weights, to="peft", output=tmp_path / "again")
    torch.manual_seed(0)
    base = make_base()
    for folder in ("kept", "again"):
        result = pm.load(base, tmp_path / folder)
        assert pm.adapted(result) == {k.removeprefix(pm.PREFIX).rpartition(".")[0] for k in pm.weights_of(source)}
        pm.same_tensors(pm.loaded_tensors(result), pm.weights_of(source))
        inputs = {n.removeprefix(pm.PREFIX) for n, m in result.named_modules() if getattr(m, "is_feedforward", False)}
        assert inputs == {m for m in pm.adapted(result) if m.endswith(tuple(published["feedforward_modules"]))}
        base = result.unload()
