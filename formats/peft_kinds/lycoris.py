"""LoHa and LoKr in PEFT configs.  Source: huggingface/peft 0.21.2 `tuners/loha/config.py`, `tuners/lokr/config.py`."""

from __future__ import annotations

from adapterops_formats import peft_conv, peft_lokr
from adapterops_formats.peft_kinds.row import PeftMethod, defaults

_LYCORIS = {"rank_dropout": 0.0, "module_dropout": 0.0, "init_weights": True, "modules_to_save": None}

LOHA = PeftMethod(
    "LOHA",
    "loha",
    "LoHa",
    alpha="alpha",
    shaping=("use_effective_conv2d",),
    known=("rank_dropout", "module_dropout", "init_weights"),
    defaults=defaults("LOHA", **_LYCORIS),
    fields=peft_conv.effective,
    problems=peft_conv.problems,
)
LOKR = PeftMethod(
    "LOKR",
    "lokr",
    "LoKr",
    alpha="alpha",
    shaping=("decompose_both", "decompose_factor", "use_effective_conv2d"),
    known=("rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights"),
    defaults=defaults("LOKR", **_LYCORIS),
    fields=peft_lokr.fields,
    problems=peft_lokr.problems,
    ranks=peft_lokr.ranks,
    options=peft_lokr.options,
)
