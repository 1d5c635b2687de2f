"""AdaLoRA."""

from __future__ import annotations

from typing import Any

import torch
from peft import AdaLoraConfig
from peft_zoo import IMAGE, LINE, Case, gpt2, llama


def _config(alpha: int = 6, **fields: Any) -> AdaLoraConfig:
    return AdaLoraConfig(init_r=4, lora_alpha=alpha, total_step=10, **fields)


def _shaped(model: Any) -> None:
    """What training keeps true: n is no noise, masked values are zero, and the head is the base's."""
    ranks = model.peft_config["default"].rank_pattern or {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "ranknum"):
            module.ranknum["default"].data.fill_(4)
            kept = torch.tensor(ranks.get(f"{name}.lora_E", [True] * 4))
            module.lora_E["default"].data[~kept] = 0
        if hasattr(module, "modules_to_save"):
            module.modules_to_save["default"].weight.data.copy_(module.original_module.weight)


_RANKS = {"wide": [True, False, True, True], "tall": [True] * 4, "square": [False, False, True, False]}
_PATTERN = {f"{name}.lora_E": mask for name, mask in _RANKS.items()}
_GPT2 = {"fan_in_fan_out": True}
CASES: dict[str, Case] = {
    "adalora, linear": Case(LINE, _config(target_modules=["wide", "tall", "square"]), alpha=6, shape=_shaped),
    "adalora, convolution": Case(IMAGE, _config(target_modules=["conv", "point"]), alpha=6, shape=_shaped),
    "adalora, transposed": Case(
        gpt2, _config(target_modules=["c_attn"], **_GPT2), alpha=6, assumed=_GPT2, shape=_shaped
    ),
    "adalora, ranks": Case(
        LINE,
        _config(target_modules=list(_RANKS), rank_pattern=_PATTERN),
        said={"init_r": 4},
        alpha=6,
        shape=_shaped,
    ),
    "adalora, alpha of zero": Case(LINE, _config(0, target_modules=["wide", "tall"]), alpha=0.0, shape=_shaped),
    "adalora, head": Case(
        llama, _config(target_modules=["q_proj"], modules_to_save=["lm_head"]), alpha=6, shape=_shaped
    ),
}
