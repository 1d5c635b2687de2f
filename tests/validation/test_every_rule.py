"""Every rule: what must hold of all of them, whoever wrote them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import test_base_rules
import test_card_rules
import test_config_rules
import test_container_rules
import test_file_rules
import test_load_test
import test_loader_rules
import test_scale_rules
import test_tensor_rules

from adapterops.validation import registry
from adapterops.validation.rule import GROUPS, Needs, Severity

TABLES = (
    test_base_rules,
    test_card_rules,
    test_config_rules,
    test_container_rules,
    test_file_rules,
    test_load_test,
    test_loader_rules,
    test_scale_rules,
    test_tensor_rules,
)
ELSEWHERE = {
    "F090": "needs a server: test_hub_validation.py",
    "X001": "needs a fault of ours: test_workers.py",
}
"""Rules that no broken file alone can show, and where they are tested."""


def broken() -> set[str]:
    return {code for module in TABLES for code in module.BROKEN} | test_loader_rules.WITH_OTHERS.keys()


def test_every_rule_has_an_adapter_that_breaks_it() -> None:
    codes = {rule.code for rule in registry.rules()}
    assert codes - broken() == ELSEWHERE.keys()
    assert broken() <= codes
    assert len(codes) >= 60


def test_codes_and_names_are_stable_words() -> None:
    rules = registry.rules()
    for rule in rules:
        assert re.fullmatch(r"[A-Z]\d{3}", rule.code)
        assert rule.code[0] in GROUPS
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule.name), rule.name
    for column in ([r.code for r in rules], [r.name for r in rules]):
        assert [text for text, count in Counter(column).items() if count > 1] == []


def test_texts_are_there_and_are_sentences() -> None:
    for rule in registry.rules():
        for text in (rule.why, rule.remedy, rule.fires, rule.passes):
            assert text.strip() == text != "", rule.code
        assert rule.why.endswith("."), rule.code
        assert rule.remedy.endswith("."), rule.code
        assert isinstance(rule.severity, Severity)
        assert isinstance(rule.needs, Needs)


def test_a_word_belongs_to_one_rule_and_every_word_that_is_said_to_some_rule() -> None:
    words = [word for rule in registry.rules() for word in rule.faults]
    assert len(words) == len(set(words))
    said = {
        match[1]
        for package in ("adapterops", "formats")
        for path in (Path(__file__).parents[2] / package).rglob("*.py")
        for match in re.finditer(r"\bfault ?= ?\"([a-z-]+)\"", path.read_text(encoding="utf-8"))
    }
    assert len(said) > 30
    assert said <= set(words)
