"""`--format junit`: a suite an adapter, as Jenkins' xUnit plugin (junit-10.xsd) and Ant's JUnitReport read it.

A case fails where the exit status does: for errors, and with `--strict` for warnings.  What else was found stands in the
suite's output.  An adapter with no failure has one case that passes.
"""

from __future__ import annotations

import os
import time
from xml.sax.saxutils import escape, quoteattr

from adapterops.validation.report import Checked, Report
from adapterops.validation.reporters import View, clean
from adapterops.validation.rule import Finding, Severity


def render(report: Report, view: View) -> str:
    """The document; its only fact of the moment is the time (SOURCE_DATE_EPOCH, where that is set)."""
    now = time.gmtime(float(os.environ.get("SOURCE_DATE_EPOCH") or time.time()))
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", now)
    suites = [_suite(number, adapter, stamp, view) for number, adapter in enumerate(report.adapters)]
    return "\n".join(['<?xml version="1.0" encoding="UTF-8"?>', "<testsuites>", *suites, "</testsuites>"])


def _suite(number: int, adapter: Checked, stamp: str, view: View) -> str:
    failing = [f for f in adapter.findings if _fails(f, view)]
    others = [f for f in adapter.findings if not _fails(f, view)]
    name = _attribute(adapter.path)
    cases = [_case(finding, name) for finding in failing]
    if not failing:
        cases = [f'    <testcase name="sound" classname={name} time="0"/>']
    said = "\n".join(f"{f.severity} {_text(f)}" for f in others)
    return "\n".join(
        [
            f'  <testsuite name={name} package="adapterops" id="{number}" timestamp="{stamp}" hostname="localhost" '
            f'tests="{len(cases)}" failures="{len(failing)}" errors="0" skipped="0" time="0">',
            "    <properties>",
            f'      <property name="dialect" value={_attribute(adapter.dialect)}/>',
            f'      <property name="architecture" value={_attribute(adapter.architecture)}/>',
            "    </properties>",
            *cases,
            f"    <system-out>{escape(said)}</system-out>",
            "    <system-err></system-err>",
            "  </testsuite>",
        ]
    )


def _case(finding: Finding, name: str) -> str:
    title, message = _attribute(f"{finding.code} {finding.rule.name}"), _attribute(finding.message)
    return "\n".join(
        [
            f'    <testcase name={title} classname={name} time="0">',
            f'      <failure type="{finding.severity}" message={message}>{escape(_text(finding))}</failure>',
            "    </testcase>",
        ]
    )


def _text(finding: Finding) -> str:
    where = "".join(f"\n  {clean(key)}" for key in finding.where[:20])
    rest = f"\n  and {len(finding.where) - 20} more" if len(finding.where) > 20 else ""
    remedy = clean(finding.remedy or finding.rule.remedy)
    return f"{clean(finding.file)}: {finding.code} {clean(finding.message)}{where}{rest}\n{remedy}"


def _fails(finding: Finding, view: View) -> bool:
    return finding.severity is Severity.ERROR or (view.strict and finding.severity is Severity.WARNING)


def _attribute(text: str) -> str:
    return quoteattr(clean(text))
