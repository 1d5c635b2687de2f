"""The authors' own names for a model that was built from a config.

A built-in table's rows follow the numbers of the config that they are given.  Where the rows of a table for the same
class, written out for the model's config, are the model, what the table says besides names and shapes holds for it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

from adapterops.architectures.spec import ModuleSpec
from adapterops.architectures.table import Component, likes


def with_originals(component: Component, config: Mapping[str, Any], owners: Set[str]) -> Component:
    """The component with `original`, `fused`, `parameters`, `widens` and `like` of the built-in table that it equals, or as
    it is.

    `config` is complete: with the class's own defaults.  `owners` are the modules that own a parameter; each of them
    must be in the table, with the same shape and bias.  What only the table has is left out, and with it the fused
    modules that it is part of.
    """
    equals: list[Component] = []
    for known in likes(component.class_name, config):
        try:
            same = all(_alike(known, component, name) for name in component.modules if name in owners)
        except ValueError:  # the config lacks a number that the rows need: it is not the table's model
            continue
        if same:
            equals.append(known)
    if not equals:
        return component
    known = equals[0]
    modules = {name: _named(spec, _row(known, name)) for name, spec in component.modules.items()}
    fused = {name: spec for name, spec in known.fused.items() if all(part in modules for part, _, _ in spec.joins)}
    like = known.like if all(other.like == known.like for other in equals) else ""
    parameters = {**component.parameters, **known.parameters}
    return replace(component, modules=modules, fused=fused, parameters=parameters, like=like)


def _row(known: Component, name: str) -> ModuleSpec | None:
    rows, prefix = known.modules, known.optional_prefix
    return rows.get(name) or (rows.get(prefix + name) if prefix else None)


def _alike(known: Component, component: Component, name: str) -> bool:
    row, spec = _row(known, name), component.modules[name]
    if row is not None or spec.shape:
        # A layer of the model's own class is of no kind that a list of modules knows.
        kind = row.kind if row is not None and spec.kind == "other" else spec.kind
        return row is not None and (row.shape, row.kind, row.bias) == (spec.shape, kind, spec.bias)
    # It owns bare parameters alone; those of the root are in no list of the model's.
    paths = [f"{name}.{own}" if name else own for own in spec.params]
    rows = known.parameters
    return all(p in rows and component.parameters.get(p, rows[p]).shape == rows[p].shape for p in paths)


def _named(spec: ModuleSpec, row: ModuleSpec | None) -> ModuleSpec:
    """The model's module with the row's `original`, which repeats the model's name where it repeats the row's."""
    if row is None:
        return spec
    return spec._replace(original=spec.name if row.original == row.name else row.original, widens=row.widens)
