"""Names that differ from a base model's as a whole, set right: by its own list of modules, or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adapterops.architectures import Architecture
from adapterops.dialects.match import Group
from adapterops.dialects.names import applies, book, is_block, needs_table


def align(groups: Sequence[Group], architecture: Architecture) -> tuple[str, str] | None:
    """The change of leading segments (strip, add) that puts every dotted name into `architecture`; None if none.

    Wrappers add segments (`model.`) and class versions lose some (`text_model.`); the base's own list of modules
    says which, for the whole file or not at all.
    """
    groups = [g for g in groups if not g.place.free]
    dotted = [g for g in groups if not needs_table(g.place) and applies(g.place, architecture)]
    if len(dotted) != len(groups) or not groups:
        return None
    tables = {g.place: book(architecture, g.place).table for g in dotted}
    first = next((g for g in dotted if g.name not in tables[g.place] and not is_block(g, architecture)), None)
    if first is None:
        return "", ""
    parts = first.name.split(".")
    changes = [(".".join(parts[:n]) + ".", "") for n in range(1, len(parts))]
    changes += [("", known[: -len(first.name)]) for known in tables[first.place] if known.endswith("." + first.name)]
    for strip, add in changes:
        if all(g.name.startswith(strip) and add + g.name[len(strip) :] in tables[g.place] for g in dotted):
            return strip, add
    return None


def rename(groups: Sequence[Group], architecture: Architecture) -> list[Group] | None:
    """The groups under the names of a class whose modules were renamed after the file was made; None where that does
    not put every one of them into `architecture`."""
    out = []
    for entry in groups:
        if entry.place.free:
            out.append(entry)
            continue
        component = architecture.components.get(entry.place.among(architecture.components) or "")
        if component is None or needs_table(entry.place):
            return None
        name = entry.name if entry.name in component.modules else component.renamed.get(entry.name)
        if name is None:
            return None
        out.append(entry._replace(name=name, stated=entry.name))
    return out


def adopt(groups: Sequence[Group], architecture: Architecture) -> Architecture:
    """The user's base under the name that the file gives its one component.

    The config of a lone model does not say which part of a pipeline it is; the file does.
    """
    names = {g.place.component for g in groups}
    known = all(g.place.among(architecture.components) for g in groups)
    if architecture.builtin or len(architecture.components) != 1 or len(names) != 1 or known:
        return architecture
    name, component = names.pop(), next(iter(architecture.components.values()))
    return architecture._replace(components={name: replace(component, name=name)})
