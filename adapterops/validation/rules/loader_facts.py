"""What a fact about a loader is: which adapters it meets, what the loader makes of them, and where that stands."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from adapterops.adapter import Update
from adapterops.methods import METHODS
from adapterops.validation.rule import Finding, Rule, Severity, several
from adapterops.validation.subject import Subject

_COUNTED = re.compile(r"\{n ([^}]+)\}")


class Effect(StrEnum):
    """What a loader does with what it cannot take."""

    DROPS = "drops"
    MISREADS = "misreads"
    REFUSES = "refuses"
    NEEDS = "needs"
    """It loads once it is told something."""

    @property
    def severity(self) -> Severity:
        """How bad that is for who publishes for this loader."""
        return Severity.INFO if self is Effect.NEEDS else Severity.ERROR


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that one loader does.

    `meets` gives the keys (or, with `field`, anything) that it is about, none where the adapter is spared; `says` is the
    message, in which {keys} stands for the first of them, {n tensor} for their number, and {value} for the only one.
    """

    target: str
    rule: Rule
    meets: Callable[[Subject], Iterable[str]]
    says: str
    field: str = ""

    def find(self, subject: Subject) -> Iterator[Finding]:
        """The finding, where the loader is asked for and the adapter is met."""
        if self.target not in subject.options.targets:
            return
        keys = list(dict.fromkeys(self.meets(subject)))
        if keys:
            where = () if self.field else keys
            file = subject.config_path if self.field else subject.weights
            counted = _COUNTED.sub(lambda m: f"{len(keys):,} {m[1]}" + "s" * (len(keys) != 1), self.says)
            message = counted.replace("{keys}", several(keys)).replace("{value}", keys[0])
            yield self.rule.found(file, message, where, field=self.field)


def fact(
    code: str,
    target: str,
    name: str,
    effect: Effect,
    meets: Callable[[Subject], Iterable[str]],
    says: str,
    *,
    why: str,
    remedy: str,
    fires: str,
    passes: str,
    source: str,
    field: str = "",
) -> Fact:
    """A row of a loader's table."""
    rule = Rule(code, f"{target}-{name}", effect.severity, why, remedy, fires, passes, source=source)
    return Fact(target, rule, meets, says, field)


# What adapters are like, in terms that the tables share.


def architecture(subject: Subject) -> str:
    """The built-in base model whose rules hold for the adapter; "" where none is known."""
    adapter = subject.adapter
    if adapter is None:
        return ""
    return adapter.base.family if adapter.base is not None else adapter.architecture.value or ""


def spelled(subject: Subject, dialects: Iterable[str], bases: Iterable[str] = ()) -> list[str]:
    """All keys, where the file is in one of `dialects` (and, where any are given, for one of `bases`)."""
    if subject.dialect not in dialects or (bases and architecture(subject) not in bases):
        return []
    return list(subject.tensors)


def in_files(subject: Subject, *methods: str) -> list[str]:
    """The keys of the updates of some methods, in the formats that are single files; of PEFT folders these loaders read
    nothing anyway."""
    if subject.dialect in ("peft", "miss", "loralib"):
        return []
    return [t.key for u in subject.updates if u.method in methods for t in u.tensors.values()]


def of_role(subject: Subject, role: str, method: str = "") -> list[str]:
    """The keys of the tensors that have a role."""
    return [u.tensors[role].key for u in subject.updates if role in u.tensors and method in ("", u.method)]


def ending(subject: Subject, *ends: str) -> list[str]:
    """The keys that end so."""
    return [key for key in subject.tensors if key.endswith(ends)]


def first_key(update: Update) -> str:
    """A key of the update, by which it is named."""
    return next(iter(update.tensors.values())).key


def scale(update: Update) -> float | None:
    """What a LoRA's product is multiplied by; None where it is not known."""
    return METHODS[update.method].scale(update) if update.method == "lora" else None


def peft_config(subject: Subject) -> Mapping[str, Any]:
    """The config of a PEFT folder; empty for everything else."""
    config = subject.config
    return config if config is not None and "peft_type" in config else {}


def same(one: float, other: float) -> bool:
    """Whether two scales are one, as far as 16-bit alphas tell."""
    return abs(one - other) <= 2**-7 * max(abs(one), abs(other))
