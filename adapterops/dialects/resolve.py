"""Which base model a file is for: the spelled names are looked up in every architecture, never guessed at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from adapterops import architectures
from adapterops.adapter import Certainty, Fact
from adapterops.architectures import Architecture
from adapterops.dialects.fitting import SAMPLE, Fit, contenders, fills, fit, reaches_the_end, usual
from adapterops.dialects.match import Group
from adapterops.dialects.names import applies, book, needs_table
from adapterops.errors import AdapterOpsError, BrokenAdapter, UnknownArchitectureOfFile, UnknownModule
from adapterops.storage import Source

_ENOUGH, _MOST = 0.5, 2 / 3
"""The share of a file's modules that must have an architecture's names and shapes for the rest to count as errors; and where
the rest are dozens, which no slip explains, but a base model that has part of the names (Flux.1 and HunyuanVideo share many)."""


_ASKED = 4
"""The number of base models whose names are searched for one like an unknown one: in large tables that takes long."""

_BLOCKS = "module names and shapes, and the number of blocks"
_DECLARED = "modules fit several, and the header or the config names it"


class Identified(NamedTuple):
    """What `identify` found: the table, how certain it is, what to tell the user, and modules it has not."""

    architecture: Architecture | None
    fact: Fact[str | None]
    notes: tuple[str, ...] = ()
    unknown: tuple[Group, ...] = ()
    refusal: UnknownArchitectureOfFile | None = None
    """Why there is no table, for names that mean nothing without one."""


def identify(
    groups: Sequence[Group],
    path: str,
    given: Architecture | None = None,
    hint: str | None = None,
    allow_drop: bool = False,
    tell: Callable[[AdapterOpsError], None] | None = None,
    source: Source | None = None,
    declared: bool = False,
    rivals_by_name: Sequence[str] = (),
) -> Identified:
    """The architecture of a file.

    `hint` is the one that a conversion recorded; it decides where modules alone fit several, and without it what the header or
    the config of `source` calls the base; `declared` says that this has decided already how the names are read.
    `rivals_by_name` are base models by whose names they can be read otherwise, where nothing has decided.
    With `allow_drop` modules that the architecture has not are returned in `unknown` instead of raised; with `tell`, all that
    is wrong is told to it, and such modules, and those of other shapes, are in `unknown`.

    With `given` (`--arch`, `--base`) every module must be in it.  Otherwise all known ones compete by names and
    shapes; a file whose names are canonical already may belong to none.  Where none has everything, one that lacks nothing but
    text encoders is as good as any that has as much of the rest.

    Where no base model has half of the names, and they mean nothing without one, `refusal` says so.

    Raises `UnknownModule`, `BrokenAdapter` (a shape that the base has not) or `UnknownArchitectureOfFile` (names of a base in
    shapes that it has not).
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
    places = Counter(g.place for g in lookup)
    fits = contenders(lookup, _said(hint, source))
    # Those that have everything, or else everything that their tables tell of.
    level = [f for f in fits if f.whole] or [f for f in fits if f.told]

    def worth(found: Fit) -> tuple[int, bool, int, int, bool, int]:
        named = found.architecture.name == hint
        return found.shaped, found.told, -found.untold, found.named, named, usual(found, places)

    best = max(fits, key=worth)
    named = _declared(level, hint, source) if level and level != [best] else []
    best = max(named or fits, key=worth)
    if len(named) == 1:
        fact = Fact(best.architecture.name, Certainty.READ, _DECLARED)
        return Identified(best.architecture, fact, unknown=_insist(best, path, allow_drop, tell))
    level = named or level
    dependent = any(needs_table(g.place) for g in groups)
    asked = best.total - best.untold
    enough = asked and best.shaped / asked >= (_ENOUGH if len(best.unknown) - best.untold < SAMPLE else _MOST)
    if not enough:
        if not dependent:
            return Identified(None, Fact(None, Certainty.UNKNOWN, "its module names are used as they stand"))
        refusal = _refusal(best, path, fits)
        if tell is None and max(found.named for found in fits) >= _ENOUGH * len(lookup):
            raise refusal
        nobody: Fact[str | None] = Fact(None, Certainty.UNKNOWN, "its module names are no known base model's")
        if tell is not None:
            tell(refusal)
            return Identified(None, nobody)
        return Identified(None, nobody, (_kept(best),), refusal=refusal)
    best, fact = _decided(best, level, lookup, hint, declared, rivals_by_name)
    notes = (noted(fact),) if fact.certainty is Certainty.ASSUMED else ()
    return Identified(best.architecture, fact, notes, _insist(best, path, allow_drop, tell))


def _decided(
    best: Fit,
    level: Sequence[Fit],
    lookup: Sequence[Group],
    hint: str | None,
    declared: bool,
    rivals_by_name: Sequence[str],
) -> tuple[Fit, Fact[str | None]]:
    """Of those that fit a file as well as the best does the one that is taken, and how certain that is."""
    name = best.architecture.name
    places = Counter(g.place for g in lookup)
    rivals = [f for f in level if best.told and f.shaped == best.shaped and f is not best]
    if rivals and name == hint:
        return best, Fact(name, Certainty.READ, "recorded by the conversion that wrote the file")
    others = [f.architecture.name for f in rivals if usual(f, places) == usual(best, places)]
    exact = [f for f in rivals if f.architecture.name in others and fills(f.architecture, lookup)]
    if len(exact) == 1 and not fills(best.architecture, lookup):
        # It has every block of that base and none of those that others have further.
        return exact[0], Fact(exact[0].architecture.name, Certainty.DERIVED, _BLOCKS)
    ends = (bool(others) or best.whole) and reaches_the_end(best.architecture, lookup)
    if others and ends:
        # It ends where this base does: nobody trains just as many blocks of one that has more.
        longer = {f.architecture.name for f in rivals if not reaches_the_end(f.architecture, lookup)}
        others = [other for other in others if other not in longer]
        if not others:
            return best, Fact(name, Certainty.DERIVED, _BLOCKS)
    if best.whole and not ends:
        others += [other for other in rivals_by_name if other != name and other not in others]
    if others:
        return best, oldest(name, others)
    if declared:
        return best, Fact(name, Certainty.READ, _DECLARED)
    return best, Fact(name, Certainty.DERIVED, "module names and shapes")


def oldest(name: str, others: Sequence[str]) -> Fact[str | None]:
    """The base model of what fits several alike, of which `name` is the oldest."""
    note = f"its modules fit {name} and {', '.join(others)} alike; {name} is taken (--arch decides)"
    return Fact(name, Certainty.ASSUMED, note, tuple(others))


def noted(assumed: Fact[str | None]) -> str:
    """The note that tells of a base model that was assumed."""
    return f"architecture: {assumed.source}"


def _said(hint: str | None, source: Source | None) -> str:
    """All that a file, or a config beside it, calls its base, in lower case."""
    from adapterops.architectures.declared import values  # as below

    stated = values(source.metadata, source.config) if source is not None else []
    return " ".join([hint or "", *stated]).lower()


def _declared(level: Sequence[Fit], hint: str | None, source: Source | None) -> list[Fit]:
    """Of several that modules do not tell apart those that the file may mean by the name of its base, if no conversion recorded
    one of them; none where it names none."""
    names = {f.architecture.name for f in level}
    if hint in names or source is None or not (source.metadata or source.config):
        return []
    from adapterops.architectures.declared import in_file  # only ever needed here

    said = in_file(source.metadata, source.config)
    return [f for f in level if f.architecture.name in said]


def _kept(best: Fit) -> str:
    """The note on names that no known base model has, and that can be kept."""
    name = (best.unknown or best.misshapen)[0].name
    return (
        f"the base model is not known: none that is built in has its modules ({name!r} …), so their names stay as they are, and "
        "are written only where they are spelled alike; --base CONFIG of the base model tells of others, --rename repairs "
        "botched keys"
    )


def _refusal(best: Fit, path: str, fits: Sequence[Fit]) -> UnknownArchitectureOfFile:
    """The error for a file that no known base model has half of the modules of."""
    known = (
        f"adapterops architectures lists all {len(architectures.names())}"
        if len(fits) > 1
        else fits[0].architecture.name
    )
    if best.named and not best.shaped:
        entry = best.misshapen[0]
        tensor, *rest = sorted(entry.tensors.values(), key=lambda t: -t.numel)
        beside = "".join(f" (beside {t.key!r} {list(t.shape)})" for t in rest[:1] if t.numel > 1)
        names = f"{best.named} module names are those" if best.named > 1 else "its module's name is one"
        return UnknownArchitectureOfFile(
            f"{tensor.where}: shape {list(tensor.shape)}{beside} fits none of the known base models ({known}), though "
            f"{names} of {best.architecture.name}; give --base CONFIG of its base model"
        )
    entry = (best.unknown or best.misshapen)[0]
    others = f" and {len(best.unknown) - 1} others are" if len(best.unknown) > 1 else " is"
    likely = sorted(fits, key=lambda f: (-f.shaped, f.untold, -f.named))[:_ASKED]
    near = ((f.architecture.name, n) for f in likely if applies(entry.place, f.architecture) for n in _near(entry, f))
    nearest = "".join(f"; the nearest known: {name!r} of {base}" for base, name in islice(near, 1))
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
        names = book(arch, entry.place) if applies(entry.place, arch) else None
        near = names.nearest(entry.name) if names is not None else []
        hint = f"; the nearest known: {', '.join(near)}" if near else ""
        if component in arch.components and not applies(entry.place, arch):
            hint = f"; files for {arch.name} do not begin the keys of its {component} with {entry.place.prefix!r}"
        else:
            hint = _elsewhere(entry, found.named) or hint
        more = f" ({len(found.unknown)} such modules)" if len(found.unknown) > 1 else ""
        what = f"{arch.name} has no module {entry.name!r} in {component}{more}{hint}. "
        remedy = "If the base is another model, name it with --arch or --base CONFIG; --rename repairs botched keys"
        if found.told:
            what = f"{arch.name} has no table of its {component} (module {entry.name!r}{more}). "
            remedy = "--base with the pipeline's folder tells of it; --allow-drop leaves it out, and lists it"
        elif names is not None and entry.name in names.table:
            what = f"{names.table[entry.name]} of {arch.name} has no bias{more}. "
            remedy = "If the base is another model, name it with --arch or --base CONFIG; --allow-drop leaves it out"
        _say(
            tell,
            UnknownModule(
                f"{tensor.where}: {what}{remedy}",
                fault="unknown-architecture" if found.told else "",
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


_COLUMNS = ("canonical", "original")


def _elsewhere(entry: Group, others: int) -> str:
    """For a message: which built-in base model has a module of that name, in either of its spellings.

    `others` of the file's modules are the base's that was tried.
    """
    mixed = ": the file mixes two spellings, or two base models" if others else ""
    known = sorted((architectures.load(name) for name in architectures.names()), key=lambda base: bool(base.variant))
    for base in known:
        for column in _COLUMNS if applies(entry.place, base) else ():
            module = book(base, replace(entry.place, names=column, names_in={})).table.get(entry.name)
            if module is not None:
                return f"; it names {module} of {base.name}{mixed}"
    # Behind another beginning, which means another component, or none.
    for base in sorted(known, key=lambda base: (bool(base.variant), base.turn)):
        for component in base.components:
            place = replace(entry.place, component=component, instead=(), only=frozenset())
            for column in _COLUMNS:
                module = book(base, replace(place, names=column, names_in={})).table.get(entry.name)
                if module is not None:
                    whose = "the authors" if column == "original" else "diffusers and transformers"
                    return f"; {whose} call {module} in the {component} of {base.name} so, which stands behind another prefix"
    return ""
