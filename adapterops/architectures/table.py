"""Architectures: base models as tables of modules, read from the TOML files beside this file.

Loading is on the path of every command, so this file imports neither torch nor numpy.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from math import prod
from typing import Any, NamedTuple

from adapterops.architectures.beginnings import ANYTHING, Lines, beginnings, lines, parts
from adapterops.architectures.beginnings import Row as BareRow
from adapterops.architectures.errors import UnknownArchitecture
from adapterops.architectures.expression import Value, evaluate, evaluate_integer
from adapterops.architectures.spec import ModuleSpec
from adapterops.architectures.template import ALL, Expander, Row, stems

_FOLDER = os.path.dirname(__file__)


@dataclass(frozen=True)
class Component:
    """A part of a base model: `unet`, `transformer`, `text_encoder`, `model` …"""

    name: str
    modules: Mapping[str, ModuleSpec]
    """Every module that owns a parameter, by canonical name."""
    class_name: str
    """The class that implements it, with its library: `diffusers.UNet2DConditionModel`; "" where no library has it."""
    config: Mapping[str, object]
    """What that class is built from."""
    bare: frozenset[str] = frozenset()
    """The modules that own no parameter, where they are known (`--base`): a walk over the model meets them too."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Published name to the class's own, where the installed class has renamed its modules (`--base`)."""
    optional_prefix: str = ""
    """What the names of one version of the class begin with and those of another do not (`text_model.`)."""
    fused: Mapping[str, ModuleSpec] = field(default_factory=dict)
    """Modules that only the authors' own repository has, by a name of ours beside those of their parts."""
    stems: Mapping[str, frozenset[str]] = field(default_factory=dict)
    """What the names in each column begin with, where that is known without writing them out."""
    parameters: Mapping[str, ModuleSpec] = field(default_factory=dict)
    """Matrices, and stacks of them, that a module holds under other names than `weight`: the experts of a layer, tables of
    shifts and scales.  Each by the dotted name of the parameter, in the order in which its module defines them."""
    like: str = ""
    """For a model built from a config: the family of built-in architectures whose rows describe it, too, where it is the
    only one (the same text encoders serve several)."""

    def spec(self, name: str) -> ModuleSpec | None:
        """The module of that name, fused ones and bare parameters included."""
        return self.modules.get(name) or self.fused.get(name) or self.parameters.get(name)

    @cached_property
    def whole(self) -> Mapping[str, list[str]]:
        """For each canonical module that is part of fused ones: their names."""
        out: dict[str, list[str]] = {}
        for name, spec in self.fused.items():
            for part in dict.fromkeys(part for part, _, _ in spec.joins):
                out.setdefault(part, []).append(name)
        return out


class Architecture(NamedTuple):
    """A base model as a table of modules."""

    name: str
    title: str
    components: Mapping[str, Component]
    builtin: bool
    released: str = ""
    """Year and month: where the modules of a file fit two base models alike, the older one is taken."""
    release_of: str = ""
    """The built-in architecture that this one is a later release of, with the same names for what both have."""
    yields: bool = False
    """Whether others that are younger are taken before it: far more adapters are theirs."""
    variant: str = ""
    """The word by which headers call a variant of `release_of` with the same modules, and others or wider ones: it is taken
    only where that base has not all of a file, or where a file calls its base so."""

    prefixed: bool = False
    """Whether language models have such names, too, so that they tell something only behind a prefix."""

    @property
    def turn(self) -> tuple[bool, str]:
        """What built-in architectures are sorted by: the first that fits is taken."""
        return self.yields, self.released

    @property
    def family(self) -> str:
        """The built-in architecture whose rules of spelling hold for this one; its own name where none does."""
        if self.builtin:
            return self.release_of or self.name
        like = {component.like for component in self.components.values() if component.like}
        return self.name if len(like) != 1 else like.pop()


@cache
def names() -> tuple[str, ...]:
    """The names of the built-in architectures, sorted."""
    return tuple(sorted(name.removesuffix(".toml") for name in os.listdir(_FOLDER) if name.endswith(".toml")))


@cache
def load(name: str) -> Architecture:
    """The built-in architecture `name`. Raises UnknownArchitecture, naming the known ones."""
    # Checked against the list, so that a name with a path in it never reaches the file system.
    if name not in names():
        from difflib import get_close_matches

        like = get_close_matches(name.lower(), names(), 3, 0.5)
        meant = f"did you mean {' or '.join(like)}? " if like else ""
        raise UnknownArchitecture(
            f"unknown architecture {name!r}; {meant}adapterops architectures lists the known ones, and for another base model "
            "give its config: --base CONFIG"
        )
    path = os.path.join(_FOLDER, f"{name}.toml")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    title, released = (found[1] for found in (_TITLE.search(text), _RELEASED.search(text)) if found)
    family, variant = (found[1] if found else "" for found in (_FAMILY.search(text), _VARIANT.search(text)))
    components = _Components(path, text)
    yields, prefixed = (bool(line.search(text)) for line in (_YIELDS, _PREFIXED))
    return Architecture(name, title, components, True, released, family, yields, variant, prefixed)


_TITLE, _RELEASED, _FAMILY, _COMPONENT, _YIELDS, _VARIANT, _PREFIXED = (
    re.compile(line, re.MULTILINE)
    for line in (
        r'^title = "([^"\\]+)"$',
        r'^released = "([^"\\]+)"$',
        r'^family = "([^"\\]+)"$',
        r"^\[components\.(\w+)\]$",
        r"^yields = true$",
        r'^variant = "([^"\\]+)"$',
        r"^prefixed = true$",
    )
)
"""The lines of an architecture's file that tell whether it is worth parsing."""


class _Components(Mapping[str, Component]):
    """The components of a built-in architecture: their names are known, the file is parsed when one is asked for."""

    def __init__(self, path: str, text: str) -> None:
        self._path, self._text, self._names = path, text, tuple(_COMPONENT.findall(text))
        self._made: dict[str, Component] = {}
        self._begin: dict[tuple[str, str], frozenset[str]] = {}
        self._parts: dict[tuple[str, str], frozenset[str] | None] = {}

    def __getitem__(self, name: str) -> Component:
        if not self._made:
            document = _read(self._path)
            templates, tables = _templates(document), document["components"]
            self._made = {
                own: _taken_over(own, table) if "of" in table else _component(own, table, templates, table["config"])
                for own, table in tables.items()
            }
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def begin(self, name: str, column: str) -> frozenset[str]:
        """What the names of a component begin with in a column; the file is not parsed for that."""
        if (name, column) not in self._begin:
            self._begin[name, column] = self._told(name, column)
        return self._begin[name, column]

    @cached_property
    def _lines(self) -> Lines:
        return lines(self._text)

    def _told(self, name: str, column: str) -> frozenset[str]:
        own = self._lines
        if name in own.of:
            return beginnings_of(load(own.of[name]), name, column)
        if name in own.prefixed:
            return ANYTHING
        return beginnings(own.components[name], self._templates.__getitem__, column == "original")

    def parts(self, name: str, column: str) -> frozenset[str] | None:
        """What stands between the dots of a component's names in a column; the file is not parsed for that."""
        if (name, column) not in self._parts:
            own = self._lines
            if name in own.of:
                told = parts_of(load(own.of[name]), name, column)
            elif name in own.prefixed:
                told = None
            else:
                told = parts(own.components[name], self._templates.__getitem__, column == "original")
            self._parts[name, column] = told
        return self._parts[name, column]

    @cached_property
    def _templates(self) -> Mapping[str, list[BareRow]]:
        own = self._lines
        return {**{key: rows for path in own.include for key, rows in _shared(path).items()}, **own.templates}


def _taken_over(name: str, table: Mapping[str, Any]) -> Component:
    """The component of another architecture: the same model, or (`config`) one of other numbers."""
    if "config" not in table:
        return load(table["of"]).components[name]
    document = _read(os.path.join(_FOLDER, f"{table['of']}.toml"))
    theirs = document["components"][name]
    return _component(name, theirs, _templates(document), {**theirs["config"], **table["config"]})


def beginnings_of(architecture: Architecture, component: str, column: str) -> frozenset[str]:
    """What the names of a component begin with in a column ("canonical" or "original"), told without writing its modules out."""
    components = architecture.components
    if isinstance(components, _Components):
        return components.begin(component, column)
    own = components[component]
    return ANYTHING if own.optional_prefix else own.stems.get(column, ANYTHING)


def parts_of(architecture: Architecture, component: str, column: str) -> frozenset[str] | None:
    """What stands between the dots of a component's names in a column, but for numbers, told without writing its modules out;
    None where that is not told."""
    components = architecture.components
    return components.parts(component, column) if isinstance(components, _Components) else None


@cache
def _shared(name: str) -> Mapping[str, list[BareRow]]:
    with open(os.path.join(_FOLDER, "shared", f"{name}.toml"), encoding="utf-8") as file:
        return lines(file.read()).templates


def likes(class_name: str, config: Mapping[str, Any]) -> Iterator[Component]:
    """The built-in components of the class `library.Class`, with their rows written out for another config.

    `like` says which family each is from.  Whether its rows hold for that config is for the caller to see.  Its
    modules raise `ValueError` when they are first asked for, where the config lacks a number that a row needs.
    """
    for name in names():
        document = _read(os.path.join(_FOLDER, f"{name}.toml"))
        for component_name, table in document["components"].items():
            if table.get("class") == class_name:
                component = _component(component_name, table, _templates(document), config)
                yield replace(component, like=document.get("family", name))


def _templates(document: Mapping[str, Any]) -> dict[str, list[Row]]:
    templates: dict[str, list[Row]] = {}
    for include in document.get("include", ()):
        templates |= _read(os.path.join(_FOLDER, "shared", f"{include}.toml"))["templates"]
    templates |= document.get("templates", {})
    return templates


@cache
def _read(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        return tomllib.load(file)


def _component(
    name: str, table: Mapping[str, Any], templates: Mapping[str, list[Row]], config: Mapping[str, Any]
) -> Component:
    rows = _Rows(f"component {name}", table, templates, config)
    prefix = table.get("optional_prefix", "")
    modules, fused, parameters = (_Modules(rows, which) for which in range(3))
    begin = {column: stems(table["rows"], templates, column) for column in ("canonical", "original")}
    kinds: dict[str, Any] = {"fused": fused, "parameters": parameters}
    return Component(name, modules, table.get("class", ""), config, optional_prefix=prefix, stems=begin, **kinds)


def _scope(table: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Value]:
    """What the rows of a component may refer to: the config's numbers, so that no size stands twice in a file."""
    # A class that fills in its own defaults does so with tuples.
    scope: dict[str, Value] = {
        key: list(value) if isinstance(value, tuple) else value for key, value in config.items() if value is not None
    }
    scope |= table.get("vars", {})
    for name, value in table.get("defaults", {}).items():
        if name not in scope:
            scope[name] = evaluate_integer(value, scope)
    for name, factors in table.get("products", {}).items():
        scope[name] = prod(evaluate_integer(factor, scope) for factor in factors)
    for name, listed in table.get("counts", {}).items():
        counted = evaluate(listed, scope)
        if not isinstance(counted, list):
            raise ValueError(f"{listed!r} needs a list, not {counted!r}")
        scope[name] = len(counted)
    for name, (count, listed) in table.get("others", {}).items():
        left_out = evaluate(listed, scope)
        if not isinstance(left_out, list):
            raise ValueError(f"{listed!r} needs a list, not {left_out!r}")
        scope[name] = [number for number in range(evaluate_integer(count, scope)) if number not in left_out]
    return scope


@dataclass(frozen=True)
class _Rows:
    """The rows of a component, written out when they are first asked for."""

    where: str
    table: Mapping[str, Any]
    templates: Mapping[str, list[Row]]
    config: Mapping[str, Any]

    @cached_property
    def tables(self) -> tuple[dict[str, ModuleSpec], ...]:
        """The modules of the class, those that only the authors have, and bare parameters."""
        modules: dict[str, ModuleSpec] = {}
        fused: dict[str, ModuleSpec] = {}
        parameters: dict[str, ModuleSpec] = {}
        try:
            expander = Expander(self.templates, _scope(self.table, self.config))
            for spec in expander.expand(self.table["rows"]):
                if any(spec.name in listed for listed in (modules, fused, parameters)):
                    raise ValueError(f"module {spec.name!r} is listed twice")
                (fused if spec.joins else parameters if spec.kind == "parameter" else modules)[spec.name] = spec
            fused = {name: _joined(spec, modules) for name, spec in fused.items()}
        except ValueError as error:
            raise ValueError(f"{self.where}: {error}") from error
        return modules, fused, parameters


def _joined(spec: ModuleSpec, modules: Mapping[str, ModuleSpec]) -> ModuleSpec:
    """The fused module with the sizes of its pieces.  Raises `ValueError` where they are not its rows."""
    unknown = [name for name, _, _ in spec.joins if name not in modules]
    if unknown:
        raise ValueError(f"{spec.name}: joins {unknown[0]!r}, which is not listed")
    joins = tuple((name, start, modules[name].shape[0] if stop == ALL else stop) for name, start, stop in spec.joins)
    rows = sum(stop - start for _, start, stop in joins)
    others = [name for name, _, _ in joins if modules[name].shape[1:] != spec.shape[1:]]
    if rows != spec.shape[0] or others:
        raise ValueError(f"{spec.name}: its shape {spec.shape} is not that of the {rows} rows that it joins")
    return spec._replace(joins=joins)


class _Modules(Mapping[str, ModuleSpec]):
    """One of the tables of some rows."""

    def __init__(self, rows: _Rows, which: int) -> None:
        self._rows, self._which = rows, which

    @cached_property
    def _table(self) -> dict[str, ModuleSpec]:
        return self._rows.tables[self._which]

    def __getitem__(self, name: str) -> ModuleSpec:
        return self._table[name]

    def __contains__(self, name: object) -> bool:
        return name in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def get(self, name: str, default: Any = None) -> Any:
        """As `dict.get`; the inherited one costs an exception a miss."""
        return self._table.get(name, default)
