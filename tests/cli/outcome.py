"""What running a command gave."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """The exit status, and what went to stdout and stderr."""

    code: int
    out: str
    err: str
