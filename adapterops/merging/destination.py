"""Where a merge's result goes: its format and place, what can stand there, and at how many scales."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from adapterops import api, registry
from adapterops.adapter import Adapter
from adapterops.dialects.table import AlphaIn, Dialect
from adapterops.errors import AdapterOpsError, CannotRepresent
from adapterops.loading import KEPT_FIELDS, PathLike
from adapterops.merging import one_scale
from adapterops.merging.recipe import Recipe
from adapterops.plugin import Format, Rounding, Target

_OFFERED = 3
"""Formats that a message names."""


@dataclass(slots=True)
class Destination:
    """What a recipe, and the arguments that go before it, say of the output."""

    recipe: Recipe
    fields: Mapping[str, Any]
    overwrite: bool
    shown: list[Sequence[Adapter]] = field(default_factory=list)
    """The adapters of each step that has begun."""

    def target(self, adapter: Adapter) -> tuple[Format, Dialect, PathLike]:
        """The format, the dialect and the path; those of the adapter, and `merged`, where nothing is said."""
        form, dialect = registry.find(self.recipe.output.get("to") or adapter.provenance.dialect)
        usual = "merged" if form.is_folder else f"merged{form.suffixes[0]}"
        return form, dialect, self.recipe.output.get("path") or usual

    def look(self, adapters: Sequence[Adapter]) -> None:
        """Shown a step's adapters: refuses a place that cannot be written, or is a source's, once the format is known."""
        self.shown.append(adapters)
        decides = _deciding(self.recipe)
        if len(self.shown) > decides:
            form, _, place = self.target(self.shown[decides][0])
            api.insist_on_place(place, form, [adapter for step in self.shown for adapter in step], self.overwrite)

    def ready(self, planned: Adapter) -> None:
        """Shown what will come out: refuses what the format cannot hold, whatever its scales."""
        try:
            self._fitting(planned, self.target(planned)[1], self.drops)
        except CannotRepresent as error:
            raise self.offering(error, planned) from error

    def fitted(self, adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
        """The adapter at as many scales as the format has places for, and what the user should know of that."""
        _, dialect, _ = self.target(adapter)
        if one_scale.differ(adapter) and not self.folds(dialect):
            return self._fitting(adapter, dialect, self.drops)
        return adapter, ()

    def offering(self, error: CannotRepresent, refused: Adapter) -> CannotRepresent:
        """The error; where nobody named the format, with those that hold all that comes out."""
        holding = () if self.recipe.output.get("to") else self._holding(refused)
        others = list(islice(holding, _OFFERED))
        if not others:
            return error
        ways = f"without --to the first source's format is written; --to {' or '.join(others)} holds all that comes out"
        return CannotRepresent(f"{error} ({ways})", fault=error.fault, keys=error.keys)

    def folds(self, dialect: Dialect) -> bool:
        """Whether factors take up their scales."""
        # The scale that stacked factors keep is our own choice; where no reader asks for one there is none.
        return bool(self.recipe.output.get("fold_alpha")) or dialect.alpha is AlphaIn.NOWHERE

    @property
    def drops(self) -> bool:
        """Whether what the format cannot hold is left out: who lets keys go when reading lets those go, too."""
        return any(ref.reading.get("allow_drop") for step in self.recipe.steps for ref in step.sources)

    def own_fields(self, merged: Adapter) -> dict[str, Any]:
        """The fields that are said of the output: what every source was read with (its scale, say) is not said again."""
        taken = set(merged.provenance.given) - set(KEPT_FIELDS)
        return {name: value for name, value in self.fields.items() if name not in taken}

    def home(self, adapter: Adapter) -> str:
        """The folder from which the paths of the output's recipe lead."""
        form, _, place = self.target(adapter)
        path = os.path.abspath(api.place_of(os.fspath(place), form))
        return path if form.is_folder else os.path.dirname(path)

    def room(self) -> str:
        """The folder where the output will stand, or the nearest one above it that is there: its disk has the room."""
        path = self.recipe.output.get("path")
        place = os.getcwd() if path is None else os.path.dirname(os.path.abspath(os.fspath(path)))
        while not os.path.isdir(place):
            place = os.path.dirname(place)
        return place

    def _fitting(self, adapter: Adapter, dialect: Dialect, allow_drop: bool) -> tuple[Adapter, tuple[str, ...]]:
        """The adapter as the dialect takes it, and what the user should know of that.  Raises `CannotRepresent`."""
        target = Target(dialect, adapter.base, self.own_fields(adapter), allow_drop=allow_drop)
        folds = self.folds(dialect)

        def plan(tried: Adapter) -> None:
            api.planned(tried, target, Rounding(fold_alpha=folds))

        if not folds:
            return one_scale.fitting(adapter, plan)
        plan(adapter)
        return adapter, ()

    def _holding(self, refused: Adapter) -> Iterator[str]:
        """The dialects that hold the whole adapter: those of the sources, then the first of every format."""
        of_sources = (
            registry.find(a.provenance.dialect)[1] for step in self.shown for a in step if a.provenance.dialect
        )
        first = (form.dialects[0] for form in registry.formats().values())
        for dialect in dict.fromkeys(chain(of_sources, first)):
            try:
                self._fitting(refused, dialect, allow_drop=False)
            except AdapterOpsError:
                continue
            yield dialect.name


def _deciding(recipe: Recipe) -> int:
    """Which step has the source whose dialect is written, where nothing else is said: the first source of the last step, or
    of the one whose result that is."""
    numbers = {step.name: number for number, step in enumerate(recipe.steps)}
    number = len(recipe.steps) - 1
    while recipe.steps[number].sources[0].step:
        number = numbers[recipe.steps[number].sources[0].step]
    return number
