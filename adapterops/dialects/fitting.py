"""How well base models explain a file: its modules looked up in their tables, by name and by shape."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import NamedTuple

from adapterops import architectures
from adapterops.adapter import Update
from adapterops.architectures import Architecture, ModuleSpec
from adapterops.dialects.aligning import adopt, align
from adapterops.dialects.match import Group, Reading, sample
from adapterops.dialects.names import applies, book, is_block
from adapterops.dialects.table import Place, traits
from adapterops.methods import METHODS

SAMPLE = 24
"""The number of modules that tell a hopeless architecture, or the better of two dialects, without a look at all."""


class Fit(NamedTuple):
    """How well one architecture explains a file."""

    architecture: Architecture
    named: int
    shaped: int
    unknown: tuple[Group, ...]
    misshapen: tuple[Group, ...]
    total: int
    untold: int = 0
    """How many of the unknown ones belong to text encoders that the table has not: it tells nothing of them."""

    @property
    def whole(self) -> bool:
        """Whether every module is there and has the right shape."""
        return not self.unknown and not self.misshapen

    @property
    def told(self) -> bool:
        """Whether every module is so of which the table tells anything, and there are such."""
        return not self.misshapen and len(self.unknown) == self.untold < self.total


def fit(architecture: Architecture, groups: Sequence[Group]) -> Fit:
    """Look every module up in `architecture`."""
    return fit_all([architecture], groups)[0]


def fit_all(known: Iterable[Architecture], groups: Sequence[Group]) -> list[Fit]:
    """Look every module up in each of the architectures."""
    places = {g.place for g in groups}
    strange = tuple(groups)
    untold = sum(is_encoder(g.place) for g in groups)
    return [
        _fit(architecture, groups)
        if any(place.among(architecture.components) for place in places)
        else Fit(architecture, 0, 0, strange, (), len(strange), untold)
        for architecture in known
    ]


def _fit(architecture: Architecture, groups: Sequence[Group]) -> Fit:
    unknown, misshapen, named, untold = [], [], 0, 0
    if len(groups) > 4 * SAMPLE and not _plausible(architecture, groups):
        return Fit(architecture, 0, 0, tuple(groups), (), len(groups))
    tables: dict[Place, Mapping[str, str]] = {}
    components: dict[Place, str] = {}
    spread = _spread(groups)
    for entry in groups:
        if entry.place not in tables:
            tables[entry.place] = _table(architecture, entry.place, spread[entry.place])
            components[entry.place] = entry.place.among(architecture.components) or ""
        name = tables[entry.place].get(entry.name)
        if name is None:
            if is_block(entry, architecture):
                named += 1
            else:
                unknown.append(entry)
                untold += not components[entry.place] and is_encoder(entry.place)
            continue
        component = components[entry.place]
        spec = architecture.components[component].spec(name)
        if lacks_bias(entry, spec):
            unknown.append(entry)
            continue
        named += 1
        probe = Update(component, name, entry.method, entry.tensors, options=entry.options)
        if spec is None or not fits(probe, spec):
            misshapen.append(entry)
    return Fit(architecture, named, named - len(misshapen), tuple(unknown), tuple(misshapen), len(groups), untold)


def is_encoder(place: Place) -> bool:
    """Whether the row is a text encoder's."""
    return place.component.startswith("text_encoder")


def lacks_bias(entry: Group, spec: ModuleSpec | None) -> bool:
    """Whether a difference of a bias is that of a module without one."""
    return spec is not None and not spec.bias and entry.method == "diff" and "bias" in entry.tensors


def fits(update: Update, spec: ModuleSpec) -> bool:
    """Whether an update can act on a module, or on one that it widens."""
    method = METHODS[update.method]
    if method.fits(update, spec.shape):
        return True
    inputs = update.tensors["A"].shape[1:2] if spec.widens and "A" in update.tensors else ()
    return bool(inputs) and inputs[0] > spec.shape[1] and method.fits(update, (spec.shape[0], inputs[0]))


def contenders(groups: Sequence[Group], said: str = "") -> list[Fit]:
    """How well the built-in architectures explain a file, the oldest first.

    Only those count that have everything.  Where none has, those do that have every component of it, or lack nothing but text
    encoders (few tables have these); where no architecture does, all are tried.  Variants of a base that has everything do not
    count, unless their word is in `said`, which is what the file says of its base.
    """
    fits = _whole(groups, said) or fit_all(_able(groups), groups)
    shaped = {found.architecture.name: found.shaped for found in fits}
    idle = (f for f in fits if _idle(f.architecture, said) and f.shaped <= shaped.get(f.architecture.family, -1))
    left = {found.architecture.name for found in idle}
    return [found for found in fits if found.architecture.name not in left]


def _idle(architecture: Architecture, said: str) -> bool:
    """Whether it is a variant that only what its base lacks can tell."""
    return bool(architecture.variant) and architecture.variant not in said


def _whole(groups: Sequence[Group], said: str = "") -> list[Fit]:
    """Of the built-in architectures that have everything, the oldest first."""
    spread = _spread(groups)
    out: dict[str, Fit] = {}
    for architecture in _known(groups):
        if _idle(architecture, said) and architecture.family in out:
            continue
        if _may_be_whole(architecture, spread) and (found := fit(architecture, groups)).whole:
            out[architecture.name] = found
    return list(out.values())


def _known(groups: Sequence[Group], encoders: bool = True) -> list[Architecture]:
    """The built-in architectures that have every component of a file, the oldest first; without `encoders` text encoders do not
    count."""
    known = sorted((architectures.load(name) for name in architectures.names()), key=lambda known: known.turn)
    places = {g.place for g in groups if encoders or not is_encoder(g.place)}
    return [a for a in known if all(place.among(a.components) for place in places)]


def _able(groups: Sequence[Group]) -> list[Architecture]:
    """Those that may have a part of a file; all of them where none has its components."""
    alone = all(is_encoder(g.place) for g in groups)
    return _known(groups, encoders=alone) or _known(())


def _spread(groups: Iterable[Group]) -> dict[Place, list[str]]:
    """Some of the names under each place."""
    names: dict[Place, list[str]] = {}
    for entry in groups:
        names.setdefault(entry.place, []).append(entry.name)
    return {place: own[:: max(1, len(own) // SAMPLE)] for place, own in names.items()}


def _stems(architecture: Architecture, place: Place) -> tuple[str, ...]:
    """How names under a place begin, which is told without writing the component's modules out; nothing where it has none."""
    if not applies(place, architecture):
        return ()
    component = place.among(architecture.components) or ""
    return tuple(architectures.beginnings_of(architecture, component, place.column(architecture.family)))


def _table(architecture: Architecture, place: Place, names: Iterable[str]) -> Mapping[str, str]:
    """The names of a component as `place` spells them; empty where not even the beginning of one of `names` is there."""
    stems = _stems(architecture, place)
    return book(architecture, place).table if stems and any(name.startswith(stems) for name in names) else {}


def _plausible(architecture: Architecture, groups: Sequence[Group]) -> bool:
    """Whether any of a spread of modules is in `architecture`: one that has none of them has not half of the file's."""
    return any(
        name in table
        for place, names in _spread(groups).items()
        for table in [_table(architecture, place, names)]
        for name in names
    )


def _may_be_whole(architecture: Architecture, spread: Mapping[Place, Sequence[str]]) -> bool:
    """Whether all of a spread of modules are in `architecture`."""
    stems = {place: _stems(architecture, place) for place in spread}
    begun = all(name.startswith(stems[place]) for place, names in spread.items() for name in names if stems[place])
    return (
        all(stems.values())
        and begun
        and all(_consist(architecture, place, names) for place, names in spread.items())
        and all(name in book(architecture, place).table for place, names in spread.items() for name in names)
    )


def _consist(architecture: Architecture, place: Place, names: Iterable[str]) -> bool:
    """Whether dotted names are of nothing but what `architecture` has between dots, as far as its file's lines tell."""
    if place.flat:
        return True
    component = place.among(architecture.components) or ""
    told = architectures.parts_of(architecture, component, place.column(architecture.family))
    return told is None or all(part in told or part.isdigit() for name in names for part in name.split("."))


def names_known(reading: Reading, given: Architecture | None = None) -> bool:
    """Whether any of a spread of the names that were read is one of a known base model, or of the given one."""
    known = [given] if given is not None else [architectures.load(name) for name in architectures.names()]
    places = {claim.place for claim in reading.claims}
    names = [claim.name for claim in sample(reading, SAMPLE).claims]
    return any(not _table(a, place, names).keys().isdisjoint(names) for a in known for place in places)


def best_fits(readings: Sequence[Sequence[Group]], given: Architecture | None = None) -> list[int]:
    """For each way to read a file the number of modules that the best of the architectures (or the given one) has, by name
    and shape; 0 for those that have no whole one, where another has."""
    if given is not None:
        return [fit(adopt(groups, given), groups).shaped for groups in readings]
    # A wrong way has no base at all, which would be sought in every table.
    fits = [_whole(groups) for groups in readings]
    if not any(fits):
        fits = [fit_all(_able(groups), groups) for groups in readings]
    return [max((found.shaped for found in own), default=0) for own in fits]


def whole_fits(groups: Sequence[Group]) -> list[str]:
    """The built-in architectures that have everything, but for variants of one that has."""
    found = _whole(groups)
    families = {f.architecture.name for f in found}
    return [f.architecture.name for f in found if not f.architecture.variant or f.architecture.family not in families]


def component_by_names(groups: Sequence[Group], given: Architecture | None = None) -> str | None:
    """The component whose modules the dotted names are, for files that do not say: the first that has them all."""
    candidates = [given] if given is not None else [architectures.load(name) for name in architectures.names()]
    groups = [g for g in groups if not g.place.free]
    lookup = [g for g in groups if g.method != "saved"] or list(groups)
    if not lookup:
        return None
    some = [g.name for g in lookup[:: max(1, len(lookup) // SAMPLE)]]
    places: dict[str, Place] = {}
    for architecture in candidates:
        for component in architecture.components:
            place = places.setdefault(component, lookup[0].place)
            if place.component != component:
                place = places[component] = replace(place, component=component)
            if given is None:
                # A look at some of the names tells of most components that they do not have them all.
                if not some[0].startswith(_stems(architecture, place)):
                    continue
                table = _table(architecture, place, some)
                if any(name not in table for name in some):
                    continue
            tried = [g._replace(place=place) for g in lookup]
            change = align(tried, architecture) if given is not None else ("", "")
            if change is None:
                continue
            strip, add = change
            aligned = [g._replace(name=add + g.name[len(strip) :]) for g in tried]
            if fit(architecture, aligned).whole:
                return component
    return None


def usual(found: Fit, places: Mapping[Place, int]) -> int:
    """The number of modules that stand where files for this architecture usually have them, of so many under each place."""
    own = traits(found.architecture)
    return sum(number for place, number in places.items() if not place.usual or place.usual & own)


_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")


def reaches_the_end(architecture: Architecture, groups: Sequence[Group]) -> bool:
    """Whether a file has a module of the first and of the last block of each list of blocks that it has any of."""
    last: dict[tuple[str, str], int] = {}
    begun = set()
    for entry in groups:
        component = entry.place.among(architecture.components) or ""
        numbered = _NUMBERED.match(book(architecture, entry.place).table.get(entry.name, ""))
        if numbered:
            blocks = component, numbered[1]
            last[blocks] = max(last.get(blocks, 0), int(numbered[2]))
            if numbered[2] == "0":
                begun.add(blocks)
    further = (
        any(map(str.startswith, architecture.components[component].modules, repeat(f"{blocks}.{number + 1}.")))
        for (component, blocks), number in last.items()
    )
    return bool(last) and begun == last.keys() and not any(further)


def fills(architecture: Architecture, groups: Sequence[Group]) -> bool:
    """Whether a file has a module of every block of each list of blocks that the architecture has, and of each of its components
    in the file; and of two lists at least, since one alone may have been chosen."""
    found: dict[tuple[str, str], set[str]] = {}
    for entry in groups:
        component = entry.place.among(architecture.components) or ""
        numbered = _NUMBERED.match(book(architecture, entry.place).table.get(entry.name, ""))
        if numbered:
            found.setdefault((component, numbered[1]), set()).add(numbered[2])
    every: dict[tuple[str, str], set[str]] = {}
    for component in {component for component, _ in found}:
        for name in architecture.components[component].modules:
            numbered = _NUMBERED.match(name)
            if numbered:
                every.setdefault((component, numbered[1]), set()).add(numbered[2])
    return len(every) > 1 and found == every
