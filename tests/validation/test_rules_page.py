"""`docs/rules.md` is what the rules say today, and every rule says what it must."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

from adapterops.validation import registry
from adapterops.validation.rule import GROUPS

_SCRIPT = Path(__file__).parents[2] / "scripts" / "rules.py"


def _script() -> object:
    spec = importlib.util.spec_from_file_location("rules_script", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_todays() -> None:
    script = _script()
    again = "run .venv/bin/python scripts/rules.py"
    assert Path(script.TARGET).read_text(encoding="utf-8") == script.text(), again  # type: ignore[attr-defined]


def test_every_rule_has_a_section_that_is_linked() -> None:
    page = _script().text()  # type: ignore[attr-defined]
    for rule in registry.rules():
        assert page.count(f'<a id="{rule.code.lower()}"></a>\n\n### {rule.code}: {rule.name}\n') == 1
        assert page.count(f"| [{rule.code}](#{rule.code.lower()}) |") == 1


def test_every_rule_says_what_it_must() -> None:
    for rule in registry.rules():
        assert re.fullmatch(r"[A-Z]\d{3}", rule.code), rule.code
        assert rule.group in GROUPS, rule.code
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule.name), rule.name
        for text in (rule.why, rule.remedy, rule.fires, rule.passes):
            assert text.strip(), rule.code
        assert rule.why.rstrip().endswith("."), rule.code
    for words in (
        [rule.code for rule in registry.rules()],
        [rule.name for rule in registry.rules()],
        [fault for rule in registry.rules() for fault in rule.faults],
    ):
        assert [word for word, count in Counter(words).items() if count > 1] == []


def test_every_rule_is_asked_by_a_checker_or_told_by_reading() -> None:
    asked = {rule.code for checker in registry.checkers() for rule in checker.rules}
    assert [r.code for r in registry.rules() if r.code not in asked and not r.faults and r.group != "X"] == []
