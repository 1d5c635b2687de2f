"""Architectures: base models as tables of modules, read from the TOML files beside this file.

Loading is on the path of every command, so this file imports neither torch nor numpy.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from adapterops.architectures.errors import UnknownArchitecture
from adapterops.architectures.expression import Value
from adapterops.architectures.template import Expander, Leaf, Row

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """A module of a base model that owns a parameter or a buffer."""

    name: str
    """Canonical dotted name inside its component; "" for what the component's root owns."""
    original: str
    """The name in the authors' own repository; the canonical name where that is not known."""
    shape: tuple[int, ...]
    """Of `weight`: (out, in), (out, in, *kernel), (num_embeddings, dim), (channels,); () without a `weight`.

    A grouped convolution's `in` is that of one group, as torch stores it.
    """
    kind: str
    """linear, conv, embedding, norm or other."""
    bias: bool
    transposed: bool = False
    """The weight is stored as (in, out), as GPT-2's Conv1D does; `shape` is still (out, in)."""
    tied_to: str | None = None
    """The module that owns this module's `weight`, where it is shared."""
    params: tuple[str, ...] = ("weight",)
    """The names of the parameters and buffers that the module owns itself."""


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a base model: `unet`, `transformer`, `text_encoder`, `model` …"""

    name: str
    modules: Mapping[str, ModuleSpec]
    """Every module that owns a parameter, by canonical name."""
    class_name: str
    """The class that implements it, with its library: `diffusers.UNet2DConditionModel`."""
    config: Mapping[str, object]
    """What that class is built from."""
    bare: frozenset[str] = frozenset()
    """The modules that own no parameter, where they are known (`--base`): a walk over the model meets them too."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Published name to the class's own, where the installed class has renamed its modules (`--base`)."""
    optional_prefix: str = ""
    """What the names of one version of the class begin with and those of another do not (`text_model.`)."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A base model as a table of modules."""

    name: str
    title: str
    components: Mapping[str, Component]
    builtin: bool


@cache
def names() -> tuple[str, ...]:
    """The names of the built-in architectures, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.toml")))


@cache
def load(name: str) -> Architecture:
    """The built-in architecture `name`. Raises UnknownArchitecture, naming the known ones."""
    # Checked against the list, so that a name with a path in it never reaches the file system.
    if name not in names():
        raise UnknownArchitecture(
            f"unknown architecture {name!r}; known: {', '.join(names())}. "
            "For another base model give its config: --base CONFIG"
        )
    document = _read(_FOLDER / f"{name}.toml")
    templates: dict[str, list[Row]] = {}
    for include in document.get("include", ()):
        templates |= _read(_FOLDER / "shared" / f"{include}.toml")["templates"]
    templates |= document.get("templates", {})
    components: dict[str, Component] = {}
    for component_name, table in document["components"].items():
        components[component_name] = _component(component_name, table, templates)
    return Architecture(name=name, title=document["title"], components=components, builtin=True)


@cache
def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return tomllib.load(file)


def _component(name: str, table: Mapping[str, Any], templates: Mapping[str, list[Row]]) -> Component:
    # The config's numbers are in scope, so that no size stands twice in a file.
    scope: dict[str, Value] = {**table["config"], **table.get("vars", {})}
    modules = _Modules(f"component {name}", Expander(templates, scope), table["rows"])
    return Component(name, modules, table["class"], table["config"], optional_prefix=table.get("optional_prefix", ""))


class _Modules(Mapping[str, ModuleSpec]):
    """The modules of a template's rows, written out when they are first asked for."""

    def __init__(self, where: str, expander: Expander, rows: list[Row]) -> None:
        self._where, self._expander, self._rows = where, expander, rows

    @cached_property
    def _table(self) -> dict[str, ModuleSpec]:
        modules: dict[str, ModuleSpec] = {}
        try:
            for leaf in self._expander.expand(self._rows):
                if leaf.canonical in modules:
                    raise ValueError(f"module {leaf.canonical!r} is listed twice")
                modules[leaf.canonical] = _spec(leaf)
        except ValueError as error:
            raise ValueError(f"{self._where}: {error}") from error
        return modules

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


def _spec(leaf: Leaf) -> ModuleSpec:
    canonical, original, kind, shape, bias = leaf
    params = ("weight", "bias") if bias else ("weight",)
    return ModuleSpec(canonical, original, shape, kind, bias, params=params)
