"""(IA)³ in PEFT configs.  Source: huggingface/peft 0.21.2 `tuners/ia3/config.py`."""

from __future__ import annotations

from adapterops_formats import peft_ia3
from adapterops_formats.peft_kinds.row import PeftMethod, defaults

IA3 = PeftMethod(
    "IA3",
    "ia3",
    "(IA)³",
    rank="",
    shaping=("feedforward_modules",),
    narrowing=("exclude_modules",),
    flags=("fan_in_fan_out",),
    known=("init_ia3_weights",),
    defaults=defaults("IA3", fan_in_fan_out=False, init_ia3_weights=True, modules_to_save=None),
    fields=peft_ia3.fields,
    problems=peft_ia3.problems,
    options=peft_ia3.options,
)
