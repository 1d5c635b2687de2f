"""Tensors by themselves: halves, ranks, shapes, values."""

from __future__ import annotations

from adapterops.validation.registry import Checker
from adapterops.validation.rule import Rule, Severity

MISSING_HALF = Rule(
    "T101",
    "missing-half",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("missing-half",),
)
RANKS = Rule(
    "T102",
    "ranks-disagree",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("ranks",),
)
SHAPE = Rule(
    "T103",
    "impossible-shape",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("impossible-shape",),
)
TWICE = Rule(
    "T104",
    "module-twice",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("twice",),
)
NOT_FINITE = Rule(
    "T110",
    "not-finite",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("not-finite",),
)

RULES: tuple[Rule, ...] = (
    MISSING_HALF,
    RANKS,
    SHAPE,
    TWICE,
    NOT_FINITE,
)
CHECKERS: tuple[Checker, ...] = ()
