"""`--format text`: for people, a group of lines an adapter, a table where there are several, and a summary."""

from __future__ import annotations

from collections.abc import Iterator

from adapterops.cli.text import plural, table
from adapterops.validation.report import Checked, Report
from adapterops.validation.reporters import View, clean, one_line
from adapterops.validation.rule import Finding, Severity

_COLORS = {Severity.ERROR: "31", Severity.WARNING: "33", Severity.INFO: "36"}
_SHOWN = 3
"""Tensors that are named below a message which names none."""


def render(report: Report, view: View) -> str:
    """The findings, worst first in each adapter, then the table by rule, then the summary."""
    lines: list[str] = []
    if not view.statistics:
        for adapter in report.adapters:
            if adapter.findings:
                lines += [*_adapter(adapter, view), ""]
    found = [adapter for adapter in report.adapters if adapter.findings]
    if found and (view.statistics or len(report.adapters) > 1):
        lines += [*_table(report), ""]
    return "\n".join([*lines, *summary(report, view)])


def summary(report: Report, view: View) -> list[str]:
    """What was looked at and found, in a line; and before it, what was mended."""
    mended = [f"{_painted('Fixed', '32', view)} {one_line(line)}" for line in report.fixed]
    total, checked = len(report.findings), plural(len(report.adapters), "adapter")
    accepted = f" ({plural(report.accepted, 'finding')} accepted by the baseline)" if report.accepted else ""
    if not report.rules and not total:
        return [*mended, f"Nothing was checked: no rule is left to ask ({checked})"]
    if not total:
        verdict = _painted("All checks passed", "32", view)
        return [*mended, f"{verdict}: {checked}, {plural(len(report.rules), 'rule')}{accepted}"]
    counts = [(report.count(severity), severity) for severity in Severity]
    said = ", ".join(_painted(plural(n, str(s)), _COLORS[s], view) for n, s in counts if n)
    fixable = sum(1 for finding in report if finding.fixable)
    mending = f"; {fixable} fixable with --fix" if fixable else ""
    return [*mended, f"Checked {checked}: {said}{mending}{accepted}"]


def _adapter(adapter: Checked, view: View) -> Iterator[str]:
    order = list(Severity)
    for finding in sorted(adapter.findings, key=lambda f: order.index(f.severity)):
        yield from _finding(finding, view)


def _finding(finding: Finding, view: View) -> Iterator[str]:
    mark = " [*]" if finding.fixable else ""
    head = _painted(f"{finding.severity} {finding.code}", _COLORS[finding.severity], view)
    message = one_line(finding.message)
    yield f"{_painted(one_line(finding.file), '1', view)}: {head}{mark} {message}"
    if finding.where and not any(clean(key) in message for key in finding.where):
        rest = len(finding.where) - _SHOWN
        shown = ", ".join(one_line(key[:120]) for key in finding.where[:_SHOWN])
        yield f"    tensors: {shown}" + (f" and {rest} more" if rest > 0 else "")
    if finding.field and finding.field not in message:
        yield f"    field: {one_line(finding.field)}"
    yield f"    {_painted('help:', '36', view)} {one_line(finding.remedy or finding.rule.remedy)}"


def _table(report: Report) -> list[str]:
    rows = []
    for rule, count in report.by_rule.items():
        adapters = sum(1 for a in report.adapters if any(f.code == rule.code for f in a.findings))
        fixable = sum(1 for f in report if f.code == rule.code and f.fixable)
        rows.append(
            [str(count), str(adapters), rule.code, str(rule.severity), f"[{fixable}]" if fixable else "", rule.name]
        )
    return table(["findings", "adapters", "code", "severity", "fixable", "rule"], rows)


def _painted(text: str, code: str, view: View) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if view.color else text
