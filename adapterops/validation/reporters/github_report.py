"""`--format github`: workflow commands, which GitHub Actions shows beside the files of a change.

https://docs.github.com/en/actions/reference/workflow-commands-for-github-actions; what is escaped, and how, is from
`actions/toolkit`, packages/core/src/command.ts.
"""

from __future__ import annotations

from adapterops.validation.baseline import relative
from adapterops.validation.report import Report
from adapterops.validation.reporters import View, clean
from adapterops.validation.reporters.text_report import summary
from adapterops.validation.rule import Finding, Severity

_COMMANDS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "notice"}


def render(report: Report, view: View) -> str:
    """A command a finding, errors first (GitHub shows ten of a kind a step), and the summary for the log."""
    order = list(Severity)
    found = sorted(report, key=lambda finding: order.index(finding.severity))
    return "\n".join([*(_command(finding, view) for finding in found), *summary(report, View())])


def _command(finding: Finding, view: View) -> str:
    file = relative(finding.file, view.root) if view.root else finding.file
    title = f"{finding.code} {finding.rule.name}"
    message = f"{finding.message}\n{finding.remedy or finding.rule.remedy}"
    return f"::{_COMMANDS[finding.severity]} file={_property(file)},title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return clean(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
