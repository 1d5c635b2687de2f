"""What the names of a base model's modules begin with and consist of, told by its file's lines, which are not parsed for that.

Most base models are ruled out by this alone, and parsing all of their files would be a fifth of the work of `inspect`.  It
rests on how the files are laid out: a row a line, `for`, `canonical`, `original` and `use` side by side, a list's `name = [`
at the beginning of a line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

ANYTHING = frozenset({""})
"""The beginnings where a name may begin in any way."""

_ROW = re.compile(r'(?:for = \{ ([^}]*) \}, )?canonical = "([^"]*)"(?:, original = "([^"]*)")?(?:, use = "(\w+)")?')
_TEMPLATE = re.compile(r"(\w+) = \[(?=$|\{)")
_LOOP = re.compile(r"(\w+) = (?:\[([^\]]*)\])?")
_INCLUDE = re.compile(r"^include = \[(.*)\]$", re.MULTILINE)
_OF = 'of = "'
_PREFIX = 'optional_prefix = "'

Row = tuple[str, str | None, str, str]
"""`canonical`, `original`, `use`, and what stands between the braces of `for`."""


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
        elif not component and (begun := _TEMPLATE.match(line)):
            rows = templates.setdefault(begun[1], [])
            rows += map(_row, _ROW.finditer(line))
        elif line.startswith(_OF):
            of[component] = line[len(_OF) :].partition('"')[0]
        elif line.startswith(_PREFIX):
            prefixed.add(component)
        elif 'canonical = "' in line:
            rows += map(_row, _ROW.finditer(line))
    found = _INCLUDE.search(text)
    include = tuple(re.findall(r'"(\w+)"', found[1])) if found else ()
    return Lines(templates, components, of, frozenset(prefixed), include)


def _row(match: re.Match[str]) -> Row:
    return match[2], match[3], match[4] or "", match[1] or ""


def beginnings(rows: Iterable[Row], templates: Callable[[str], Iterable[Row]], original: bool) -> frozenset[str]:
    """What the names in a column begin with, as `template.stems` tells it of a file that was parsed."""
    found: set[str] = set()
    for canonical, own, use, _ in rows:
        name = own if original and own is not None else canonical
        if name:
            found.add(name.partition("{")[0].partition(".")[0])
        elif use:
            found |= beginnings(templates(use), templates, original)
    return frozenset(found)


def parts(rows: Iterable[Row], templates: Callable[[str], Iterable[Row]], original: bool) -> frozenset[str] | None:
    """What stands between the dots of the names in a column, but for numbers; None where a file's lines do not tell."""
    found: set[str] = set()
    for canonical, own, use, loops in rows:
        for name in _written_out(own if original and own is not None else canonical, loops):
            if "{" in name:
                return None
            found.update(part for part in name.split(".") if part and not part.isdigit())
        inside = parts(templates(use), templates, original) if use else ()
        if inside is None:
            return None
        found.update(inside)
    return frozenset(found)


def _written_out(name: str, loops: str) -> list[str]:
    """The name for each value of the loops that the row lists, with 0 for what stands alone between dots and is counted.

    Where something else stands there, its braces are left.
    """
    listed = {variable: re.findall(r"[^\s\",]+", values) for variable, values in _LOOP.findall(loops) if values}
    out = [re.sub(r"(?<![^.])\{([^{}[]*)\}(?![^.])", lambda m: m[0] if m[1] in listed else "0", name)]
    for variable, values in listed.items():
        field = f"{{{variable}}}"
        out = [own.replace(field, value) for own in out for value in values] if field in name else out
    return out
