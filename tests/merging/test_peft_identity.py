"""One adapter under weight 1 comes back as it was, in every form of PEFT's LoRA, or is refused (huggingface/peft#3761: peft's
own merges change four of them without a word)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from transformers import LlamaConfig, LlamaForCausalLM

import adapterops as ao
from adapterops.errors import AdapterOpsError

SIZES = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50, max_position_embeddings=8
)  # fmt: skip
TOKENS = torch.arange(8).reshape(1, 8)
SOUND: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "biases": {"lora_bias": True},
    "magnitudes": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 7}},
    "velora": {"velora_config": VeloraConfig()},
    "monteclora": {"monteclora_config": MontecloraConfig()},
    "saved": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [1, 3]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "parameters": {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]},
    "replicated": {"layer_replication": [[0, 1], [0, 1]]},
}
BLOCKS = BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["v_proj"], nblocks=2, match_strict=False)
METHODS: dict[str, dict[str, Any]] = {"linear": {}, "cat": {}, "svd": {}, "ties": {"density": 1.0}}


def base() -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(SIZES)
    return model.eval()


def trained(folder: Path, said: dict[str, Any]) -> Path:
    usual = {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(base(), peft.LoraConfig(**{**usual, **said}))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) / 10 + ("magnitude" in name)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder: Path | None = None) -> torch.Tensor:
    model = base() if folder is None else peft.PeftModel.from_pretrained(base(), folder).eval()
    out: torch.Tensor = model(TOKENS).logits
    return out


@pytest.mark.parametrize("name", SOUND)
def test_what_the_model_says_stays(name: str, tmp_path: Path) -> None:
    source = trained(tmp_path / "source", SOUND[name])
    wanted = logits(source)
    assert (wanted - logits()).norm() > 0.01 * wanted.norm()
    for method, options in METHODS.items():
        ao.merge([source], tmp_path / method, method, **options)
        assert (logits(tmp_path / method) - wanted).norm() <= 1e-6 * wanted.norm(), method


@pytest.mark.parametrize("method", METHODS)
def test_blocks_on_the_diagonal(method: str, tmp_path: Path) -> None:
    """BD-LoRA's factors are none of the weight's: methods on factors refuse them and say which do not."""
    source = trained(tmp_path / "source", {"use_bdlora": BLOCKS})
    if method in ("linear", "ties"):
        with pytest.raises(AdapterOpsError, match=r"--method svd|--space delta"):
            ao.merge([source], tmp_path / "out", method, **METHODS[method])
        assert not (tmp_path / "out").exists()
        return
    ao.merge([source], tmp_path / "out", method)
    wanted = logits(source)
    assert (logits(tmp_path / "out") - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(
    ("said", "why"),
    [({"kasa_config": KasaConfig()}, "KaSA"), ({"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"}, "aLoRA")],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_no_delta_is_refused(said: dict[str, Any], why: str, method: str, tmp_path: Path) -> None:
    source = trained(tmp_path / "source", said)
    with pytest.raises(AdapterOpsError, match=why):
        ao.merge([source], tmp_path / "out", method, **METHODS[method])
    assert not (tmp_path / "out").exists()
