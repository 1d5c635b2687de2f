"""What a report looks like: one file an output format, each with `render(report, view) -> str`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import cast

from adapterops.validation.report import Report

FORMATS = ("text", "json", "sarif", "junit", "github")
"""The output formats."""


@dataclass(frozen=True, slots=True)
class View:
    """How a report is shown: whether warnings fail too, in colour, as counts only, paths seen from which folder."""

    strict: bool = False
    color: bool = False
    statistics: bool = False
    root: str = ""


def render(name: str, report: Report, view: View) -> str:
    """The report in a format, without a line break at its end."""
    module = importlib.import_module(f"adapterops.validation.reporters.{name}_report")
    return cast(str, module.render(report, view))


def clean(text: str) -> str:
    """Text of strangers for a terminal or a document: what does not print is escaped, but for line breaks."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """`clean`, with line breaks as spaces."""
    return clean(" ".join(text.splitlines()) if "\n" in text or "\r" in text else text)
