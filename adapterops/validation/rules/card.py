"""Model cards, licences, and what the header says of the file."""

from __future__ import annotations

from adapterops.validation.registry import Checker
from adapterops.validation.rule import Rule

RULES: tuple[Rule, ...] = ()
CHECKERS: tuple[Checker, ...] = ()
