"""MLX-LM's adapters: read against what mlx-lm's own layers make of them, written as its loader takes them.

`fixtures/mlx-*` are mlx-lm's (scripts/mlx_fixtures.py): beside each adapter, the base's weights and what `fuse()` made of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft_models as pm
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS
from adapterops.methods.base import Own
from adapterops.storage.source import open_source
from adapterops.storage.tensor import CHUNK, LazyTensor, MemorySource, same_bytes

Arrays = dict[str, "np.ndarray[Any, Any]"]
FIXTURES = Path(__file__).parents[2] / "fixtures"
FOLDERS = sorted(FIXTURES.glob("mlx-*"))
WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"


def config_of(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return value


def folder_of(
    tmp_path: Path, tensors: Mapping[str, Any], config: Mapping[str, Any] | None, name: str = WEIGHTS
) -> Path:
    folder = tmp_path / "mlx"
    folder.mkdir(parents=True)
    if name.endswith(".npz"):
        np.savez(folder / name, **tensors)
    else:
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name)
    if config is not None:
        (folder / CONFIG).write_text(json.dumps(config))
    return folder


def random(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def layer(name: str, inputs: int = 12, rank: int = 4, outputs: int = 10, seed: int = 0) -> Arrays:
    return {f"{name}.lora_a": random(inputs, rank, seed=seed), f"{name}.lora_b": random(rank, outputs, seed=seed)}


def said(scale: float = 20.0, rank: int = 4, **more: Any) -> dict[str, Any]:
    inner = {"rank": rank, "scale": scale, "dropout": 0.0}
    return {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": inner, **more}


Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"


def equal(one: Path, two: Path) -> bool:
    """Whether two files have the same tensors, bit for bit."""
    a, b = load_file(one), load_file(two)
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


# What mlx-lm's layers do


def fused_names(name: str) -> list[str]:
    """The checkpoint's modules behind a module of mlx-lm's, as its models' `sanitize` has them."""
    if name.startswith("model.h."):
        return ["transformer." + name.removeprefix("model.")]
    match = re.fullmatch(r"(.*)\.switch_mlp\.(gate|up|down)_proj", name)
    if match is None:
        return [name]
    return [f"{match[1]}.experts.{n}.{ {'gate': 'w1', 'down': 'w2', 'up': 'w3'}[match[2]] }" for n in range(3)]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_deltas_are_those_of_mlx_lm_s_own_layers(folder: Path) -> None:
    adapter = ao.load(folder)
    fused = load_file(folder / "base" / "fused.safetensors")
    changes = {}
    for key in fused:
        name, _, which = key.rpartition(".")
        if which == "before":
            before, after = fused[key].astype("f8"), fused[f"{name}.after"].astype("f8")
            stacked = before.ndim == 3
            for number, own in enumerate(fused_names(name)):
                changes[own] = (before[number], after[number]) if stacked else (before, after)
    assert {u.module for u in adapter} == changes.keys()
    for update in adapter:
        before, after = changes[update.module]
        own = Own(torch.from_numpy(before).float(), None)
        got = METHODS[update.method].change(update, own).weight.double().numpy()
        assert np.abs(got - (after - before)).max() < 2e-6 * max(1.0, np.abs(after).max()), update.module


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_to_peft_and_back_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    there = ao.convert(folder, "peft", tmp_path / "peft")
    back = ao.convert(tmp_path / "peft", "mlx", tmp_path / "mlx")
    assert there.proof is not None
    assert there.proof.exact
    assert back.proof is not None
    assert back.proof.exact
    assert equal(folder / WEIGHTS, tmp_path / "mlx" / WEIGHTS)
    assert config_of(tmp_path / "mlx") == config_of(folder)
    with safe_open(folder / WEIGHTS, "np") as file:
        assert file.metadata() is None  # mlx writes null


def test_the_formula(tmp_path: Path) -> None:
    tensors = layer(Q0)
    adapter = ao.load(folder_of(tmp_path, tensors, said(scale=2.5)))
    (update,) = adapter
    wanted = 2.5 * tensors[f"{Q0}.lora_b"].T.astype("f8") @ tensors[f"{Q0}.lora_a"].T.astype("f8")
    assert np.allclose(METHODS["lora"].delta(update).numpy(), wanted, rtol=1e-6)
    assert update.tensors["A"].shape == (4, 12)
    assert update.tensors["B"].shape == (10, 4)
    assert update.alpha is not None
    assert (update.alpha.value, str(update.alpha.certainty)) == (10.0, "read")
    assert "lora_parameters.scale" in update.alpha.source


# In peft

BASES = {
    "mlx-llama": LlamaConfig,
    "mlx-llama-dora": LlamaConfig,
    "mlx-llama-head": LlamaConfig,
    "mlx-llama-embedding": LlamaConfig,
    "mlx-qwen2": Qwen2Config,
    "mlx-gemma": GemmaConfig,
    "mlx-gpt2": GPT2Config,
}
CONFIGS = BASES | {"mlx-mixtral": MixtralConfig}


def base_model(name: str) -> Any:
    fields = json.loads((FIXTURES / name / "base" / "config.json").read_text())
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](**{k: v for k, v in fields.items() if k != "model_type"}))


@pytest.mark.parametrize("name", BASES)
def test_peft_loads_it_and_does_the_same(name: str, tmp_path: Path) -> None:
    ao.convert(FIXTURES / name, "peft", tmp_path / "peft", base=FIXTURES / name / "base" / "config.json")
    tensors, scale = load_file(FIXTURES / name / WEIGHTS), config_of(FIXTURES / name)["lora_parameters"]["scale"]
    before = {k: v.clone().double() for k, v in base_model(name).state_dict().items()}
    model = PeftModel.from_pretrained(base_model(name), tmp_path / "peft")
    after = model.merge_and_unload().state_dict()
    changed = {k.removesuffix(".weight") for k in before if not torch.equal(before[k], after[k].double())}
    stems = {key.rpartition(".")[0] for key in tensors}
    assert changed == {own for stem in stems for own in fused_names(stem)}
    for stem in stems:
        (own,) = fused_names(stem)
        a, b = (torch.from_numpy(tensors[f"{stem}.lora_{x}"]).double() for x in "ab")
        # GPT-2's weights and embeddings stand the other way round than linear layers'.
        turned = name == "mlx-gpt2" or stem.endswith("embed_tokens")
        wanted = before[f"{own}.weight"] + scale * (a @ b if turned else b.T @ a.T)
        if f"{stem}.m" in tensors:
            magnitude = torch.from_numpy(tensors[f"{stem}.m"]).double()
            wanted = wanted * (magnitude / wanted.norm(dim=1))[:, None]
        assert torch.allclose(after[f"{own}.weight"].double(), wanted, atol=1e-5), stem


def test_peft_finds_the_experts_that_transformers_5_has_joined(tmp_path: Path) -> None:
    folder, stem = FIXTURES / "mlx-mixtral", "model.layers.1.block_sparse_moe.switch_mlp"
    ao.convert(folder, "peft", tmp_path / "peft")
    tensors = load_file(folder / WEIGHTS)
    before = {k: v.clone() for k, v in base_model("mlx-mixtral").state_dict().items()}
    model = PeftModel.from_pretrained(base_model("mlx-mixtral"), tmp_path / "peft")
    after = model.merge_and_unload().state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    experts = "model.layers.1.mlp.experts"
    assert changed == {"model.layers.1.self_attn.q_proj.weight", f"{experts}.gate_up_proj", f"{experts}.down_proj"}
    moved = {
        name: (after[f"{experts}.{name}"] - before[f"{experts}.{name}"]).numpy()
        for name in ("gate_up_proj", "down_proj")
    }
    gate, up = np.split(moved["gate_up_proj"], 2, axis=1)
    for name, got in (("gate", gate), ("up", up), ("down", moved["down_proj"])):
        wanted = 5.0 * tensors[f"{stem}.{name}_proj.lora_b"] @ tensors[f"{stem}.{name}_proj.lora_a"]
        assert np.allclose(got, wanted, atol=1e-6), name


# As mlx-lm loads it


def load_as_mlx_lm(folder: Path, modules: Mapping[str, tuple[int, int]], layers: int, stem: str) -> dict[str, int]:
    """What `load_adapters` does with the names and shapes of a model's linear modules; the rank of each adapted one.

    Stated again from mlx_lm/tuner/utils.py: first the keys inside the last `num_layers` layers, then those of the whole
    model; then every tensor must be a parameter that was made so, of its shape.
    """
    config = config_of(folder)
    inner = config["lora_parameters"]
    rank, dropout, scale = inner["rank"], inner["dropout"], inner["scale"]
    assert isinstance(rank, int)
    assert all(isinstance(value, (int, float)) for value in (dropout, scale))
    keys = inner.get("keys")
    adapted: set[str] = set()
    for number in list(range(layers))[-max(config["num_layers"], 0) :]:
        start = f"{stem}.{number}."
        adapted |= {m for m in modules if m.startswith(start) and (keys is None or m.removeprefix(start) in keys)}
    if keys is not None:
        again = {m for m in modules if m in keys}
        assert not again & adapted, "mlx-lm cannot adapt a module twice"
        adapted |= again
    allowed: dict[str, tuple[int, ...]] = {}
    for module in adapted:
        outputs, inputs = modules[module]
        allowed |= {f"{module}.lora_a": (inputs, rank), f"{module}.lora_b": (rank, outputs)}
        if config["fine_tune_type"] == "dora":
            allowed[f"{module}.m"] = (outputs,)
    tensors = load_file(folder / WEIGHTS)
    for key, tensor in tensors.items():
        assert allowed.get(key) == tensor.shape, key
    return dict.fromkeys(adapted, rank)


def llama_modules(layers: int) -> dict[str, tuple[int, int]]:
    own = {f"self_attn.{n}_proj": (12, 12) for n in "qkvo"} | {"mlp.up_proj": (20, 12), "mlp.down_proj": (12, 20)}
    return {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in own.items()}


def peft_folder(tmp_path: Path, modules: Mapping[str, Any], ranks: Mapping[str, int], alpha: float = 8.0) -> Path:
    """A PEFT folder for these modules, whose ranks `rank_pattern` says."""
    prefix, tensors = "base_model.model.", {}
    for module, (outputs, inputs) in modules.items():
        rank = next((r for name, r in ranks.items() if name in module), 4)
        tensors[f"{prefix}{module}.lora_A.weight"] = random(rank, inputs, seed=len(tensors))
        tensors[f"{prefix}{module}.lora_B.weight"] = random(outputs, rank, seed=len(tensors))
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    pattern = {name: rank for name, rank in ranks.items() if any(name in m for m in modules)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "target_modules": sorted(modules)}
    (folder / CONFIG).write_text(json.dumps(config | {"rank_pattern": pattern, "base_model_name_or_path": "some/base"}))
    return folder


SETS: dict[str, tuple[set[str], int, list[str]]] = {
    # which of four layers' modules; num_layers and keys, where nothing says how many layers the base has
    "all": ({"q_proj", "v_proj"}, -1, ["self_attn.q_proj", "self_attn.v_proj"]),
    "the last two": (
        {"2.self_attn.q_proj", "3.self_attn.q_proj"},
        -1,
        ["model.layers.2.self_attn.q_proj", "model.layers.3.self_attn.q_proj"],
    ),
    "a hole": (
        {"q_proj", "1.mlp.up_proj", "3.mlp.up_proj"},
        -1,
        ["self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.3.mlp.up_proj"],
    ),
}


@pytest.mark.parametrize("case", SETS)
def test_the_modules_that_a_config_names_are_those_of_the_adapter(case: str, tmp_path: Path) -> None:
    endings, num_layers, keys = SETS[case]
    every = llama_modules(4)
    own = {m: shape for m, shape in every.items() if m.endswith(tuple(endings))}
    result = ao.convert(peft_folder(tmp_path, own, {}), "mlx", tmp_path / "mlx")
    config = config_of(tmp_path / "mlx")
    assert (config["num_layers"], sorted(config["lora_parameters"]["keys"])) == (num_layers, sorted(keys))
    assert config["model"] == "some/base"
    assert load_as_mlx_lm(tmp_path / "mlx", every, 4, "model.layers").keys() == own.keys()
    assert any("--base CONFIG" in note for note in result.notes) == (case == "the last two")


def test_layers_are_counted_from_the_end_where_the_base_is_known(tmp_path: Path) -> None:
    source = FIXTURES / "mlx-llama"
    ao.convert(source, "peft", tmp_path / "peft")
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", "np") as file:
        assert "mlx_adapter_config" in (file.metadata() or {})
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")  # nothing is carried any more
    ao.convert(tmp_path / "peft", "mlx", tmp_path / "mlx", base=source / "base" / "config.json")
    config = config_of(tmp_path / "mlx")
    assert config["num_layers"] == 2
    assert sorted(config["lora_parameters"]["keys"]) == ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert config["lora_parameters"]["scale"] == 20.0
    assert equal(source / WEIGHTS, tmp_path / "mlx" / WEIGHTS)


def test_ranks_are_padded_and_scales_moved_by_powers_of_two_and_both_come_back(tmp_path: Path) -> None:
    modules = llama_modules(2)
    source = peft_folder(tmp_path, modules, {"k_proj": 2, "down_proj": 8})
    result = ao.convert(source, "mlx", tmp_path / "mlx")
    assert any("padded with zeros to rank 8" in note for note in result.notes)
    assert any("power of two" in note for note in result.notes)
    assert set(load_as_mlx_lm(tmp_path / "mlx", modules, 2, "model.layers").values()) == {8}
    written, scale = load_file(tmp_path / "mlx" / WEIGHTS), config_of(tmp_path / "mlx")["lora_parameters"]["scale"]
    before = load_file(source / "adapter_model.safetensors")
    for module in modules:
        a, b = (before[f"base_model.model.{module}.lora_{x}.weight"].astype("f8") for x in "AB")
        got = scale * (written[f"{module}.lora_a"].astype("f8") @ written[f"{module}.lora_b"].astype("f8")).T
        assert np.allclose(got, 8.0 / len(a) * b @ a, rtol=1e-12, atol=1e-12), module
    back = ao.convert(tmp_path / "mlx", "peft", tmp_path / "back")
    assert back.proof is not None
    assert back.proof.largest_error == 0
    assert equal(source / "adapter_model.safetensors", tmp_path / "back" / "adapter_model.safetensors")
    assert config_of(tmp_path / "back")["lora_alpha"] == 8


def test_a_strangers_word_cuts_off_no_numbers(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {}, said())
    spelling = {"padded": {Q0: 2}, "stretched": {Q0: 3.0, Q1: 1e308}}
    note = json.dumps({"spelling": {"mlx": spelling}})
    save_file(layer(Q0) | layer(Q1), folder / WEIGHTS, {"adapterops": note})
    for update in ao.load(folder):
        assert update.tensors["B"].shape == (10, 4)
        assert update.alpha is not None
        assert update.alpha.value == 80.0


def test_scales_that_differ_otherwise_are_for_fold_alpha(tmp_path: Path) -> None:
    source = FIXTURES / "peft-llama"  # alphas 8, 3 and 16 at ranks 4, 6 and 2
    with pytest.raises(errors.CannotRepresent, match="--fold-alpha") as caught:
        ao.convert(source, "mlx", tmp_path / "mlx")
    assert "down_proj.lora_B.weight" in str(caught.value)
    result = ao.convert(source, "mlx", tmp_path / "mlx", fold_alpha=True)
    assert result.proof is not None
    assert result.proof.largest_error < 1e-6
    inner = config_of(tmp_path / "mlx")["lora_parameters"]
    assert (inner["scale"], inner["rank"]) == (1.0, 6)


def test_rank_stabilised_scale_becomes_literal(tmp_path: Path) -> None:
    source = peft_folder(tmp_path, llama_modules(1), {})
    (source / CONFIG).write_text(json.dumps(config_of(source) | {"use_rslora": True}))
    ao.convert(source, "mlx", tmp_path / "mlx")
    assert config_of(tmp_path / "mlx")["lora_parameters"]["scale"] == 4.0  # 8 / √4
    ao.convert(tmp_path / "mlx", "peft", tmp_path / "back")
    config = config_of(tmp_path / "back")
    assert config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"]) == 4.0
    assert equal(source / "adapter_model.safetensors", tmp_path / "back" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["mlx-gpt2", "mlx-llama-head", "mlx-gemma", "mlx-llama-dora"])
def test_an_adapter_of_peft_s_own_making(name: str, tmp_path: Path) -> None:
    keys = [key.rpartition(".")[2] for key in config_of(FIXTURES / name)["lora_parameters"]["keys"]]
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=keys, use_dora=name.endswith("dora"), init_lora_weights=False)
    get_peft_model(base_model(name), lora).save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    base = FIXTURES / name / "base" / "config.json"
    result = ao.convert(tmp_path / "peft", "mlx", tmp_path / "mlx", base=base)
    assert result.proof is not None
    assert result.proof.exact
    config = config_of(tmp_path / "mlx")
    assert (config["lora_parameters"]["scale"], config["num_layers"]) == (1.5, 2 if name == "mlx-gpt2" else 3)
    before = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    after = load_file(tmp_path / "mlx" / WEIGHTS)
    for key, tensor in after.items():
        stem, _, role = key.rpartition(".")
        own = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}[role]
        assert np.array_equal(before[f"base_model.model.{fused_names(stem)[0]}.{own}"].T, tensor)
    assert len(after) == len(before)
    ao.convert(tmp_path / "mlx", "peft", tmp_path / "back", base=base)
    assert equal(tmp_path / "peft" / "adapter_model.safetensors", tmp_path / "back" / "adapter_model.safetensors")
    assert config_of(tmp_path / "back")["use_dora"] == name.endswith("dora")


@pytest.mark.parametrize("name", ["mlx-llama", "mlx-llama-dora", "mlx-llama-head", "mlx-mixtral", "mlx-gpt2"])
def test_mlx_lm_itself_loads_what_is_written(name: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    fields = json.loads((FIXTURES / name / "base" / "config.json").read_text())
    module = pytest.importorskip(f"mlx_lm.models.{fields['model_type']}")
    ao.convert(FIXTURES / name, "peft", tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "peft" / "adapter_model.safetensors")  # the config is made anew
    ao.convert(tmp_path / "peft", "mlx", tmp_path / "mlx")
    outputs = []
    for folder in (FIXTURES / name, tmp_path / "mlx"):
        mx.random.seed(0)
        model = utils.load_adapters(module.Model(module.ModelArgs.from_dict(fields)), str(folder))
        model.eval()
        outputs.append(np.array(model(mx.array([[1, 2, 3, 4]]))))
    assert np.array_equal(outputs[0], outputs[1])


# Experts


def test_experts_of_older_releases(tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.switch_mlp.gate_proj"
    a, b = random(3 * 2, 12), random(3, 10, 2)  # (experts · rank, in), (experts, out, rank)
    adapter = ao.load(folder_of(tmp_path, {f"{stem}.lora_a": a, f"{stem}.lora_b": b}, said(rank=2, scale=3.0)))
    for number in range(3):
        update = next(u for u in adapter if u.module == f"model.layers.0.mlp.experts.{number}.gate_proj")
        wanted = 3.0 * b[number].astype("f8") @ a.reshape(3, 2, 12)[number].astype("f8")
        assert np.allclose(METHODS["lora"].delta(update).numpy(), wanted, rtol=1e-5)


def test_experts_without_an_update_get_zeros(tmp_path: Path) -> None:
    modules = {f"model.layers.0.mlp.experts.{n}.up_proj": (10, 12) for n in (0, 2)}
    ao.convert(peft_folder(tmp_path, modules, {}), "mlx", tmp_path / "mlx")
    tensors = load_file(tmp_path / "mlx" / WEIGHTS)
    stem = "model.layers.0.mlp.switch_mlp.up_proj"
    assert tensors[f"{stem}.lora_a"].shape == (3, 4, 12)
    assert tensors[f"{stem}.lora_b"].shape == (3, 10, 4)
    assert not tensors[f"{stem}.lora_b"][1].any()
    assert tensors[f"{stem}.lora_b"][[0, 2]].any()


def test_a_stack_under_an_unknown_name_is_refused(tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.experts.gate_proj"
    tensors = {f"{stem}.lora_a": random(3, 2, 12), f"{stem}.lora_b": random(3, 10, 2)}
    with pytest.raises(errors.UnsupportedFormat, match="layer of experts") as caught:
        ao.load(folder_of(tmp_path, tensors, said(rank=2)))
    assert stem in str(caught.value)


# The config


def test_an_archive_without_a_config_needs_the_scale(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, layer(Q0), None, "adapters.npz")
    with pytest.raises(errors.UnknownFact, match="--set scale=X"):
        ao.convert(folder, "peft", tmp_path / "peft")
    ao.convert(folder, "peft", tmp_path / "peft", fields={"scale": 20})
    assert config_of(tmp_path / "peft")["lora_alpha"] == 80
    ao.convert(folder, "mlx", tmp_path / "new", alpha=80.0)
    assert config_of(tmp_path / "new")["lora_parameters"]["scale"] == 20.0
    with pytest.raises(errors.UsageError, match="must be a number"):
        ao.load(folder, fields={"scale": "much"})
    with pytest.raises(errors.UsageError, match="only scale"):
        ao.convert(folder, "mlx", tmp_path / "no", fields={"scale": 1, "rank": 2})


def test_the_scale_is_literal_beside_an_alpha(tmp_path: Path) -> None:
    config = said(scale=10.0)
    config["lora_parameters"]["alpha"] = 16
    adapter = ao.load(folder_of(tmp_path, layer(Q0), config))
    assert [METHODS["lora"].scale(u) for u in adapter] == [10.0]
    assert any("ignores the alpha" in note for note in adapter.provenance.notes)


def test_a_config_of_the_releases_that_used_alpha_is_asked_about(tmp_path: Path) -> None:
    inner = {"rank": 4, "alpha": 16.0, "scale": 10.0, "dropout": 0.0}
    folder = folder_of(tmp_path, layer(Q0), {"lora_layers": 1, "lora_parameters": inner})
    with pytest.raises(errors.Conflict, match="applied scale · alpha / rank = 40"):
        ao.load(folder)
    ao.convert(folder, "mlx", tmp_path / "new", fields={"scale": 40.0})
    config = config_of(tmp_path / "new")
    assert config["num_layers"] == 1
    assert "lora_layers" not in config
    assert config["lora_parameters"] == {"rank": 4, "scale": 40.0, "dropout": 0.0}


def test_a_config_that_contradicts_the_tensors(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, layer(Q0), said(rank=8))
    with pytest.raises(errors.Conflict, match="has rank 4"):
        ao.load(folder)
    assert len(ao.load(folder, repair=True)) == 1
    for kind, tensors in (("dora", layer(Q0)), ("lora", layer(Q0) | {f"{Q0}.m": random(10)})):
        odd = folder_of(tmp_path / kind, tensors, said() | {"fine_tune_type": kind})
        with pytest.raises(errors.Conflict, match=f"fine_tune_type {kind}"):
            ao.load(odd)
    with pytest.raises(errors.UnreadableFile, match="scale is"):
        ao.load(folder_of(tmp_path / "text", layer(Q0), said(scale="20")))  # type: ignore[arg-type]
    with pytest.raises(errors.NotAnAdapter, match="full fine-tuning"):
        ao.load(folder_of(tmp_path / "full", {"model.norm.weight": random(4)}, {"fine_tune_type": "full"}))


def test_checkpoints_beside_it_are_not_the_adapter(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, layer(Q0), said(scale=7.0))
    save_file(layer(Q0, seed=1), folder / "0000100_adapters.safetensors")
    adapter = ao.load(folder)
    assert any("0000100_adapters.safetensors, a checkpoint, is not" in note for note in adapter.provenance.notes)
    first = next(iter(adapter)).tensors["A"].numpy()
    assert np.array_equal(first.T, layer(Q0)[f"{Q0}.lora_a"])
    alone = ao.load(folder / "0000100_adapters.safetensors")
    assert [METHODS["lora"].scale(u) for u in alone] == [7.0]
    assert not np.array_equal(next(iter(alone)).tensors["A"].numpy(), first)
    save_file(layer(Q0), folder / "other.safetensors")
    with pytest.raises(errors.NotAnAdapter, match="several weight files"):
        ao.load(folder)


# What MLX-LM cannot hold


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("peft-embedding-conv", "no convolutions"),
        ("peft-bert-classifier", "no place for it"),
        ("peft-rslora-bias", "bias"),
        ("diffusers-sd15.safetensors", "language models"),
    ],
)
def test_what_it_cannot_hold_is_refused(source: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(errors.CannotRepresent, match=why):
        ao.convert(FIXTURES / source, "mlx", tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


def test_dora_of_some_modules_only_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, layer(Q0) | layer(Q1) | {f"{Q0}.m": random(10)}, None)
    with pytest.raises(errors.CannotRepresent, match="all of them with DoRA or none"):
        ao.convert(folder, "mlx", tmp_path / "out", fields={"scale": 1.0})
    result = ao.convert(folder, "mlx", tmp_path / "out", fields={"scale": 1.0}, allow_drop=True)
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == {f"{Q0}.{role}" for role in ("lora_a", "lora_b", "m")}
    assert any(Q1 in line for line in result.dropped)


def test_dora_of_an_embedding_is_refused(tmp_path: Path) -> None:
    name = "model.embed_tokens"
    folder = folder_of(tmp_path, layer(name) | {f"{name}.m": random(12)}, said() | {"fine_tune_type": "dora"})
    with pytest.raises(errors.UnsupportedFormat, match="a magnitude for each token"):
        ao.load(folder)


def test_an_embedding_that_the_head_is_tied_to(tmp_path: Path) -> None:
    modules = {"model.embed_tokens": (16, 40)}
    source = peft_folder(tmp_path, {}, {})
    tensors = {"lora_embedding_A": random(4, 40), "lora_embedding_B": random(16, 4)}
    save_file(
        {f"base_model.model.{m}.{k}": t for m in modules for k, t in tensors.items()},
        source / "adapter_model.safetensors",
    )
    (source / CONFIG).write_text(json.dumps(config_of(source) | {"target_modules": ["embed_tokens"]}))
    with pytest.raises(errors.CannotRepresent, match=r"tied to model\.embed_tokens"):
        ao.convert(source, "mlx", tmp_path / "no", base=FIXTURES / "mlx-qwen2" / "base" / "config.json")
    result = ao.convert(source, "mlx", tmp_path / "yes", base=FIXTURES / "mlx-llama" / "base" / "config.json")
    assert any("tied" in note for note in result.notes)
    assert np.array_equal(
        load_file(tmp_path / "yes" / WEIGHTS)["model.embed_tokens.lora_a"], tensors["lora_embedding_A"].T
    )


def test_names_that_two_bases_share_need_the_base(tmp_path: Path) -> None:
    source = peft_folder(tmp_path, {"transformer.h.0.attn.c_attn": (48, 16)}, {})
    with pytest.raises(errors.UnknownFact, match="GPT-BigCode"):
        ao.convert(source, "mlx", tmp_path / "mlx")
    ao.convert(source, "mlx", tmp_path / "mlx", base=FIXTURES / "mlx-gpt2" / "base" / "config.json")
    assert "model.h.0.attn.c_attn.lora_a" in load_file(tmp_path / "mlx" / WEIGHTS)


# The transposes


@pytest.mark.parametrize("dtype", ["u1", "<f2", "<f4", "<f8"])
def test_a_transpose_is_read_in_any_parts(dtype: str) -> None:
    values = np.arange(37 * 23).reshape(37, 23).astype(dtype)
    kind = {"u1": "U8", "<f2": "F16", "<f4": "F32", "<f8": "F64"}[dtype]
    tensor = LazyTensor("x", kind, (37, 23), MemorySource(values.tobytes()), 0)
    turned = tensor.transposed()
    assert turned.shape == (23, 37)
    assert turned.transposed() is tensor
    wanted = np.ascontiguousarray(values.T).tobytes()
    assert bytes(turned.read()) == wanted
    assert b"".join(bytes(p[:n]) for p in [bytearray(100)] for n in turned.chunks(p)) == wanted
    assert np.array_equal(turned.rows([(3, 7), (1, 2)]).numpy(), values.T[[3, 4, 5, 6, 1]])
    assert same_bytes(turned, tensor.transposed())
    assert not same_bytes(turned, tensor.reshape((23, 37)))
    for start, length in ((5, 9), (0, 4), (len(wanted) - 3, 3)):
        part = bytearray(length)
        turned.source.readinto(start, memoryview(part))
        assert bytes(part) == wanted[start : start + length]
    with pytest.raises(ValueError, match="no matrix"):
        tensor.reshape((37 * 23,)).transposed()


def test_two_large_transposes_are_turned_once_each(tmp_path: Path) -> None:
    reads: list[int] = []

    class Counted:
        path = "counted"

        def readinto(self, start: int, buffer: memoryview) -> None:
            reads.append(len(buffer))
            buffer[:] = bytes(len(buffer))

    rows = 2 * CHUNK // 4
    one, two = (LazyTensor(n, "F32", (rows, 3), Counted(), 0).transposed() for n in "ab")
    first, second = bytearray(CHUNK), bytearray(CHUNK)
    for _ in zip(one.chunks(first), two.chunks(second), strict=True):
        pass
    assert reads == [rows * 12, rows * 12]


def test_header_without_metadata(tmp_path: Path) -> None:
    source = open_source(FIXTURES / "mlx-llama")
    assert source.metadata == {}
    assert b'"__metadata__":null' in (FIXTURES / "mlx-llama" / WEIGHTS).read_bytes()[:4000].replace(b" ", b"")


def test_numbers_that_no_one_wrote_are_refused_and_not_computed_with(tmp_path: Path) -> None:
    text = json.dumps(said()).replace("20.0", "1" + "0" * 400)
    folder = folder_of(tmp_path, layer(Q0), said())
    (folder / CONFIG).write_text(text)
    with pytest.raises(errors.UnreadableFile, match="scale is 1000"):
        ao.load(folder)
    huge = {"spelling": {"mlx": {"stretched": {Q0: 10**400}}}}
    save_file(layer(Q0), folder / WEIGHTS, {"adapterops": json.dumps(huge)})
    (folder / CONFIG).write_text(json.dumps(said()))
    assert len(ao.load(folder)) == 1
    source = peft_folder(tmp_path, {"model.layers.0.mlp.experts.999999.up_proj": (10, 12)}, {})
    with pytest.raises(errors.CannotRepresent, match="1000000 experts"):
        ao.convert(source, "mlx", tmp_path / "out")


def test_merged(tmp_path: Path) -> None:
    for number in (0, 1):
        folder_of(tmp_path / str(number), layer(Q0, seed=number) | layer(Q1, seed=number), said(scale=2.0))
    ao.merge([tmp_path / str(n) / "mlx" for n in (0, 1)], method="cat", output=tmp_path / "out")
    config, merged = config_of(tmp_path / "out"), load_file(tmp_path / "out" / WEIGHTS)
    assert config["lora_parameters"]["rank"] == 8
    for stem in (Q0, Q1):
        parts = [layer(Q0, seed=n) for n in (0, 1)]
        wanted = sum(2.0 * p[f"{Q0}.lora_a"].astype("f8") @ p[f"{Q0}.lora_b"] for p in parts)
        got = config["lora_parameters"]["scale"] * merged[f"{stem}.lora_a"].astype("f8") @ merged[f"{stem}.lora_b"]
        assert np.allclose(got, wanted, atol=1e-5)


def stretched(tmp_path: Path, dtype: str, smallest: float) -> Path:
    """A PEFT folder of two modules, the scale of one half that of the other."""
    folder = tmp_path / "peft"
    folder.mkdir()
    tensors = {}
    for name in (Q0, Q1, Q0.replace("q_proj", "v_proj")):
        tensors[f"base_model.model.{name}.lora_A.weight"] = random(4, 12).astype(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = random(10, 4).astype(dtype)
    tensors[f"base_model.model.{Q1}.lora_B.weight"][0, 0] = smallest
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / CONFIG).write_text(json.dumps({**config, "alpha_pattern": {Q1: 4}}))
    return folder


def test_small_numbers_that_a_power_of_two_rounds(tmp_path: Path) -> None:
    """Half of the smallest float16 is none: that is refused with the way that works, not written and called exact."""
    source = stretched(tmp_path, "float16", 2.0**-24)
    with pytest.raises(errors.CannotRepresent, match=r"layers\.1.*times 0\.5 are none of F16.*--dtype float32"):
        ao.convert(source, "mlx", tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()
    result = ao.convert(source, "mlx", tmp_path / "wide", dtype="float32")
    assert result.proof is not None
    assert result.proof.largest_error == 0.0
    (tmp_path / "other").mkdir()
    ao.convert(stretched(tmp_path / "other", "float16", 2.0**-23), "mlx", tmp_path / "mlx")
    ao.convert(tmp_path / "mlx", "peft", tmp_path / "back")
    assert equal(
        tmp_path / "other" / "peft" / "adapter_model.safetensors", tmp_path / "back" / "adapter_model.safetensors"
    )


@pytest.mark.parametrize("factor", [2.0**60, 2.0**-60, 2.0**1000, 3.0, 2**200])
def test_a_strangers_word_on_what_was_stretched_changes_no_delta(factor: float, tmp_path: Path) -> None:
    tensors = layer(Q0)
    tensors[f"{Q0}.lora_b"][0, 0] = 1e-38
    carried = json.dumps({"spelling": {"mlx": {"stretched": {Q0: factor}}}})
    folder = folder_of(tmp_path, tensors, said(scale=2.0))
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / WEIGHTS, {"adapterops": carried})
    (update,) = ao.load(folder)
    wanted = 2.0 * tensors[f"{Q0}.lora_b"].T.astype("f8") @ tensors[f"{Q0}.lora_a"].T.astype("f8")
    scale = METHODS["lora"].scale(update)
    assert scale is not None
    a, b = (np.frombuffer(update.tensors[r].read(), "<f4").astype("f8").reshape(update.tensors[r].shape) for r in "AB")
    assert np.allclose(scale * b @ a, wanted, rtol=1e-12, atol=0)


def test_only_what_is_zero_in_both_factors_is_padding(tmp_path: Path) -> None:
    """An untrained adapter's B is zero too; a stranger's word does not make its A go."""
    tensors = layer(Q0)
    tensors[f"{Q0}.lora_b"][:] = 0
    carried = json.dumps({"spelling": {"mlx": {"padded": {Q0: 1}}}})
    folder = folder_of(tmp_path, tensors, said())
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / WEIGHTS, {"adapterops": carried})
    (update,) = ao.load(folder)
    assert update.tensors["A"].shape == (4, 12)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4, 5, 6), (6, 4, 12)])
def test_stacks_of_odd_shapes(shape: tuple[int, ...], tmp_path: Path) -> None:
    stem = "model.layers.0.mlp.switch_mlp.up_proj"
    tensors = {f"{stem}.lora_a": np.ones(shape, "f4"), f"{stem}.lora_b": np.ones((3, 10, 4), "f4")}
    folder = folder_of(tmp_path, tensors, said())
    with pytest.raises((errors.BrokenAdapter, errors.UnsupportedFormat), match=r"switch_mlp\.up_proj\.lora_a.*shape"):
        ao.load(folder)


def test_a_base_without_a_head(tmp_path: Path) -> None:
    """MLX-LM's classes have one, and find modules by those names; others it would leave out in silence."""
    folder = tmp_path / "peft"
    folder.mkdir()
    stem = "base_model.model.layers.0.self_attn.q_proj"
    save_file(
        {f"{stem}.lora_A.weight": random(4, 16), f"{stem}.lora_B.weight": random(16, 4)},
        folder / "adapter_model.safetensors",
    )
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    with pytest.raises(errors.UnknownFact, match=r"layers\.0\.self_attn\.q_proj.*without a head.*--base CONFIG"):
        ao.convert(folder, "mlx", tmp_path / "mlx")
    base = tmp_path / "config.json"
    fields = {
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 24,
    }
    base.write_text(json.dumps({**fields, "model_type": "llama", "architectures": ["LlamaModel"]}))
    ao.convert(folder, "mlx", tmp_path / "mlx", base=base)
    assert set(load_file(tmp_path / "mlx" / WEIGHTS)) == {f"{Q0}.lora_a", f"{Q0}.lora_b"}
    ao.convert(tmp_path / "mlx", "peft", tmp_path / "back", base=base)
    assert equal(folder / "adapter_model.safetensors", tmp_path / "back" / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_types_that_mlx_does_not_load(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        f"base_model.model.{Q0}.lora_{k}.weight": torch.ones(s).to(dtype) for k, s in (("A", (4, 12)), ("B", (10, 4)))
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    folder = pm.folder_with(tmp_path / "peft", tensors, config)
    with pytest.raises(errors.CannotRepresent, match=r"lora_A.*does not load as floats; give --dtype float32"):
        ao.convert(folder, "mlx", tmp_path / "mlx")
    ao.convert(folder, "mlx", tmp_path / "mlx", dtype="float32")
    assert {value.dtype for value in load_file(tmp_path / "mlx" / WEIGHTS).values()} == {np.dtype("float32")}


def test_validate_tells_of_a_field_and_goes_on(tmp_path: Path) -> None:
    """A table whose only field is wrong is read without it."""
    folder = folder_of(tmp_path, layer(Q0), {"fine_tune_type": "lora", "lora_parameters": {"scale": "x"}})
    found = list(ao.validate(folder))
    assert any('scale is "x", not a number' in finding.message for finding in found)
    assert "X001" not in {finding.rule.code for finding in found}


def test_a_factor_of_elements_that_are_no_bytes_is_refused(tmp_path: Path) -> None:
    stem = "model.layers.0.self_attn.q_proj"
    entries, at = {}, 0
    for end, shape in (("lora_a", (8, 4)), ("lora_b", (4, 8))):
        entries[f"{stem}.{end}"] = {"dtype": "F6_E2M3", "shape": list(shape), "data_offsets": [at, at + 24]}
        at += 24
    header = json.dumps(entries).encode()
    (tmp_path / "adapters.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(at))
    with pytest.raises(errors.BrokenAdapter, match="cannot be transposed"):
        ao.load(tmp_path / "adapters.safetensors", fields={"scale": 2})
    assert "T103" in [finding.code for finding in ao.validate(tmp_path)]
