"""Every rule: those for all formats, and those that the formats' plugins bring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module

from adapterops import registry
from adapterops.errors import UsageError
from adapterops.validation.rule import Finding, Rule
from adapterops.validation.subject import Subject

_GROUPS = ("container", "files", "tensors", "base", "scale", "loaders", "card", "hub", "internal")
"""The modules of `validation.rules`, each with `RULES` and `CHECKERS`."""


@dataclass(frozen=True, slots=True)
class Checker:
    """A function that looks at an adapter for some rules; it is called where any of them is asked."""

    rules: tuple[Rule, ...]
    find: Callable[[Subject], Iterable[Finding]]


def checker(*rules: Rule) -> Callable[[Callable[[Subject], Iterable[Finding]]], Checker]:
    """Declare a function the checker of `rules`."""
    return lambda find: Checker(rules, find)


@cache
def _loaded() -> tuple[tuple[Rule, ...], tuple[Checker, ...]]:
    modules = [f"adapterops.validation.rules.{name}" for name in _GROUPS]
    modules += [form.rules for form in registry.formats().values() if form.rules]
    rules: list[Rule] = []
    checkers: list[Checker] = []
    for module in map(import_module, modules):
        rules += module.RULES
        checkers += module.CHECKERS
    return tuple(sorted(rules, key=lambda rule: rule.code)), tuple(checkers)


def rules() -> tuple[Rule, ...]:
    """Every rule, by code."""
    return _loaded()[0]


def checkers() -> tuple[Checker, ...]:
    """Every checker."""
    return _loaded()[1]


@cache
def by_fault() -> Mapping[str, Rule]:
    """The rule that each word by which reading tells of a fault belongs to."""
    return {word: rule for rule in rules() for word in rule.faults}


def find(text: str) -> Rule:
    """The rule of a code or a name.  Raises `UsageError`, naming the nearest."""
    for rule in rules():
        if text.upper() == rule.code or text == rule.name:
            return rule
    import difflib  # only ever needed for a message

    if any(rule.code.startswith(text.upper()) for rule in rules()):
        raise UsageError(
            f"{text!r} is no rule but the beginning of several; adapterops rules --select {text.upper()} lists them"
        )
    near = difflib.get_close_matches(text.lower(), [r.name for r in rules()], n=1, cutoff=0.7)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(f"no rule is called {text!r}{hint} (adapterops rules lists them)")
