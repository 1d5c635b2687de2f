"""`--rename PATTERN=REPLACEMENT`: keys that a broken script spelled, as the user says they should be."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from adapterops.errors import UsageError
from adapterops.storage import LazyTensor, Source

Rule = tuple[str, str]
"""A regular expression, searched anywhere in a key, and what stands in its place (`\\1`: its first group)."""


def parse(text: str) -> Rule:
    """The rule that `PATTERN=REPLACEMENT` says.  Raises `ValueError` where it says none."""
    pattern, equals, replacement = text.rpartition("=")
    if not equals or not pattern:
        raise ValueError(f"{text!r} is not PATTERN=REPLACEMENT")
    try:
        compiled = re.compile(pattern)
        re.sub(pattern, replacement, "")
    except (re.error, RecursionError, OverflowError, IndexError) as error:
        raise ValueError(f"{text!r}: {error}") from error
    if compiled.match(""):
        raise ValueError(f"{text!r}: the pattern matches an empty text, so it would match everywhere")
    return pattern, replacement


def rename(source: Source, rules: Sequence[Rule]) -> Source:
    """The source with its keys renamed, one rule after the other; tensors keep the names that they have in the file.

    Raises `UsageError` for a rule that no key matches, and where two keys become one.
    """
    if not rules:
        return source
    used: set[int] = set()
    renamed = _rename(source, rules, used)
    idle = next((rules[n] for n in range(len(rules)) if n not in used), None)
    if idle is not None:
        keys = list(source.tensors) or [key for part in source.parts.values() for key in part.tensors]
        shown = ", ".join(repr(key) for key in keys[:2])
        raise UsageError(f"--rename {idle[0]}={idle[1]}: no key of {source.path} matches (it has {shown} …)")
    return renamed


def _rename(source: Source, rules: Sequence[Rule], used: set[int]) -> Source:
    tensors: dict[str, LazyTensor] = {}
    changed = 0
    for key, tensor in source.tensors.items():
        new = key
        for number, (pattern, replacement) in enumerate(rules):
            new, count = re.subn(pattern, replacement, new)
            if count:
                used.add(number)
        if new in tensors:
            raise UsageError(
                f"{source.path}: --rename makes {new!r} of both {tensors[new].key!r} and {key!r}; narrow the pattern"
            )
        tensors[new] = tensor
        changed += new != key
    parts = {name: _rename(part, rules, used) for name, part in source.parts.items()}
    note = (f"{changed} keys are renamed as --rename says",) if changed else ()
    return replace(source, tensors=tensors, parts=parts, notes=(*source.notes, *note))
