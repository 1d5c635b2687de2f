"""Variants of LoRA in PEFT folders: what only a config tells, what contradicts it, and what other formats make of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft_models as pm
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.config import KasaConfig, MontecloraConfig
from peft_zoo import LINE, llama
from safetensors.torch import save_file
from test_peft_methods import architecture_of

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6]])


def tuned(base: Any, folder: Path, **config: Any) -> tuple[Any, Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = pm.trained(base, LoraConfig(r=4, lora_alpha=6, **config))
    return adapted, pm.saved(adapted, folder)


def restated(folder: Path, **fields: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({**pm.config_of(folder), **fields}))
    return folder


def test_alora_travels_to_peft_and_nowhere_else(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj"], "alora_invocation_tokens": [2, 3], "task_type": "CAUSAL_LM"}
    adapted, folder = tuned(llama(), tmp_path / "old", **config)
    assert {u.method for u in ao.load(folder)} == {"alora"}
    result = ao.convert(folder, to="peft", output=tmp_path / "new")
    assert result.proof is not None
    assert pm.config_of(tmp_path / "new")["alora_invocation_tokens"] == [2, 3]
    loaded = pm.load(llama(), tmp_path / "new")
    with torch.no_grad():
        for tokens in (TOKENS, TOKENS.flip(1)):
            torch.testing.assert_close(adapted(input_ids=tokens).logits, loaded(input_ids=tokens).logits)
    # Without its config it reads as plain LoRA; the tokens are said, not found.
    weights = pm.folder_with(tmp_path / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"
    said = {"alora_invocation_tokens": [2, 3]}
    ao.convert(weights, to="peft", output=tmp_path / "again", alpha=6.0, fields=said)
    assert pm.config_of(tmp_path / "again")["alora_invocation_tokens"] == [2, 3]
    for wrong in (lambda: ao.to_lora(folder, tmp_path / "lora", to="peft"), lambda: ao.convert(folder, to="loralib")):
        with pytest.raises(errors.CannotRepresent, match="aLoRA"):
            wrong()


def test_layers_that_are_replicated(tmp_path: Path) -> None:
    adapted, folder = tuned(llama(), tmp_path / "old", target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]])
    result = ao.convert(folder, to="peft", output=tmp_path / "new")
    assert result.proof is not None
    assert pm.config_of(tmp_path / "new")["layer_replication"] == [[0, 2], [0, 2]]
    pm.same_tensors(pm.weights_of(tmp_path / "new"), pm.weights_of(folder))
    with torch.no_grad():
        torch.testing.assert_close(
            PeftModel.from_pretrained(llama(), str(tmp_path / "new")).eval()(TOKENS).logits, adapted(TOKENS).logits
        )


def test_monteclora_is_plain_lora_after_training(tmp_path: Path) -> None:
    config = MontecloraConfig(num_samples=3, buffer_size=2)
    adapted, folder = tuned(LINE(), tmp_path / "old", target_modules=["wide", "tall"], monteclora_config=config)
    ao.to_lora(folder, tmp_path / "lora", to="peft")
    assert not any("sampler" in key for key in pm.weights_of(tmp_path / "lora"))
    assert not pm.config_of(tmp_path / "lora").get("monteclora_config")
    x = torch.linspace(-1, 1, 48).view(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(pm.load(LINE(), tmp_path / "lora")(x), adapted(x))
    with pytest.raises(errors.CannotRepresent, match="monteclora_sampler"):
        ao.convert(folder, to="loralib", output=tmp_path / "out.safetensors")


def test_kasa_as_lora_needs_the_base(tmp_path: Path) -> None:
    adapted, folder = tuned(LINE(), tmp_path / "old", target_modules=["wide", "square"], kasa_config=KasaConfig())
    with pytest.raises(errors.CannotRepresent, match="--base-weights"):
        ao.to_lora(folder, tmp_path / "lora", to="peft")
    weights = tmp_path / "base.safetensors"
    save_file(LINE().state_dict(), weights)
    ao.to_lora(folder, tmp_path / "lora", to="peft", base_weights=weights, reading={"base": architecture_of(LINE())})
    assert pm.config_of(tmp_path / "lora")["r"] == 8
    x = torch.linspace(-1, 1, 48).view(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(pm.load(LINE(), tmp_path / "lora")(x), adapted(x), atol=1e-5, rtol=1e-4)


def test_narrow_factors_need_a_word(tmp_path: Path) -> None:
    """QA-LoRA and BD-LoRA both leave a narrow lora_A, and only a base shows that it is narrow."""
    key = "base_model.model.wide.lora_{}.weight"
    tensors = {key.format("A"): torch.randn(4, 4), key.format("B"): torch.randn(24, 4)}
    path = pm.folder_with(tmp_path / "alone", tensors) / "adapter_model.safetensors"
    base = architecture_of(LINE())
    with pytest.raises(errors.UnknownFact, match=r"--set use_bdlora=.*--set use_qalora=true"):
        ao.load(path, alpha=6.0, base=base)
    for fields, method in (
        ({"use_qalora": True}, "qalora"),
        ({"use_bdlora": {"nblocks": 4, "target_modules_bd_a": ["wide"]}}, "bdlora"),
    ):
        adapter = ao.load(path, alpha=6.0, base=base, fields=fields)
        [update] = adapter
        assert (update.method, METHODS[method].weight_shape(update)) == (method, (24, 16))
        ao.save(adapter, tmp_path / method, format="peft")
        config = pm.config_of(tmp_path / method)
        assert config["qalora_group_size"] == 4 if method == "qalora" else config["use_bdlora"]["nblocks"] == 4
        [again] = ao.load(tmp_path / method)
        assert METHODS[method].error(update, again) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}, "kasa_config"),
        ({"use_bdlora": {"nblocks": "two", "target_modules_bd_a": ["wide"]}}, "nblocks of use_bdlora"),
        ({"use_bdlora": {"nblocks": 3, "target_modules_bd_a": ["wide"]}}, "3 blocks do not divide"),
        ({"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["square"]}}, "use_bdlora"),
        ({"alora_invocation_tokens": "ab"}, "token numbers"),
        ({"enable_lora": [True, 1]}, "true and false"),
        ({"layer_replication": [[0, 1, 2]]}, "pairs of layer numbers"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"use_qalora": True, "qalora_group_size": 0}, "qalora_group_size"),
        ({"megatron_config": {"a": 1}}, "Megatron"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configs_that_the_tensors_contradict(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, folder = tuned(LINE(), tmp_path / "old", target_modules=["wide"])
    with pytest.raises(errors.AdapterOpsError, match=message):
        ao.load(restated(folder, **fields))


def test_a_diagonal_without_its_config(tmp_path: Path) -> None:
    _, folder = tuned(LINE(), tmp_path / "old", target_modules=["wide"], kasa_config=KasaConfig())
    with pytest.raises(errors.Conflict, match="kasa_config"):
        ao.load(restated(folder, kasa_config=None))


def test_modules_that_a_config_cannot_tell_apart(tmp_path: Path) -> None:
    key = "base_model.model.{}.lora_{}.weight"
    tensors = {
        key.format("wide", "A"): torch.randn(4, 16), key.format("wide", "B"): torch.randn(24, 2),
        key.format("square", "A"): torch.randn(4, 32), key.format("square", "B"): torch.randn(32, 1),
    }  # fmt: skip
    path = pm.folder_with(tmp_path / "alone", tensors) / "adapter_model.safetensors"
    with pytest.raises(errors.CannotRepresent, match=r"\[2, 4\] blocks"):
        ao.convert(path, to="peft", output=tmp_path / "new", alpha=6.0)
