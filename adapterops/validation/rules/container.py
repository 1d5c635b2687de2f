"""Files and containers: what opening a file tells, and names that loaders do not look for."""

from __future__ import annotations

from adapterops.validation.registry import Checker
from adapterops.validation.rule import Rule, Severity

UNREADABLE = Rule(
    "F001",
    "unreadable-file",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("unreadable",),
)
BAD_HEADER = Rule(
    "F002",
    "bad-header",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("header",),
)
UNSAFE_PICKLE = Rule(
    "F010",
    "unsafe-pickle",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("unsafe-pickle",),
)
NOT_AN_ADAPTER = Rule(
    "F020",
    "not-an-adapter",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("not-an-adapter",),
)
UNSUPPORTED = Rule(
    "F021",
    "not-converted",
    Severity.INFO,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("unsupported",),
)
TWO_DIALECTS = Rule(
    "F022",
    "two-dialects",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("mixture",),
)
UNCLAIMED = Rule(
    "F023",
    "unknown-keys",
    Severity.ERROR,
    why="",
    remedy="",
    fires="",
    passes="",
    faults=("unclaimed",),
)

RULES: tuple[Rule, ...] = (
    UNREADABLE,
    BAD_HEADER,
    UNSAFE_PICKLE,
    NOT_AN_ADAPTER,
    UNSUPPORTED,
    TWO_DIALECTS,
    UNCLAIMED,
)
CHECKERS: tuple[Checker, ...] = ()
