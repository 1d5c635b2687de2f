"""The names of a base model's modules as a dialect's table spells them, looked up and never guessed at."""

from __future__ import annotations

from collections.abc import Iterator

from adapterops.architectures import Architecture, Component, ModuleSpec
from adapterops.dialects.match import Group
from adapterops.dialects.table import Place, traits
from adapterops.errors import UnknownModule
from adapterops.methods import METHODS


class NameBook:
    """The spelled names of one component under one place's rules, and the canonical names they stand for."""

    def __init__(self, component: Component | None, original: bool, place: Place) -> None:
        self.component = component
        self.table: dict[str, str] = {}
        self.clashes: dict[str, tuple[str, str]] = {}
        for spec in _listed(component, original, bool(place.tails)) if component else ():
            name = spec.original if original else spec.name
            name = name.replace(".", "_") if place.flat else name
            if name in self.table:
                self.clashes[name] = (self.table[name], spec.name)
            self.table[name] = spec.name
            other = self._other_beginning(name, component.optional_prefix if component else "", place.flat)
            if other is not None:
                self.table.setdefault(other, spec.name)

    @staticmethod
    def _other_beginning(name: str, prefix: str, flat: bool) -> str | None:
        """A flat name as another version of the class begins it; dotted ones are aligned as a whole."""
        if not prefix or not flat:
            return None
        start = prefix.replace(".", "_")
        return name[len(start) :] if name.startswith(start) else start + name

    def nearest(self, name: str) -> list[str]:
        """The known names most like `name`."""
        import difflib  # only ever needed for a message

        return difflib.get_close_matches(name, self.table, n=2, cutoff=0.5)


def _listed(component: Component, original: bool, tails: bool) -> Iterator[ModuleSpec]:
    """The modules that one of the two columns has."""
    own = (*component.modules.values(), *component.parameters.values())
    for spec in (*own, *(component.fused.values() if original else ())):
        if (spec.original or not original) and (tails or not spec.partial):
            yield spec


def spells(place: Place, architecture: Architecture, spec: ModuleSpec) -> bool:
    """Whether the column of `place` has this module."""
    if place.column(architecture.family) != "original":
        return not spec.joins
    if not spec.original or not place.tails:
        return bool(spec.original) and not spec.partial
    # A fused module that the tails leave out may have a part that they do not, and the other way round.
    if spec.partial or spec.joins:
        return _tailed(place, spec)
    return not _is_part(place, architecture, spec)


def _is_part(place: Place, architecture: Architecture, spec: ModuleSpec) -> bool:
    """Whether the tails have, instead of a module, one that dialects with tails alone know, and whose rows hold its own."""
    component = architecture.components[place.among(architecture.components) or ""]
    wholes = (whole for whole in component.fused.values() if whole.partial and _tailed(place, whole))
    return any(part == spec.name for whole in wholes for part, _, _ in whole.joins)


def _tailed(place: Place, spec: ModuleSpec) -> bool:
    """Whether the authors' name of a module ends as one of the tails."""
    name = spec.original.replace(".", "_") if place.flat else spec.original
    return name.endswith(tuple(tail for tail, _ in place.tails))


_books: dict[tuple[int, bool, bool, bool], NameBook] = {}


def book(architecture: Architecture, place: Place) -> NameBook:
    """The (cached) names of a component of `architecture` as `place` spells them."""
    component = architecture.components.get(place.among(architecture.components) or "")
    original = place.column(architecture.family) == "original"
    # Base models share components; a book keeps its own alive, and with it the number that it is found by.
    at = (id(component), original, place.flat, bool(place.tails))
    if at not in _books:
        _books[at] = NameBook(component, original, place)
    return _books[at]


def applies(place: Place, architecture: Architecture) -> bool:
    """Whether the table's row is meant for this architecture."""
    if place.among(architecture.components) is None or (architecture.prefixed and place.bare):
        return False
    return not place.only or bool(place.only & traits(architecture))


def needs_table(place: Place) -> bool:
    """Whether a spelled name means nothing without an architecture."""
    bare = not place.prefix and place.component != "*" and not place.sure
    return bare or place.flat or place.names != "canonical" or bool(place.names_in)


def is_block(entry: Group, architecture: Architecture) -> bool:
    """Whether a group's module is one that holds modules of the architecture, and its method acts on such."""
    if not METHODS[entry.method].blocks:
        return False
    component = architecture.components.get(entry.place.among(architecture.components) or "")
    return component is not None and any(name.startswith(entry.name + ".") for name in component.modules)


def canonical(architecture: Architecture | None, entry: Group, names: NameBook | None = None) -> str:
    """The canonical name of a group's module; `names` is its place's book, for callers with many.

    Raises `UnknownModule` for a flat name that two modules share.
    """
    if architecture is None or entry.place.free:
        return entry.name
    names = names if names is not None else book(architecture, entry.place)
    if entry.name in names.clashes:
        one, two = names.clashes[entry.name]
        raise UnknownModule(
            f"{next(iter(entry.tensors.values())).where}: {entry.name!r} means both {one} and {two} in "
            f"{architecture.name}; this format cannot tell them apart"
        )
    return names.table.get(entry.name, entry.name)


def spelled(architecture: Architecture | None, place: Place, module: str) -> str | None:
    """A module's name as `place` spells it (tails not yet applied), or None where the architecture lacks it."""
    if architecture is None:
        return None if needs_table(place) else module
    component = architecture.components[place.among(architecture.components) or ""]
    spec = component.spec(module)
    if spec is None or not spells(place, architecture, spec):
        return None
    name = spec.original if place.column(architecture.family) == "original" else spec.name
    if not place.flat:
        return name
    # Flat names are those of the published checkpoints, also where the installed class has lost their beginning.
    lost = component.optional_prefix if not name.startswith(component.optional_prefix) else ""
    return (lost + name).replace(".", "_")
