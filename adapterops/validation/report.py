"""What validation found: all of it, in the order of the inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from adapterops.validation.rule import Finding, Rule, Severity


@dataclass(frozen=True, slots=True)
class Checked:
    """One adapter that was looked at: its name, what it was recognised as ("" where it was not), and its findings."""

    path: str
    dialect: str = ""
    architecture: str = ""
    modules: int = 0
    bytes: int = 0
    findings: tuple[Finding, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "path": self.path,
            "dialect": self.dialect or None,
            "architecture": self.architecture or None,
            "modules": self.modules,
            "bytes": self.bytes,
            "findings": [f.to_dict() for f in self.findings],
        }


@dataclass(frozen=True, slots=True, repr=False)
class Report:
    """The adapters that were looked at, in the order in which they were named, each with its findings.

    Iterating gives every finding: `[f for f in report if f.severity == "error"]`.

    `rules` are those that were asked; `accepted` counts findings that a baseline accepts, which are not in `adapters`.
    """

    adapters: tuple[Checked, ...]
    rules: tuple[Rule, ...]
    accepted: int = 0
    fixed: tuple[str, ...] = field(default=())
    """What `--fix` did, a line each."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{severity} {self.count(severity)}" for severity in Severity)
        return f"<Report: adapters {len(self.adapters)}, {counts}>"

    def __iter__(self) -> Iterator[Finding]:
        return (finding for adapter in self.adapters for finding in adapter.findings)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every finding."""
        return tuple(self)

    def count(self, severity: Severity) -> int:
        """How many findings are of a severity."""
        return sum(1 for finding in self if finding.severity is severity)

    @property
    def by_rule(self) -> dict[Rule, int]:
        """How many findings each rule has, most first."""
        counts = Counter(finding.rule.code for finding in self)
        rules = {finding.rule.code: finding.rule for finding in self}
        return {rules[code]: n for code, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}

    def exit_code(self, strict: bool = False) -> int:
        """1 with any error (`strict`: any warning too), else 0."""
        bad = self.count(Severity.ERROR) + (self.count(Severity.WARNING) if strict else 0)
        return 1 if bad else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "adapters": [a.to_dict() for a in self.adapters],
            "summary": {
                "adapters": len(self.adapters),
                **{str(s): self.count(s) for s in Severity},
                "fixable": sum(1 for f in self if f.fixable),
                "accepted": self.accepted,
                "by_rule": {rule.code: n for rule, n in self.by_rule.items()},
            },
            "fixed": list(self.fixed),
        }
