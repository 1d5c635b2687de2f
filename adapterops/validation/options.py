"""What the user asks of a validation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adapterops.architectures import Architecture
from adapterops.errors import UsageError
from adapterops.validation.rule import Rule

TARGETS = ("peft", "diffusers", "comfy", "vllm", "sglang", "mlx", "gguf")
"""The loaders that `--targets` knows."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `adapterops validate` that decide what is found.

    `select` and `ignore` hold codes, beginnings of codes ("T", "C2") or names of rules, or ALL; the more exact one wins, as
    in ruff.  `architecture` comes from `--arch` or `--base`.  `targets` are the loaders that the adapters are for: their
    rules are asked only where they are named.
    """

    select: tuple[str, ...] = ("ALL",)
    ignore: tuple[str, ...] = ()
    architecture: Architecture | None = None
    targets: tuple[str, ...] = ()
    load_test: bool = False
    threads: int = 1
    """Threads that may look at one adapter's bytes; what is found does not depend on it."""


def chosen(rules: Iterable[Rule], options: Options) -> list[Rule]:
    """The rules that are asked.  Raises `UsageError` for a selector that no rule has."""
    rules = list(rules)
    for word in (*options.select, *options.ignore):
        if word != "ALL" and not any(_matches(word, rule) for rule in rules):
            import difflib  # only ever needed for a message

            known = [text for rule in rules for text in (rule.code, rule.name)]
            near = difflib.get_close_matches(word, known, n=1) or [
                other for other in (word.upper(), word.lower()) if any(_matches(other, rule) for rule in rules)
            ]
            hint = f"; did you mean {near[0]}?" if near else "; adapterops rules lists them"
            raise UsageError(f"no rule is called {word!r}{hint}")
    return [r for r in rules if _exactness(r, options.select) > _exactness(r, options.ignore)]


def _matches(word: str, rule: Rule) -> bool:
    return rule.name == word or (word[:1].isupper() and rule.code.startswith(word))


def _exactness(rule: Rule, words: Iterable[str]) -> int:
    """How exactly the most exact of `words` means the rule; 0 where none does."""
    own = [word for word in words if word == "ALL" or _matches(word, rule)]
    return max((1 if word == "ALL" else 99 if word == rule.name else 1 + len(word) for word in own), default=0)
