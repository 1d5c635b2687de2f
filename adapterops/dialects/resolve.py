"""Which base model a file is for: the spelled names are looked up in every architecture, never guessed at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Any, NamedTuple

from adapterops import architectures
from adapterops.adapter import Certainty, Fact, Update
from adapterops.architectures import Architecture, Component, ModuleSpec
from adapterops.dialects.match import Group, Reading, sample
from adapterops.dialects.table import Dialect, Place, traits
from adapterops.errors import AdapterOpsError, BrokenAdapter, CannotRepresent, UnknownArchitectureOfFile, UnknownModule
from adapterops.methods import METHODS

_ENOUGH, _MOST = 0.5, 2 / 3
"""The share of a file's modules that must have an architecture's names and shapes for the rest to count as errors; and where
the rest are dozens, which no slip explains, but a base model that has part of the names (Flux.1 and HunyuanVideo share many)."""


_SAMPLE = 24
"""The number of modules that tell a hopeless architecture, or the better of two dialects, without a look at all."""


class Fit(NamedTuple):
    """How well one architecture explains a file."""

    architecture: Architecture
    named: int
    shaped: int
    unknown: tuple[Group, ...]
    misshapen: tuple[Group, ...]
    total: int

    @property
    def whole(self) -> bool:
        """Whether every module is there and has the right shape."""
        return not self.unknown and not self.misshapen


class Identified(NamedTuple):
    """What `identify` found: the table, how certain it is, what to tell the user, and modules it has not."""

    architecture: Architecture | None
    fact: Fact[str | None]
    notes: tuple[str, ...] = ()
    unknown: tuple[Group, ...] = ()


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
    # A fused module that the tails leave out may have a part that they do not.
    tailed = spec.partial or (spec.joins and place.tails)
    return bool(spec.original) and (not tailed or spec.original.endswith(tuple(c for c, _ in place.tails)))


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
    if place.among(architecture.components) is None:
        return False
    return not place.only or bool(place.only & traits(architecture))


def needs_table(place: Place) -> bool:
    """Whether a spelled name means nothing without an architecture."""
    bare = not place.prefix and place.component != "*" and not place.sure
    return bare or place.flat or place.names != "canonical" or bool(place.names_in)


def fit(architecture: Architecture, groups: Sequence[Group]) -> Fit:
    """Look every module up in `architecture`."""
    unknown, misshapen, named = [], [], 0
    if len(groups) > 4 * _SAMPLE and not _plausible(architecture, groups):
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
            if _is_block(entry, architecture):
                named += 1
            else:
                unknown.append(entry)
            continue
        named += 1
        component = components[entry.place]
        spec = architecture.components[component].spec(name)
        probe = Update(component, name, entry.method, entry.tensors, options=entry.options)
        if spec is None or not fits(probe, spec):
            misshapen.append(entry)
    return Fit(architecture, named, named - len(misshapen), tuple(unknown), tuple(misshapen), len(groups))


def _is_block(entry: Group, architecture: Architecture) -> bool:
    """Whether a group's module is one that holds modules of the architecture, and its method acts on such."""
    if not METHODS[entry.method].blocks:
        return False
    component = architecture.components.get(entry.place.among(architecture.components) or "")
    return component is not None and any(name.startswith(entry.name + ".") for name in component.modules)


def fits(update: Update, spec: ModuleSpec) -> bool:
    """Whether an update can act on a module, or on one that it widens."""
    method = METHODS[update.method]
    if method.fits(update, spec.shape):
        return True
    inputs = update.tensors["A"].shape[1:2] if spec.widens and "A" in update.tensors else ()
    return bool(inputs) and inputs[0] > spec.shape[1] and method.fits(update, (spec.shape[0], inputs[0]))


def _candidates(groups: Sequence[Group]) -> list[Architecture]:
    """The built-in architectures that have every component of a file; all of them where none does."""
    known = sorted((architectures.load(name) for name in architectures.names()), key=lambda a: a.released)
    wanted = {g.place for g in groups}
    return [a for a in known if all(place.among(a.components) for place in wanted)] or known


def _spread(groups: Iterable[Group]) -> dict[Place, list[str]]:
    """Some of the names under each place."""
    names: dict[Place, list[str]] = {}
    for entry in groups:
        names.setdefault(entry.place, []).append(entry.name)
    return {place: own[:: max(1, len(own) // _SAMPLE)] for place, own in names.items()}


def _table(architecture: Architecture, place: Place, names: Iterable[str]) -> Mapping[str, str]:
    """The names of a component as `place` spells them; empty where not even the beginning of one of `names` is there,
    which is told without writing the component's modules out."""
    if not applies(place, architecture):
        return {}
    component = architecture.components[place.among(architecture.components) or ""]
    stems = tuple(component.stems.get(place.column(architecture.family), ("",)))
    if not component.optional_prefix and not any(name.startswith(stems) for name in names):
        return {}
    return book(architecture, place).table


def _plausible(
    architecture: Architecture, groups: Sequence[Group], wanted: Callable[[Iterable[bool]], bool] = any
) -> bool:
    """Whether any of a spread of modules is in `architecture` (one that has none of them has not half of the file's), or
    all of them."""
    return wanted(
        name in table
        for place, names in _spread(groups).items()
        for table in [_table(architecture, place, names)]
        for name in names
    )


def names_known(reading: Reading, given: Architecture | None = None) -> bool:
    """Whether any of a spread of the names that were read is one of a known base model, or of the given one."""
    known = [given] if given is not None else [architectures.load(name) for name in architectures.names()]
    places = {claim.place for claim in reading.claims}
    names = [claim.name for claim in sample(reading, _SAMPLE).claims]
    return any(not _table(a, place, names).keys().isdisjoint(names) for a in known for place in places)


def best_fit(groups: Sequence[Group], given: Architecture | None = None) -> int:
    """The number of modules that the best of the architectures (or the given one) has, by name and shape."""
    candidates = [adopt(groups, given)] if given is not None else _candidates(groups)
    return max((fit(architecture, groups).shaped for architecture in candidates), default=0)


def component_by_names(groups: Sequence[Group], given: Architecture | None = None) -> str | None:
    """The component whose modules the dotted names are, for files that do not say: the first that has them all."""
    candidates = [given] if given is not None else [architectures.load(name) for name in architectures.names()]
    groups = [g for g in groups if not g.place.free]
    lookup = [g for g in groups if g.method != "saved"] or list(groups)
    if not lookup:
        return None
    some = [g.name for g in lookup[:: max(1, len(lookup) // _SAMPLE)]]
    for architecture in candidates:
        for component in architecture.components:
            place = replace(lookup[0].place, component=component)
            if given is None:
                # A look at some of the names tells of most components that they do not have them all.
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


def _usual(found: Fit, groups: Sequence[Group]) -> int:
    """The number of modules that stand where files for this architecture usually have them."""
    own = traits(found.architecture)
    return sum(1 for g in groups if not g.place.usual or g.place.usual & own)


_NUMBERED = re.compile(r"(.*?)\.(\d+)\.")


def _reaches_the_end(architecture: Architecture, groups: Sequence[Group]) -> bool:
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


def identify(
    groups: Sequence[Group],
    path: str,
    given: Architecture | None = None,
    hint: str | None = None,
    allow_drop: bool = False,
    tell: Callable[[AdapterOpsError], None] | None = None,
    header: Mapping[str, str] | None = None,
) -> Identified:
    """The architecture of a file.

    `hint` is the one that a conversion recorded; it decides where modules alone fit several, and without it what the
    trainer's `header` calls the base.  With `allow_drop`
    modules that the architecture has not are returned in `unknown` instead of raised; with `tell`, all that is wrong is
    told to it, and such modules, and those of other shapes, are in `unknown`.

    With `given` (`--arch`, `--base`) every module must be in it.  Otherwise all known ones compete by names and
    shapes; a file whose names are canonical already may belong to none.

    Raises `UnknownModule`, `BrokenAdapter` (a shape that the base has not) or `UnknownArchitectureOfFile`.
    """
    groups = [g for g in groups if not g.place.free]
    if not groups:
        fact = Fact(
            given.name if given else None, Certainty.GIVEN if given else Certainty.UNKNOWN, "no module is named"
        )
        return Identified(given, fact)
    if given is not None:
        found = fit(given, groups)
        unknown = _insist(found, path, allow_drop, tell)
        return Identified(given, Fact(given.name, Certainty.GIVEN, "--arch or --base"), unknown=unknown)
    lookup = [g for g in groups if g.method != "saved"] or list(groups)
    fits: list[Fit] = []
    for architecture in _candidates(lookup):
        # Beside one that has everything, only another such counts.
        if not any(f.whole for f in fits) or _plausible(architecture, lookup, all):
            fits.append(fit(architecture, lookup))
    whole = {f.architecture.name: f.architecture for f in fits if f.whole}
    if len(whole) > 1 and hint not in whole and header:
        from adapterops.architectures.declared import in_header  # only ever needed here

        said = sorted(in_header(header) & whole.keys())
        if len(said) == 1:
            stated: Fact[str | None] = Fact(said[0], Certainty.READ, "modules fit several, and the header names it")
            return Identified(whole[said[0]], stated)
    best = max(fits, key=lambda f: (f.shaped, f.named, f.architecture.name == hint, _usual(f, lookup)))
    dependent = any(needs_table(g.place) for g in groups)
    enough = best.total and best.shaped / best.total >= (_ENOUGH if len(best.unknown) < _SAMPLE else _MOST)
    if not enough:
        if not dependent:
            return Identified(None, Fact(None, Certainty.UNKNOWN, "its module names are used as they stand"))
        refusal = _refusal(best, path, fits)
        if tell is None:
            raise refusal
        tell(refusal)
        return Identified(None, Fact(None, Certainty.UNKNOWN, "its module names are no known base model's"))
    unknown = _insist(best, path, allow_drop, tell)
    name = best.architecture.name
    rivals = [f for f in fits if f.whole and f is not best]
    if rivals and name == hint:
        recorded: Fact[str | None] = Fact(name, Certainty.READ, "recorded by the conversion that wrote the file")
        return Identified(best.architecture, recorded, unknown=unknown)
    others = [f.architecture.name for f in rivals if _usual(f, lookup) == _usual(best, lookup)]
    if others and _reaches_the_end(best.architecture, lookup):
        # It ends where this base does: nobody trains just as many blocks of one that has more.
        longer = {f.architecture.name for f in rivals if not _reaches_the_end(f.architecture, lookup)}
        others = [other for other in others if other not in longer]
        if not others:
            counted: Fact[str | None] = Fact(
                name, Certainty.DERIVED, "module names and shapes, and the number of blocks"
            )
            return Identified(best.architecture, counted, unknown=unknown)
    if others:
        note = f"its modules fit {name} and {', '.join(others)} alike; {name} is taken (--arch decides)"
        return Identified(
            best.architecture, Fact(name, Certainty.ASSUMED, note, tuple(others)), (f"architecture: {note}",), unknown
        )
    return Identified(best.architecture, Fact(name, Certainty.DERIVED, "module names and shapes"), unknown=unknown)


def _refusal(best: Fit, path: str, fits: Sequence[Fit]) -> UnknownArchitectureOfFile:
    """The error for a file that no known base model has half of the modules of."""
    known = ", ".join(f.architecture.name for f in fits)
    if best.named and not best.shaped:
        entry = best.misshapen[0]
        tensor, *rest = sorted(entry.tensors.values(), key=lambda t: -t.numel)
        beside = "".join(f" (beside {t.key!r} {list(t.shape)})" for t in rest[:1] if t.numel > 1)
        return UnknownArchitectureOfFile(
            f"{tensor.where}: shape {list(tensor.shape)}{beside} fits none of the known base models ({known}), though "
            f"{best.named} module names are those of {best.architecture.name}; give --base CONFIG of its base model"
        )
    entry = (best.unknown or best.misshapen)[0]
    others = f" and {len(best.unknown) - 1} others are" if len(best.unknown) > 1 else " is"
    near = {n: f.architecture.name for f in fits if applies(entry.place, f.architecture) for n in _near(entry, f)}
    nearest = "".join(f"; the nearest known: {name!r} of {base}" for name, base in list(near.items())[:1])
    return UnknownArchitectureOfFile(
        f"{path}: module {entry.name!r}{others} in none of the known base models ({known}){nearest}. If the base is "
        "another, give its config: --base CONFIG; if the keys are botched, repair them: --rename PATTERN=REPLACEMENT"
    )


def _near(entry: Group, found: Fit) -> list[str]:
    return book(found.architecture, entry.place).nearest(entry.name)[:1]


def _insist(
    found: Fit, path: str, allow_drop: bool, tell: Callable[[AdapterOpsError], None] | None
) -> tuple[Group, ...]:
    """Raise for modules that a base model has not, or not in that shape; with `tell`, that is told.

    The modules that are left out.
    """
    arch = found.architecture
    if found.unknown and (not allow_drop or tell is not None):
        entry = found.unknown[0]
        tensor = next(iter(entry.tensors.values()))
        component = entry.place.among(arch.components) or entry.place.component
        near = book(arch, entry.place).nearest(entry.name) if applies(entry.place, arch) else []
        hint = f"; the nearest known: {', '.join(near)}" if near else ""
        if component in arch.components and not applies(entry.place, arch):
            hint = f"; files for {arch.name} do not begin the keys of its {component} with {entry.place.prefix!r}"
        else:
            hint = _elsewhere(entry, found.named) or hint
        more = f" ({len(found.unknown)} such modules)" if len(found.unknown) > 1 else ""
        _say(
            tell,
            UnknownModule(
                f"{tensor.where}: {arch.name} has no module {entry.name!r} in {component}{more}{hint}. "
                "If the base is another model, name it with --arch or --base CONFIG; --rename repairs botched keys",
                keys=(t.key for g in found.unknown for t in g.tensors.values()),
            ),
        )
    if found.misshapen:
        entry = found.misshapen[0]
        tensors = ", ".join(f"{t.key!r} {list(t.shape)}" for t in list(entry.tensors.values())[:3])
        name = book(arch, entry.place).table[entry.name]
        spec = arch.components[entry.place.among(arch.components) or ""].spec(name)
        shape = list(spec.shape) if spec is not None else []
        _say(
            tell,
            BrokenAdapter(
                f"{path}: {tensors} cannot act on {name}, whose weight in {arch.name} is {shape}"
                + (f" ({len(found.misshapen)} such modules)" if len(found.misshapen) > 1 else "")
                + "; if the base is another model, name it with --arch or --base CONFIG",
                fault="other-shape",
                keys=(t.key for g in found.misshapen for t in g.tensors.values()),
            ),
        )
    return (*found.unknown, *found.misshapen) if tell is not None else found.unknown


def _say(tell: Callable[[AdapterOpsError], None] | None, error: AdapterOpsError) -> None:
    if tell is None:
        raise error
    tell(error)


def _elsewhere(entry: Group, others: int) -> str:
    """For a message: which built-in base model has a module of that name, in either of its spellings.

    `others` of the file's modules are the base's that was tried.
    """
    mixed = ": the file mixes two spellings, or two base models" if others else ""
    for known in map(architectures.load, architectures.names()):
        for column in ("canonical", "original") if applies(entry.place, known) else ():
            module = book(known, replace(entry.place, names=column, names_in={})).table.get(entry.name)
            if module is not None:
                return f"; it names {module} of {known.name}{mixed}"
    return ""


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
    first = next((g for g in dotted if g.name not in tables[g.place] and not _is_block(g, architecture)), None)
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


def writing_place(dialect: Dialect, component: str, architecture: Architecture | None) -> Place | None:
    """The row by which `dialect` spells a component: the first that is meant for the architecture."""
    for place in dialect.places:
        if place.whole:
            continue
        if place.component == "*" or (place.free and place.component == component):
            return place
        known = place.among(architecture.components) if architecture is not None else None
        if architecture is None and component in (place.component, *place.instead):
            return place
        if architecture is not None and known == component and applies(place, architecture):
            return place
    return None


class Placing:
    """The rows by which a dialect spells an architecture's components: the recorded ones, or the usual."""

    def __init__(self, dialect: Dialect, architecture: Architecture | None, spelling: Mapping[str, Any]) -> None:
        self._dialect, self._architecture = dialect, architecture
        self._recorded: Mapping[str, str] = spelling.get("prefixes", {})
        self._found: dict[str, Place | None] = {}

    def find(self, component: str) -> Place | None:
        """The row of a component; None where there is none."""
        if component not in self._found:
            self._found[component] = self._find(component)
        return self._found[component]

    def _find(self, component: str) -> Place | None:
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
