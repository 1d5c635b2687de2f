"""Configs of soft prompts, mixtures and methods of odd shapes: derived, contradicted, asked for, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import peft_models as pm
import pytest
import torch
from adapterops_formats.peft_kinds.odd import SUPERTUNING
from peft import LoraConfig, XLoraConfig, get_peft_model
from peft_zoo import LINE, TOKENS, llama
from test_peft_methods import architecture_of
from zoo_odd import CASES

import adapterops as ao
from adapterops import errors
from adapterops.plugin import Adapter

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")


def folder_of(name: str, tmp_path: Path) -> Path:
    """What peft writes for a case of the zoo."""
    return CASES[name].adapter(tmp_path / "original")[1]


def with_config(folder: Path, **fields: Any) -> Path:
    """The folder with other fields in its config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The folder with other tensors."""
    tensors = pm.weights_of(folder)
    change(tensors)
    config = pm.config_of(folder)
    shutil.rmtree(folder)
    return pm.folder_with(folder, tensors, config)


def alone(folder: Path) -> Path:
    """The tensors without their config."""
    return pm.folder_with(folder.parent / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"


def written(adapter: Adapter, folder: Path, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config that the adapter is written with."""
    ao.save(adapter, folder, format="peft", fields=fields or {})
    return pm.config_of(folder)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("deft, relu", "r", 4),
        ("deft, relu", "para", True),
        ("supertuning, supra", "r", 4),
        ("supertuning, supra", "save_precomputed_indices", False),
        ("supertuning, supra", "sparsity", 0.5),
        ("osf, some", "effective_rank", 19),
        ("osf, half", "effective_rank", 0.25),
        ("osf, patterns", "rank_pattern", {"tall": 6}),
        ("peanut, deep", "depth", 1),
        ("prompt_tuning, llama", "num_virtual_tokens", 5),
        ("prompt_tuning, llama", "token_dim", 64),
        ("prefix_tuning, llama", "num_virtual_tokens", 5),
        ("prefix_tuning, llama", "num_layers", 3),
        ("multitask_prompt_tuning, llama", "num_tasks", 2),
        ("multitask_prompt_tuning, llama", "num_ranks", 1),
        ("adaption_prompt, llama", "adapter_len", 4),
        ("adaption_prompt, llama", "adapter_layers", 2),
        ("adaption_prompt, llama", "target_modules", "attn"),
        ("lily, shared", "num_B", 2),
        ("lily, shared", "stride_A", 1),
        ("poly, llama", "n_tasks", 2),
        ("poly, llama", "n_skills", 4),
        ("shadow, of its own size", "update_hidden_size", None),
        ("shadow, of its own size", "shadow_num_hidden_layers", 1),
        ("shadow, of its own size", "shadow_hidden_size", 32),
        ("shadow, of its own size", "shadow_intermediate_size", 48),
    ],
)
def test_a_config_that_contradicts_its_tensors(name: str, field: str, value: Any, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path)
    right = pm.config_of(folder)
    base = architecture_of(CASES[name].base())
    with pytest.raises(errors.Conflict, match="effective_rank" if field == "rank_pattern" else field):
        ao.load(with_config(folder, **{field: value}), base=base)
    repaired = written(ao.load(folder, base=base, fields={field: right[field]}), tmp_path / "repaired")
    assert {k: v for k, v in repaired.items() if k in right} == right


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("deft, relu", "r", "3"),
        ("supertuning, supra", "sparsity", "most"),
        ("supertuning, supra", "lora_alpha", [5]),
        ("supertuning, supra", "select_top", 1),
        ("osf, some", "effective_rank", "half"),
        ("osf, patterns", "rank_pattern", ["tall"]),
        ("osf, patterns", "rank_pattern", {"tall": "5"}),
        ("osf, patterns", "rank_pattern", {"(tall": 5}),
        ("osf, patterns", "rank_pattern", {"(a+)+$": 5}),
        ("peanut, deep", "scaling", "1"),
        ("prompt_tuning, llama", "num_virtual_tokens", "4"),
        ("prefix_tuning, llama", "num_layers", "2"),
        ("lily, shared", "stride_A", "2"),
    ],
)
def test_fields_of_another_type(name: str, field: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(errors.UnreadableFile, match=field):
        ao.load(with_config(folder_of(name, tmp_path), **{field: value}), base=architecture_of(CASES[name].base()))


def test_a_prompt_of_unknown_type_says_what_is_assumed(tmp_path: Path) -> None:
    weights = alone(folder_of("prompt_tuning, llama", tmp_path))
    assert any("prompt tuning is assumed" in note for note in ao.load(weights).provenance.notes)
    told = ao.load(weights, fields={"peft_type": "P_TUNING", "task_type": "CAUSAL_LM"})
    assert not any("assumed" in note for note in told.provenance.notes)
    assert written(told, tmp_path / "out")["peft_type"] == "P_TUNING"


def test_keys_and_values_are_no_input_embeddings(tmp_path: Path) -> None:
    weights, base = alone(folder_of("prefix_tuning, llama", tmp_path)), architecture_of(llama())
    adapter = ao.load(weights, base=base, fields={"task_type": "CAUSAL_LM"})
    with pytest.raises(errors.Conflict, match=r"64 wide.*embeddings are 32.*peft_type=PREFIX_TUNING"):
        ao.save(adapter, tmp_path / "out", format="peft")


def test_the_rows_of_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    task = {"task_type": "SEQ_2_SEQ_LM"}
    weights = pm.folder_with(tmp_path / "a", {"prompt_embeddings": torch.ones(6, 8)}) / "adapter_model.safetensors"
    config = written(ao.load(weights, fields=task), tmp_path / "out")
    assert (config["num_virtual_tokens"], config["num_transformer_submodules"]) == (3, 2)
    odd = pm.folder_with(tmp_path / "b", {"prompt_embeddings": torch.ones(5, 8)}) / "adapter_model.safetensors"
    with pytest.raises(errors.CannotRepresent, match="5 rows are not those of an encoder and a decoder"):
        written(ao.load(odd, fields=task), tmp_path / "none")


def test_tasks_are_seen_in_the_tensors(tmp_path: Path) -> None:
    weights = alone(folder_of("multitask_prompt_tuning, llama", tmp_path))
    adapter = ao.load(weights, fields={"task_type": "CAUSAL_LM"})
    assert [u.method for u in adapter] == ["multitask_prompt_tuning"]


def test_tokens_of_another_number(tmp_path: Path) -> None:
    cpt = folder_of("cpt, llama", tmp_path / "cpt")
    with pytest.raises(errors.BrokenAdapter, match="3 rows, but cpt_token_ids lists 2"):
        ao.load(with_config(cpt, cpt_token_ids=[1, 2]))
    words = folder_of("trainable_tokens, embedding", tmp_path / "words")
    with pytest.raises(errors.BrokenAdapter, match="3 rows"):
        ao.load(with_config(words, token_indices=[1, 2]))
    with pytest.raises(errors.UnreadableFile, match="list of token numbers"):
        ao.load(with_config(words, token_indices=[1, 2, -3]))


def test_adaption_prompts_are_on_the_last_attentions(tmp_path: Path) -> None:
    def move(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("layers.1.", "layers.0.")] = tensors.pop(key)

    weights = alone(with_tensors(folder_of("adaption_prompt, llama", tmp_path), move))
    base, task = architecture_of(llama()), {"task_type": "CAUSAL_LM"}
    with pytest.raises(errors.CannotRepresent, match=r"layers.0.self_attn.*none of the last 1"):
        ao.save(ao.load(weights, base=base, fields=task), tmp_path / "out", format="peft", fields=task)
    assert not (tmp_path / "out").exists()


def test_a_block_that_the_base_lacks(tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("layers.1.", "layers.7.")] = tensors.pop(key)

    folder = with_tensors(folder_of("adaption_prompt, llama", tmp_path), rename)
    with pytest.raises(errors.UnknownModule, match=r"layers.7.self_attn"):
        ao.load(folder, base=architecture_of(llama()))


def test_matrices_that_lily_would_share(tmp_path: Path) -> None:
    def change(role: str) -> Callable[[dict[str, torch.Tensor]], None]:
        def one(tensors: dict[str, torch.Tensor]) -> None:
            tensors[f"base_model.model.model.layers.1.self_attn.q_proj.lily_{role}.weight"] += 1

        return one

    folder = folder_of("lily, shared", tmp_path)
    with pytest.raises(errors.CannotRepresent, match="one B for all modules of a kind"):
        ao.load(with_tensors(folder, change("B")))
    other = folder_of("lily, shared", tmp_path / "again")
    weights = alone(with_tensors(other, change("A")))
    with pytest.raises(errors.CannotRepresent, match="in runs of 1, 2"):
        written(ao.load(weights, fields={"scaling": 1.0}), tmp_path / "out")


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.95, 0.99, 0.123456789])
def test_sparsity_is_found_again(sparsity: float, tmp_path: Path) -> None:
    config = peft.SupertuningConfig(target_modules=["wide", "tall", "square"], sparsity=sparsity)
    folder = pm.saved(get_peft_model(LINE(), config), tmp_path / "original")
    made = written(ao.load(alone(folder), base=architecture_of(LINE())), tmp_path / "out")
    counts = {key: t.shape for key, t in pm.weights_of(folder).items()}
    again = peft.SupertuningConfig(target_modules=["wide", "tall", "square"], sparsity=made["sparsity"])
    assert counts == {
        key: t.shape for key, t in pm.weights_of(pm.saved(get_peft_model(LINE(), again), tmp_path / "b")).items()
    }
    if sparsity not in (0.0, 0.123456789):
        assert made["sparsity"] == sparsity


def test_no_sparsity_makes_other_numbers_of_entries(tmp_path: Path) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("values", "indices"):
            key = f"base_model.model.wide.supertuning_{part}"
            tensors[key] = tensors[key][:7]

    weights = alone(with_tensors(folder_of("supertuning, linear", tmp_path), cut))
    with pytest.raises(errors.CannotRepresent, match="no one sparsity"):
        written(ao.load(weights, base=architecture_of(LINE())), tmp_path / "out")
    assert "sparsity" in SUPERTUNING.shaping


def test_sparsity_is_asked_for_where_the_sizes_are_not_known(tmp_path: Path) -> None:
    weights = alone(folder_of("supertuning, linear", tmp_path))
    with pytest.raises(errors.UnknownFact, match=r"sparsity.*--base CONFIG"):
        written(ao.load(weights), tmp_path / "out")
    assert written(ao.load(weights, fields={"sparsity": 0.9}), tmp_path / "out")["sparsity"] == 0.9


@pytest.mark.parametrize(
    ("name", "key", "said"),
    [
        ("deft, relu", "square.deft_P", "one r for all"),
        ("peanut, shallow", "square.peanut_A.weight", "one r for all"),
    ],
)
def test_ranks_that_no_config_says(name: str, key: str, said: str, tmp_path: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        for other in [k for k in tensors if "square." in k]:
            full = tensors[other].shape
            keep = tuple(slice(0, 2) if n in (3, 4) else slice(None) for n in full)
            tensors[other] = tensors[other][keep].clone()
        assert f"base_model.model.{key}" in tensors

    weights = alone(with_tensors(folder_of(name, tmp_path), narrow))
    with pytest.raises(errors.CannotRepresent, match=said):
        written(ao.load(weights, fields=dict(CASES[name].said)), tmp_path / "out")


@pytest.fixture
def mixture(tmp_path: Path) -> tuple[Any, Path]:
    """An X-LoRA of two experts, and its folder as a peft writes it that leaves nothing of the classifier out."""
    experts = {}
    for seed, name in enumerate("01"):  # the names that peft gives them, whatever they were called
        experts[name] = str(tmp_path / name)
        pm.trained(llama(), LoraConfig(r=2, target_modules=["q_proj"]), seed).save_pretrained(experts[name])
    base = llama()
    base.config.use_cache = False
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=experts, xlora_depth=3, xlora_size=6)
    model = get_peft_model(base, config)
    pm.fill(model, 3, lambda name: "classifier" in name)
    folder = pm.saved(model, tmp_path / "original")

    def whole(tensors: dict[str, torch.Tensor]) -> None:
        tensors |= {k: t.clone() for k, t in model.state_dict().items() if "internal_xlora_classifier" in k}

    tensors = pm.weights_of(folder)
    whole(tensors)
    pm.folder_with(folder, tensors, pm.config_of(folder))
    return model.eval(), folder


def test_a_mixture_is_carried(mixture: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = mixture
    result = ao.convert(folder, to="peft", output=tmp_path / "out")
    assert result.proof is not None
    assert result.proof.exact
    assert any("folders of their own" in note for note in ao.load(folder).provenance.notes)
    pm.same_tensors(pm.weights_of(tmp_path / "out"), pm.weights_of(folder))
    assert pm.config_of(tmp_path / "out") == pm.config_of(folder)
    base = llama()
    base.config.use_cache = False
    loaded = peft.PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    with torch.no_grad():
        expected, found = model(TOKENS)[0], loaded(TOKENS)[0]
    torch.testing.assert_close(found, expected)


def test_a_mixture_without_its_config(mixture: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = mixture
    weights, right = alone(folder), pm.config_of(folder)
    fields = {"adapters": right["adapters"], "task_type": "CAUSAL_LM"}
    made = written(ao.load(weights, fields=fields), tmp_path / "out", fields)
    assert {k: made[k] for k in ("hidden_size", "xlora_depth", "xlora_size", "adapters")} == {
        k: right[k] for k in ("hidden_size", "xlora_depth", "xlora_size", "adapters")
    }
    with pytest.raises(errors.UnknownFact, match="--set adapters"):
        written(ao.load(weights), tmp_path / "none")


def test_the_classifier_that_peft_leaves_incomplete(mixture: tuple[Any, Path]) -> None:
    def cut(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if ".layers.0." in k]:
            del tensors[key]

    _, folder = mixture
    with pytest.raises(errors.BrokenAdapter, match=r"layers.0, is missing.*peft 0.21"):
        ao.load(with_tensors(folder, cut))


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", 64), ("xlora_depth", 2), ("adapters", {"0": "", "1": "", "2": ""})]
)
def test_a_mixture_of_another_size(field: str, value: Any, mixture: tuple[Any, Path]) -> None:
    with pytest.raises(errors.Conflict, match=field):
        ao.load(with_config(mixture[1], **{field: value}))
