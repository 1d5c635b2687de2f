"""What the names of a base model's modules begin with, told by the lines of its file, which is not parsed for that.

Most base models are ruled out by this alone, and parsing all of their files would be a fifth of the work of `inspect`.  It
rests on how the files are laid out: a row a line, `canonical`, `original` and `use` side by side, a list's `name = [` alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

ANYTHING = frozenset({""})
"""The beginnings where a name may begin in any way."""

_ROW = re.compile(r'canonical = "([^"]*)"(?:, original = "([^"]*)")?(?:, use = "(\w+)")?')
_INCLUDE = re.compile(r"^include = \[(.*)\]$", re.MULTILINE)
_OF = 'of = "'
_PREFIX = 'optional_prefix = "'

Row = tuple[str, str | None, str]


class Lines(NamedTuple):
    """The rows of a file, as far as names go."""

    templates: Mapping[str, list[Row]]
    components: Mapping[str, list[Row]]
    of: Mapping[str, str]
    """The architecture that a component is taken from."""
    prefixed: frozenset[str]
    """The components whose names begin otherwise in another version of the class."""
    include: tuple[str, ...]


def lines(text: str) -> Lines:
    """The rows of a file's text."""
    templates: dict[str, list[Row]] = {}
    components: dict[str, list[Row]] = {}
    of: dict[str, str] = {}
    prefixed: set[str] = set()
    component = ""
    rows: list[Row] = []
    for line in text.splitlines():
        if line.startswith("[components."):
            component = line[len("[components.") :].partition("]")[0].partition(".")[0]
            rows = components.setdefault(component, [])
        elif line.endswith(" = [") and not component:
            rows = templates.setdefault(line.removesuffix(" = ["), [])
        elif line.startswith(_OF):
            of[component] = line[len(_OF) :].partition('"')[0]
        elif line.startswith(_PREFIX):
            prefixed.add(component)
        elif 'canonical = "' in line:
            rows += [(name, own, use) for name, own, use in map(_row, _ROW.finditer(line))]
    found = _INCLUDE.search(text)
    include = tuple(re.findall(r'"(\w+)"', found[1])) if found else ()
    return Lines(templates, components, of, frozenset(prefixed), include)


def _row(match: re.Match[str]) -> Row:
    return match[1], match[2], match[3] or ""


def beginnings(rows: Iterable[Row], templates: Callable[[str], Iterable[Row]], original: bool) -> frozenset[str]:
    """What the names in a column begin with, as `template.stems` tells it of a file that was parsed."""
    found: set[str] = set()
    for canonical, own, use in rows:
        name = own if original and own is not None else canonical
        if name:
            found.add(name.partition("{")[0].partition(".")[0])
        elif use:
            found |= beginnings(templates(use), templates, original)
    return frozenset(found)
