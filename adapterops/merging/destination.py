"""Where a merge's result goes: its format and place, what can stand there, and at how many scales."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapterops import api, registry
from adapterops.adapter import Adapter
from adapterops.dialects.table import AlphaIn, Dialect
from adapterops.loading import KEPT_FIELDS, PathLike
from adapterops.merging import one_scale
from adapterops.merging.recipe import Recipe
from adapterops.plugin import Format, Target


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
        _, dialect, _ = self.target(planned)
        if not self.folds(dialect):
            one_scale.fitting(planned, self._try)

    def fitted(self, adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
        """The adapter at as many scales as the format has places for, and what the user should know of that."""
        _, dialect, _ = self.target(adapter)
        if one_scale.differ(adapter) and not self.folds(dialect):
            return one_scale.fitting(adapter, self._try)
        return adapter, ()

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

    def _try(self, adapter: Adapter) -> None:
        form, dialect, _ = self.target(adapter)
        form.write(adapter, Target(dialect, adapter.base, self.own_fields(adapter), allow_drop=self.drops))


def _deciding(recipe: Recipe) -> int:
    """Which step has the source whose dialect is written, where nothing else is said: the first source of the last step, or
    of the one whose result that is."""
    numbers = {step.name: number for number, step in enumerate(recipe.steps)}
    number = len(recipe.steps) - 1
    while recipe.steps[number].sources[0].step:
        number = numbers[recipe.steps[number].sources[0].step]
    return number
