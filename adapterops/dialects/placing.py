"""By which row of a dialect's table each component is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adapterops.adapter import Update, Verbatim
from adapterops.architectures import Architecture
from adapterops.dialects import verbatim
from adapterops.dialects.names import applies
from adapterops.dialects.table import Dialect, Place, traits
from adapterops.errors import CannotRepresent
from adapterops.methods import METHODS


def writing_place(dialect: Dialect, component: str, architecture: Architecture | None) -> Place | None:
    """The row by which `dialect` spells a component: the usual one, else the first that is meant for the architecture."""
    first = None
    for place in dialect.places:
        if place.whole:
            continue
        if place.component == "*" or (place.free and place.component == component):
            return first or place
        if architecture is None and component in (place.component, *place.instead):
            return place
        known = place.among(architecture.components) if architecture is not None else None
        if architecture is not None and known == component and applies(place, architecture):
            if place.usual & traits(architecture):
                return place
            first = first or place
    return first


class Placing:
    """The rows by which a dialect spells an architecture's components: the recorded ones, or the usual."""

    def __init__(
        self,
        dialect: Dialect,
        architecture: Architecture | None,
        spelling: Mapping[str, Any],
        kept: Verbatim | None = None,
    ) -> None:
        self._dialect, self._architecture, self._kept = dialect, architecture, kept
        self._recorded: Mapping[str, str] = spelling.get("prefixes", {})
        self._found: dict[str, Place | None] = {}

    def find(self, component: str) -> Place | None:
        """The row of a component; None where there is none."""
        if component not in self._found:
            self._found[component] = self._find(component)
        return self._found[component]

    def _find(self, component: str) -> Place | None:
        if self._kept is not None and component in self._kept.rows:
            return verbatim.place_of(self._dialect, component, self._kept)
        recorded = self._recorded.get(component)
        for place in self._dialect.places if recorded is not None else ():
            if component in (place.component, *place.instead) and place.prefix == recorded:
                return place
        return writing_place(self._dialect, component, self._architecture)

    def _whole(self, update: Update) -> Place | None:
        """The row of what a component has once."""
        for place in self._dialect.places:
            fits = place.component in ("*", update.component)
            if place.whole and fits and any(suffix.method == update.method for suffix in place.suffixes):
                return place
        return None

    def of(self, update: Update) -> Place:
        """The row of an update's component.  Raises `CannotRepresent` where there is none."""
        place = self.find(update.component) if update.module else self._whole(update)
        if place is not None:
            return place
        dialect, architecture = self._dialect, self._architecture
        if not update.module:
            raise CannotRepresent(
                f"{update.name}: {METHODS[update.method].title} belongs to no module, and {dialect.title} has no place for "
                f"it (tensor {next(iter(update.tensors.values())).key!r})"
            )
        if any(update.component in (p.component, *p.instead) for p in dialect.places):
            what = architecture.name if architecture else "a base model that is not known"
            raise CannotRepresent(f"{update.name}: {dialect.title} has no spelling for this component of {what}")
        known = ", ".join(dict.fromkeys(p.component for p in dialect.places))
        if update.component == "model":
            raise CannotRepresent(
                f"{update.name}: {dialect.title} holds the components of pipelines ({known}), and this adapter is for a model "
                "by itself; --to peft holds it"
            )
        raise CannotRepresent(
            f"{update.name}: {dialect.title} has no such component; it knows {known}; --allow-drop leaves it out"
        )
