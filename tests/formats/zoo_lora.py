"""LoRA and its variants."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from peft_zoo import IMAGE, LINE, SIGNAL, VOLUME, WORDS, Case, gpt2, llama

_ALL = ["wide", "tall", "square"]
_BLOCKS: dict[str, Any] = {"nblocks": 2, "target_modules_bd_b": ["wide", "square"]}


def _config(**fields: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=6, **fields)


def _positive(model: Any) -> None:
    """Magnitudes are of the size of norms, not noise about zero; a saved head is the base's."""
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.abs_().add_(1)
    for module in model.base_model.model.modules():
        if hasattr(module, "modules_to_save"):
            module.modules_to_save["default"].weight.data.copy_(module.original_module.weight)


CASES: dict[str, Case] = {
    "lora, linear": Case(LINE, _config(target_modules=_ALL), alpha=6),
    "lora, patterns": Case(
        LINE,
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=_ALL,
            rank_pattern={"tall": 2},
            alpha_pattern={"square": 3},
            use_rslora=True,
        ),
        assumed={"use_rslora": True, "alpha_pattern": {"square": 3}},
        alpha=6,
    ),
    "lora, dora": Case(LINE, _config(target_modules=_ALL, use_dora=True), alpha=6, shape=_positive),
    "lora, bias": Case(LINE, _config(target_modules=_ALL[:2], lora_bias=True), alpha=6),
    "lora, 2-d convolution": Case(
        IMAGE, _config(target_modules=["conv", "point"], use_dora=True), alpha=6, shape=_positive
    ),
    "lora, 1-d convolution": Case(SIGNAL, _config(target_modules=["conv"]), alpha=6),
    "lora, 3-d convolution": Case(VOLUME, _config(target_modules=["conv"]), alpha=6),
    "lora, embedding": Case(WORDS, _config(target_modules=["words", "other"]), alpha=6),
    "lora, transposed": Case(
        gpt2,
        _config(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True),
        assumed={"fan_in_fan_out": True},
        alpha=6,
    ),
    "lora, head": Case(
        llama, _config(target_modules=["q_proj"], modules_to_save=["lm_head"]), alpha=6, shape=_positive
    ),
    "lora, kasa": Case(LINE, _config(target_modules=_ALL, kasa_config=KasaConfig()), alpha=6),
    "lora, blocks": Case(LINE, _config(target_modules=["wide", "square"], use_bdlora=BdLoraConfig(**_BLOCKS)), alpha=6),
    "lora, some blocks": Case(
        LINE,
        _config(target_modules=_ALL, use_bdlora=BdLoraConfig(**_BLOCKS, match_strict=False)),
        alpha=6,
    ),
    "lora, blocks in A": Case(
        LINE,
        _config(target_modules=_ALL[:2], use_bdlora=BdLoraConfig(nblocks=2, target_modules_bd_a=_ALL[:2])),
        said={"use_bdlora": {"nblocks": 2, "target_modules_bd_a": _ALL[:2]}},
        base_needed=True,
        alpha=6,
    ),
    "lora, monteclora": Case(
        LINE,
        _config(target_modules=_ALL[:2], monteclora_config=MontecloraConfig(num_samples=3, buffer_size=2)),
        alpha=6,
    ),
    "lora, velora": Case(LINE, _config(target_modules=["tall"], velora_config=VeloraConfig(num_groups=4)), alpha=6),
    "lora, mica": Case(LINE, _config(target_modules=_ALL, init_lora_weights="mica"), alpha=6),
}
