"""What the loaders named by --targets drop, misread or refuse."""

from __future__ import annotations

from adapterops.validation.registry import Checker
from adapterops.validation.rule import Rule

RULES: tuple[Rule, ...] = ()
CHECKERS: tuple[Checker, ...] = ()
