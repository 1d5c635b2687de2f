"""Write `docs/rules.md` from the rules themselves: `.venv/bin/python scripts/rules.py`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from adapterops.validation import registry
from adapterops.validation.reporters.rule_page import page
from adapterops.validation.rule import GROUPS, Rule, Severity

TARGET = Path(__file__).parent.parent / "docs" / "rules.md"
HEAD = """# Rules of `adapterops validate`

Written by `scripts/rules.py` from the rules themselves; `adapterops rule CODE` prints a rule's part.

An **error** makes a loader fail, or compute something other than what was trained. A **warning** loads, but is probably not
meant. An **info** is about cards, licences, and what the usual tools do by default. `--select` and `--ignore` take codes
(`T101`), beginnings of codes (`T`, `C2`), names and `ALL`; the more exact one wins. Codes stay what they are.
"""


def text(rules: tuple[Rule, ...] | None = None) -> str:
    """The page's text."""
    rules = registry.rules() if rules is None else rules
    counts = ", ".join(f"{sum(r.severity is severity for r in rules)} {severity}s" for severity in Severity)
    fixable = sum(rule.fixable for rule in rules)
    out = [HEAD, f"{len(rules)} rules: {counts}; `--fix` mends what {fixable} of them find.\n"]
    groups = [(letter, list(own)) for letter, own in groupby(rules, key=lambda rule: rule.group)]
    for letter, own in groups:
        out.append(f"## {letter}: {GROUPS[letter]}\n")
        out.append("| code | name | severity | `--fix` |\n| --- | --- | --- | --- |")
        out += [
            f"| [{r.code}](#{r.code.lower()}) | {r.name} | {r.severity} | {'yes' if r.fixable else ''} |" for r in own
        ]
        out.append("")
        for rule in own:
            out.append(f'<a id="{rule.code.lower()}"></a>\n\n{page(rule, 3)}\n')
    return "\n".join(out).rstrip() + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
