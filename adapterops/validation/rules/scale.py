"""Alpha and the scale that loaders compute from it."""

from __future__ import annotations

from adapterops.validation.registry import Checker
from adapterops.validation.rule import Rule, Severity

TWO_ALPHAS = Rule(
    "S401",
    "two-alphas",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("two-alphas",),
)
CONFLICT = Rule(
    "S402",
    "conflict",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("conflict",),
)
UNKNOWN_FACT = Rule(
    "S403",
    "unknown-fact",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("unknown-fact",),
)

RULES: tuple[Rule, ...] = (
    TWO_ALPHAS,
    CONFLICT,
    UNKNOWN_FACT,
)
CHECKERS: tuple[Checker, ...] = ()
