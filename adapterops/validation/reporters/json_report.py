"""`--format json`: the report as one document, in ASCII."""

from __future__ import annotations

import json

from adapterops.validation.report import Report
from adapterops.validation.reporters import View


def render(report: Report, view: View) -> str:
    """`Report.to_dict()`."""
    return json.dumps(report.to_dict(), indent=2)
