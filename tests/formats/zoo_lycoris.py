"""LoHa, LoKr and (IA)³."""

from __future__ import annotations

from peft import IA3Config, LoHaConfig, LoKrConfig
from peft_zoo import IMAGE, LINE, Case, gpt2, llama

_LINE = ["wide", "tall", "square"]
_IMAGE = ["conv", "point"]
CASES: dict[str, Case] = {
    "loha, linear": Case(LINE, LoHaConfig(r=3, alpha=5, target_modules=_LINE), alpha=5),
    "loha, convolution": Case(IMAGE, LoHaConfig(r=3, alpha=5, target_modules=_IMAGE), alpha=5),
    "lokr, linear": Case(LINE, LoKrConfig(r=1, alpha=3, target_modules=["tall", "square"]), alpha=3),
    "lokr, convolution": Case(IMAGE, LoKrConfig(r=1, alpha=3, target_modules=["conv"], decompose_factor=4), alpha=3),
    "ia3, linear": Case(LINE, IA3Config(target_modules=_LINE[:2], feedforward_modules=["wide"])),
    "ia3, convolution": Case(
        IMAGE,
        IA3Config(target_modules=_IMAGE, feedforward_modules=["point"]),
        said={"feedforward_modules": ["point"]},
    ),
    "ia3, transposed": Case(
        gpt2,
        IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
    ),
    "ia3, llama": Case(llama, IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
}
