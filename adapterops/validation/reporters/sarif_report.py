"""`--format sarif`: SARIF 2.1.0 (OASIS), as code scanning services take it.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/sarif-v2.1.0.html; GitHub wants a line of every result, so binary files have
line 1 (https://docs.github.com/en/code-security/reference/code-scanning/sarif-support-for-code-scanning).
"""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import quote

from adapterops import __version__
from adapterops.storage.hub import PREFIX as HUB
from adapterops.validation.baseline import fingerprints, relative
from adapterops.validation.report import Report
from adapterops.validation.reporters import View
from adapterops.validation.reporters.rule_page import examples, page
from adapterops.validation.rule import GROUPS, Finding, Rule, Severity

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {Severity.ERROR: "error", Severity.WARNING: "warning", Severity.INFO: "note"}
_MAX_TENSORS = 20
"""Tensors that a result names as logical locations; its properties say how many there are."""


def render(report: Report, view: View) -> str:
    """A log of one run, with every rule that was asked."""
    rules = sorted({rule.code: rule for rule in (*report.rules, *report.by_rule)}.values(), key=lambda rule: rule.code)
    numbers = {rule.code: number for number, rule in enumerate(rules)}
    root = view.root or os.getcwd()
    marks = fingerprints(report, root)
    run = {
        "tool": {
            "driver": {
                "name": "adapterops",
                "version": __version__,
                "semanticVersion": __version__,
                "rules": [_rule(rule) for rule in rules],
            }
        },
        "columnKind": "unicodeCodePoints",
        "invocations": [
            {
                "executionSuccessful": not any(rule.group == "X" for rule in report.by_rule),
                "exitCode": report.exit_code(view.strict),
            }
        ],
        "results": [_result(f, numbers[f.code], mark, root) for f, mark in zip(report, marks, strict=True)],
    }
    return json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.code,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": rule.name.replace("-", " ")},
        "fullDescription": {"text": rule.why or rule.name},
        "help": {"text": f"{rule.why}\n{rule.remedy}\n{examples(rule)}", "markdown": page(rule)},
        "defaultConfiguration": {"level": _LEVELS[rule.severity]},
        "properties": {"tags": [GROUPS[rule.group]], "fixable": rule.fixable},
    }


def _result(finding: Finding, number: int, mark: str, root: str) -> dict[str, Any]:
    location: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": _artifact(finding.file, root), "region": {"startLine": 1}}
    }
    logical = [{"name": key, "fullyQualifiedName": key, "kind": "member"} for key in finding.where[:_MAX_TENSORS]]
    if finding.field:
        logical.append({"name": finding.field, "fullyQualifiedName": finding.field, "kind": "property"})
    if logical:
        location["logicalLocations"] = logical
    return {
        "ruleId": finding.code,
        "ruleIndex": number,
        "level": _LEVELS[finding.severity],
        "message": {"text": f"{finding.message}\n{finding.remedy or finding.rule.remedy}"},
        "locations": [location],
        "partialFingerprints": {"adapteropsFinding/v1": mark},
        "properties": {
            "adapter": finding.adapter,
            "tensors": len(finding.where),
            "fix": finding.change.about if finding.change is not None else None,
        },
    }


def _artifact(path: str, root: str) -> dict[str, str]:
    if path.startswith(HUB):
        return {"uri": quote(path, safe=":/@")}
    name = relative(path, root)
    if name.startswith("../"):
        return {"uri": "file://" + quote(os.path.abspath(path).encode(errors="surrogateescape"))}
    return {"uri": quote(name.encode(errors="surrogateescape")), "uriBaseId": "%SRCROOT%"}
