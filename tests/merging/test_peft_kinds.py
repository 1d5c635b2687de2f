"""LoRA merged with adapters of PEFT's other types, in either order: peft loads the sum, and computes with it what it should."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import adapterops as ao

SIZES = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50, max_position_embeddings=8
)  # fmt: skip
ON: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "adalora": peft.AdaLoraConfig(init_r=4, total_step=10, **ON),
    "c3a": peft.C3AConfig(block_size=8, **ON),
    "delora": peft.DeloraConfig(r=4, **ON),
    "fourierft": peft.FourierFTConfig(n_frequency=20, **ON),
    "gralora": peft.GraloraConfig(r=4, gralora_k=2, **ON),
    "loha": peft.LoHaConfig(r=2, alpha=4, rank_dropout=0.2, **ON),
    "lokr": peft.LoKrConfig(r=2, alpha=4, **ON),
    "miss": peft.MissConfig(r=4, **ON),
    "shira": peft.ShiraConfig(r=2, **ON),
    "vera": peft.VeraConfig(r=4, **ON),
}
LORA = peft.LoraConfig(r=4, lora_alpha=2, lora_dropout=0.1, task_type="CAUSAL_LM", **ON)
WEIGHTS = (0.5, -1.5)


def base() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(SIZES)


def trained(config: Any, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = peft.get_peft_model(base(), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    model.save_pretrained(folder)
    return folder


def effect(folder: Path) -> Mapping[str, torch.Tensor]:
    """What peft adds to each weight."""
    before = dict(base().named_parameters())
    after = peft.PeftModel.from_pretrained(base(), folder).merge_and_unload().named_parameters()
    return {name: (weight - before[name]).detach().double() for name, weight in after}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")
    base().save_pretrained(folder / "base")
    for seed, (name, config) in enumerate({"lora": LORA, **KINDS}.items()):
        trained(config, folder / name, seed)
    return folder


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_with_lora(kind: str, first: bool, made: Path, tmp_path: Path) -> None:
    names = [kind, "lora"][:: 1 if first else -1]
    reading = {"base": str(made / "base")}
    out = tmp_path / "out"
    ao.merge([made / name for name in names], out, "svd", weights=WEIGHTS, rank=32, reading=reading)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert set(config) <= set(json.loads((made / "lora" / "adapter_config.json").read_text()))
    one, two = (effect(made / name) for name in names)
    for name, found in effect(out).items():
        wanted = WEIGHTS[0] * one[name] + WEIGHTS[1] * two[name]
        assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm()) + 1e-12, name


@pytest.mark.parametrize("method", ["tsv", "iso_c", "knots"])
@pytest.mark.parametrize("kind", KINDS)
def test_methods_on_singular_vectors_take_every_kind(kind: str, method: str, made: Path, tmp_path: Path) -> None:
    """At full rank Iso-C has the sum's vectors, KnOTS that prunes nothing is the sum, and TSV adds no energy."""
    reading, out = {"base": str(made / "base")}, tmp_path / "out"
    more = {"inner": "dare_linear", "density": 1.0} if method == "knots" else {}
    ao.merge([made / kind, made / "lora"], out, method, weights=WEIGHTS, rank=32, reading=reading, **more)
    one, two = effect(made / kind), effect(made / "lora")
    for name, found in effect(out).items():
        total = WEIGHTS[0] * one[name] + WEIGHTS[1] * two[name]
        if not total.any():
            assert not found.any()
        elif method == "knots":
            assert float((found - total).norm()) <= 1e-4 * float(total.norm())
        elif method == "iso_c":
            u, s, vh = torch.linalg.svd(total, full_matrices=False)
            there = int((s > 1e-5 * s[0]).sum())
            wanted = u[:, :there] @ vh[:there] * s[:there].mean()
            assert float((found - wanted).norm()) <= 1e-3 * float(wanted.norm())
        else:
            sizes = [w * torch.linalg.svdvals(e[name]) for w, e in zip(WEIGHTS, (one, two), strict=True)]
            assert float(found.norm()) <= float(torch.cat(sizes).norm()) * (1 + 1e-4)
            assert found.any()


def test_what_only_the_second_says_of_any_method_is_kept(made: Path, tmp_path: Path) -> None:
    ao.merge([made / "vera", made / "lora"], tmp_path / "out", "svd", rank=32, reading={"base": str(made / "base")})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert not config["lora_dropout"]
