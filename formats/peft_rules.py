"""PEFT's own rules of `adapterops validate`: the config against the tensors.

What peft does was read in, and tried with, peft 0.21.2: `config.py`, `peft_model.py`, `utils/save_and_load.py`,
`tuners/tuners_utils.py`, `tuners/lora/layer.py`.
"""

from __future__ import annotations

from adapterops_formats import (
    peft_rules_fields,
    peft_rules_others,
    peft_rules_saved,
    peft_rules_targets,
    peft_rules_tensors,
)

from adapterops.validation.registry import Checker
from adapterops.validation.rule import Rule

_PARTS = (peft_rules_fields, peft_rules_others, peft_rules_tensors, peft_rules_targets, peft_rules_saved)
RULES: tuple[Rule, ...] = tuple(rule for part in _PARTS for rule in part.RULES)
CHECKERS: tuple[Checker, ...] = tuple(check for part in _PARTS for check in part.CHECKERS)
