"""The weights of the adapters in a merge: a number each, or a file that says more.

A weights file (YAML or JSON) is a list with one entry an adapter, in the order of the adapters.  An entry is a number,
or a mapping:

    default: 1.0             # where nothing below says otherwise
    blocks: [1, 0.5, …]      # one weight a block; which list it is follows from its length (blocks.py)
    base: 0.5                # text encoders; for Flux.1 whatever is in no block, too
    double: 0.8              # Flux.1's double blocks: one number, or one a block
    single: [1, 1, 0.5, …]   # its single blocks
    patterns:                # globs over component.module, or the module's name; the last that fits wins
      "*.attn2.*": 0

Patterns go before blocks, blocks before the default.  A weight is the whole weight: it is not multiplied by the default.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterops.architectures import Architecture
from adapterops.errors import UsageError
from adapterops.merging import blocks as block_tables
from adapterops.merging import document
from adapterops.merging.patterns import insist_on_matches, matches

_KEYS = ("default", "blocks", "base", "double", "single", "patterns")
_STACKS = ("double", "single")
_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class WeightRule:
    """The weight of one adapter, module by module."""

    default: float = 1.0
    blocks: tuple[float, ...] = ()
    base: float | None = None
    stacks: Mapping[str, float | tuple[float, ...]] = field(default_factory=dict)
    """`double` and `single`: one weight for all such blocks, or one a block."""
    patterns: tuple[tuple[str, float], ...] = ()
    where: str = field(default="--weights", compare=False)
    """File and entry, for messages."""

    @property
    def by_block(self) -> bool:
        """Whether the base model must be known."""
        return bool(self.blocks or self.stacks) or self.base is not None

    def weight(self, component: str, module: str, architecture: Architecture | None) -> float:
        """The weight for a module.

        Raises `UsageError` where blocks are given and the module's is not known.  Whether every part of the rule
        fits the base model, and does something, is for `check`.
        """
        for glob, weight in reversed(self.patterns):
            if matches(glob, component, module):
                return weight
        if not self.by_block:
            return self.default
        table = block_tables.table(architecture, self.where)
        assert architecture is not None
        name = block_tables.block(component, module, architecture, self.where)
        if self.blocks:
            preset = table.preset(len(self.blocks), self.where)
            return self.blocks[preset.index(name)] if name in preset else self.default
        if name == block_tables.BASE:
            return self.default if self.base is None else self.base
        key, _, number = (name or "").partition(".")
        value = self.stacks.get(key, self.default)
        if isinstance(value, tuple) and int(number) >= len(value):
            raise self._miscounted(key, value, table.stack(key, architecture, self.where))
        return value[int(number)] if isinstance(value, tuple) else value

    def check(self, modules: Iterable[tuple[str, str]], architecture: Architecture | None) -> None:
        """Raise `UsageError` where the rule does not fit an adapter of these modules (component, name).

        That is: a pattern that fits none of them, blocks that the base model does not have, a list of another
        length, blocks where the base model is not known, or a module whose block is not known.
        """
        listed = list(modules)
        insist_on_matches((glob for glob, _ in self.patterns), listed, f"{self.where}: patterns")
        if not self.by_block:
            return
        table = block_tables.table(architecture, self.where)
        assert architecture is not None
        if self.blocks:
            table.preset(len(self.blocks), f"{self.where}: blocks")
        for key, value in self.stacks.items():
            count = table.stack(key, architecture, self.where)
            if isinstance(value, tuple) and len(value) != count:
                raise self._miscounted(key, value, count)
        for module in listed:
            self.weight(*module, architecture)

    def data(self) -> float | dict[str, Any]:
        """The rule as canonical plain data, which `entry` takes."""
        out: dict[str, Any] = {"default": self.default} if self.default != 1.0 else {}
        if self.blocks:
            out["blocks"] = list(self.blocks)
        if self.base is not None:
            out["base"] = self.base
        for key, value in self.stacks.items():
            out[key] = list(value) if isinstance(value, tuple) else value
        if self.patterns:
            out["patterns"] = [list(pair) for pair in self.patterns]
        return out if out.keys() - {"default"} else self.default

    def _miscounted(self, key: str, value: tuple[float, ...], count: int) -> UsageError:
        return UsageError(
            f"{self.where}: {key} has {len(value)} values and the base model {count} such blocks; give one number, or "
            f"{count}"
        )


def parse(value: str, count: int) -> tuple[WeightRule, ...]:
    """`--weights` for `count` adapters: `1,0.5,-0.2`, or the name of a weights file.

    Raises `UsageError` for what is neither and for another number of weights, `UnreadableFile` for a missing file.
    """
    rules: tuple[WeightRule, ...]
    numerals = None if value.lower().endswith(_SUFFIXES) else _numerals(value)
    if numerals is None:
        where, what, singular, rules = value, "entries", "entry", read(value)
    else:
        where, what, singular = f"--weights {value}", "weights", "weight"
        rules = tuple(WeightRule(document.number(number, where), where=where) for number in numerals)
    if len(rules) != count:
        have = f"{len(rules)} {what}" if len(rules) != 1 else f"one {singular}"
        many = f"{count} adapters" if count != 1 else "one adapter"
        raise UsageError(f"{where}: {have} for {many}; give one for each, in their order")
    return rules


def read(path: str) -> tuple[WeightRule, ...]:
    """The entries of a weights file.  Raises `UsageError`, naming the entry; `UnreadableFile` for a missing file."""
    data = document.read(path)
    if not isinstance(data, list):
        only = [key for key, value in data.items() if isinstance(value, list)] if isinstance(data, Mapping) else []
        hint = f"; take the line {only[0]}: away" if len(only) == 1 == len(data) and only[0] not in _KEYS else ""
        raise UsageError(f"{path}: must be a list with one entry an adapter (- 1.0), each a number or a mapping{hint}")
    return tuple(entry(item, f"{path}: entry {n}") for n, item in enumerate(data, 1))


def entry(data: Any, where: str) -> WeightRule:
    """One adapter's weight from plain data: a number, or the mapping of a weights file.

    Raises `UsageError`, which begins with `where`, for anything else in it.
    """
    if not isinstance(data, Mapping):
        return WeightRule(document.number(data, where), where=where)
    for key in data:
        if key not in _KEYS:
            raise UsageError(f"{where}: {document.unknown(key, _KEYS)}")
    if not data:
        raise UsageError(f"{where}: says nothing; give a number, or some of {', '.join(_KEYS)}")
    for key in ("base", *_STACKS):
        if "blocks" in data and key in data:
            raise UsageError(f"{where}: has both blocks and {key}, which say the weights of blocks; keep one of them")
    return WeightRule(
        default=document.number(data.get("default", 1.0), f"{where}: default"),
        blocks=_numbers(data["blocks"], f"{where}: blocks") if "blocks" in data else (),
        base=document.number(data["base"], f"{where}: base") if "base" in data else None,
        stacks={key: _one_or_more(data[key], f"{where}: {key}") for key in _STACKS if key in data},
        patterns=_patterns(data["patterns"], f"{where}: patterns") if "patterns" in data else (),
        where=where,
    )


def _numerals(value: str) -> list[float] | None:
    """The numbers of `1,0.5`; None where `value` names a file.  Raises `UsageError` where it is neither."""
    out = []
    for part in value.split(","):
        try:
            out.append(float(part))
        except ValueError:
            if os.path.lexists(value):
                return None
            wrong = f"{part!r} is no number" if "," in value else "is no number, nor a file that is there"
            raise UsageError(
                f"--weights {value}: {wrong}; give one number an adapter (1,0.5,-0.2), or a weights file"
            ) from None
    return out


def _numbers(data: Any, where: str) -> tuple[float, ...]:
    if not isinstance(data, list) or not data:
        raise UsageError(f"{where}: must be a list of numbers, one a block")
    return tuple(document.number(item, f"{where}: value {n}") for n, item in enumerate(data, 1))


def _one_or_more(data: Any, where: str) -> float | tuple[float, ...]:
    if isinstance(data, Mapping):
        raise UsageError(f"{where}: must be a number for all of these blocks, or a list of numbers, one a block")
    return _numbers(data, where) if isinstance(data, list) else document.number(data, where)


def _patterns(data: Any, where: str) -> tuple[tuple[str, float], ...]:
    return tuple((glob, document.number(item, f"{where}: {glob!r}")) for glob, item in document.pairs(data, where))
