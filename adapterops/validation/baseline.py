"""A baseline: today's findings, accepted, so that only new ones are told.

A JSON file that is made to be looked at and merged: one finding a line, in a stable order.  A finding is known by its
adapter (relative to the baseline's folder), its rule's code, and a hash of the file, the field and the tensors that it is
about; not by its message, which may be worded better tomorrow.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from adapterops.errors import OutputFailed, UsageError
from adapterops.storage.hub import PREFIX as HUB
from adapterops.validation.report import Report
from adapterops.validation.rule import Finding

_VERSION = 1
_MAX_BYTES = 64 << 20
"""Bytes of a baseline that are read."""
Entry = tuple[str, str, str]
"""An adapter, a rule's code, and what the finding is about."""


@dataclass(frozen=True, slots=True)
class Baseline:
    """The findings that are accepted; of equal ones, how many."""

    path: str
    entries: Counter[Entry]


def load(path: str) -> Baseline:
    """Read a baseline.  Raises `UsageError` where there is none, and for what is none."""
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}; --write-baseline {path} makes a baseline") from error
    if len(text) > _MAX_BYTES:
        raise UsageError(f"{path}: is no baseline: it is larger than {_MAX_BYTES >> 20} MiB")
    try:
        document = json.loads(text)
        if document["version"] != _VERSION:
            raise UsageError(
                f"{path}: is a baseline of version {document['version']!r}; this adapterops knows {_VERSION}"
            )
        found = [(entry["adapter"], entry["code"], entry["at"]) for entry in document["findings"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(f"{path}: is no baseline as --write-baseline makes it: {error}") from error
    return Baseline(path, Counter(tuple(map(str, entry)) for entry in found))  # type: ignore[misc]


def write(path: str, report: Report) -> None:
    """Write a baseline of all findings of a report, whole or not at all.  Raises `OutputFailed`."""
    root = _root(path)
    entries = sorted(entry_of(finding, root) for finding in report)
    lines = [
        json.dumps({"adapter": adapter, "code": code, "at": at}, separators=(", ", ": "))
        for adapter, code, at in entries
    ]
    body = ",\n".join(f"    {line}" for line in lines)
    text = f'{{\n  "version": {_VERSION},\n  "findings": [{chr(10) if body else ""}{body}{chr(10) + "  " if body else ""}]\n}}\n'
    partial = f"{path}.{os.urandom(4).hex()}"
    try:
        try:
            with open(partial, "x", encoding="ascii") as file:
                file.write(text)
            os.replace(partial, path)
        finally:
            if os.path.exists(partial):
                os.unlink(partial)
    except OSError as error:
        raise OutputFailed(f"{path}: cannot be written: {error.strerror}") from error


def apply(baseline: Baseline, report: Report) -> tuple[Report, int]:
    """The report without what the baseline accepts, and how many of its entries match nothing any more.

    Entries of adapters that are there and were not looked at, and of rules that were not asked, are left alone.
    """
    root = _root(baseline.path)
    left = baseline.entries.copy()

    def is_new(finding: Finding) -> bool:
        entry = entry_of(finding, root)
        if left[entry] < 1:
            return True
        left[entry] -= 1
        return False

    adapters = tuple(replace(a, findings=tuple(filter(is_new, a.findings))) for a in report.adapters)
    accepted = sum(baseline.entries.values()) - sum(left.values())
    checked = {relative(adapter.path, root) for adapter in report.adapters}
    asked = {rule.code for rule in report.rules}

    def is_stale(entry: Entry) -> bool:
        adapter, code, _ = entry
        if adapter in checked:
            return code in asked
        return not adapter.startswith(HUB) and not os.path.lexists(os.path.join(root, adapter))

    stale = sum(count for entry, count in left.items() if count and is_stale(entry))
    return replace(report, adapters=adapters, accepted=report.accepted + accepted), stale


def entry_of(finding: Finding, root: str) -> Entry:
    """What a finding is known by, with paths relative to a folder."""
    about = [relative(finding.file, root), finding.field, *sorted(finding.where)]
    at = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    return relative(finding.adapter, root), finding.code, at


def fingerprints(findings: Iterable[Finding], root: str) -> list[str]:
    """A hash of each finding that stays when others come and go."""
    seen: Counter[Entry] = Counter()
    out = []
    for finding in findings:
        entry = entry_of(finding, root)
        seen[entry] += 1
        out.append(hashlib.sha256(json.dumps([*entry, seen[entry]]).encode()).hexdigest()[:32])
    return out


def relative(path: str, root: str) -> str:
    """A path as seen from a folder, with slashes; names on the Hub stay as they are."""
    return path if path.startswith(HUB) else os.path.relpath(os.path.abspath(path), root).replace(os.sep, "/")


def _root(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))
