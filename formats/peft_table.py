"""The table of PEFT's types, as `adapterops methods` prints it and `docs/methods.md` holds it."""

from __future__ import annotations

import re

from adapterops_formats.peft_kinds import KINDS
from adapterops_formats.peft_kinds.row import PeftMethod
from adapterops_formats.peft_names import MODULES, ONCE, TOP

from adapterops.plugin import Suffix, TypeRow

_TARGETS = "target_modules"


def rows() -> list[TypeRow]:
    """A row for every `peft_type`."""
    return [_row(kind) for kind in KINDS.values()]


def _row(kind: PeftMethod) -> TypeRow:
    settings = {s.name: s for s in kind.settings}
    within = {s.within for s in kind.settings if s.within}
    said = {*settings, *within, *kind.scale, *kind.lost}
    derived = [name for name in kind.derived if name not in said]
    return TypeRow(
        name=kind.kind,
        title=kind.title,
        methods=kind.methods,
        recognised=tuple(dict.fromkeys(_shown(s) for s in _spelled(kind))),
        read=tuple(dict.fromkeys((*kind.scale[1:], *kind.narrowing, *kind.flags, *kind.known))),
        derived=tuple(derived),
        assumed=tuple((s.name, s.default) for s in kind.settings if not s.asked),
        unknowable=tuple(
            [(s.name, s.about) for s in kind.settings if s.asked]
            + [(name, "--alpha says it") for name in kind.scale[:1]]
        ),
        refused=tuple(kind.refused.items()),
        needs=kind.needs,
        lost=kind.lost,
    )


def _spelled(kind: PeftMethod) -> list[Suffix]:
    """The keys of a type, but those that show another."""
    others = dict(kind.shown)
    return [s for s in (*MODULES, *ONCE, *TOP) if s.method in kind.methods and s.role not in others]


def _shown(suffix: Suffix) -> str:
    text = re.sub(r"\.\d+(?=\.|$)", ".N", suffix.text)
    return text.replace("{adapter}", "").lstrip(".") + ("*" if text.endswith(".") else "")
