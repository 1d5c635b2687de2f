"""Modules against the base model."""

from __future__ import annotations

from adapterops.validation.registry import Checker
from adapterops.validation.rule import Rule, Severity

UNKNOWN_MODULE = Rule(
    "B301",
    "unknown-module",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("unknown-module",),
)
OTHER_SHAPE = Rule(
    "B302",
    "other-shape",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("other-shape",),
)
UNKNOWN_BASE = Rule(
    "B303",
    "unknown-base",
    Severity.INFO,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("unknown-architecture",),
)

RULES: tuple[Rule, ...] = (
    UNKNOWN_MODULE,
    OTHER_SHAPE,
    UNKNOWN_BASE,
)
CHECKERS: tuple[Checker, ...] = ()
