"""The installed formats, and which of them a file is in."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache

from adapterops.architectures import Architecture, load, names
from adapterops.carried import Carried
from adapterops.dialects.fitting import best_fits, names_known, whole_fits
from adapterops.dialects.match import Reading, bare, group, sample
from adapterops.dialects.names import needs_table
from adapterops.dialects.table import Dialect
from adapterops.errors import AmbiguousFormat, NotAnAdapter, UnknownFormat, UnsupportedFormat
from adapterops.plugin import Format
from adapterops.storage import Source
from adapterops.storage.tensor import NAMELESS, numbered

GROUP = "adapterops.formats"


@cache
def formats() -> Mapping[str, Format]:
    """The formats of every installed plugin, by name.  Raises `UnknownFormat` for a plugin that offers none."""
    found: dict[str, Format] = {}
    for name, value in sorted(_declared().items()):
        module, _, attribute = value.partition(":")
        form = getattr(importlib.import_module(module.strip()), attribute.strip(), None)
        if not isinstance(form, Format):
            raise UnknownFormat(f"entry point {name} = {value} ({GROUP}) is not an adapterops Format")
        found[form.name] = form
    if not found:
        raise UnknownFormat(f"no format plugin is installed (entry points of group {GROUP}); reinstall adapterops")
    return found


def _declared() -> dict[str, str]:
    """Name and object reference of the group's entry points.

    Read from the `entry_points.txt` of the distributions on the path, first come first served, as the standard library
    does; but importing `importlib.metadata` would cost `inspect` a sixth of its time.  It is asked where nothing is
    found so (distributions in zip files).
    """
    found: dict[str, str] = {}
    for folder in dict.fromkeys(path or "." for path in sys.path):
        try:
            names = [n for n in os.listdir(folder) if n.endswith((".dist-info", ".egg-info"))]
        except OSError:
            continue
        for name in names:
            for key, value in _section(os.path.join(folder, name, "entry_points.txt")):
                found.setdefault(key, value)
    if not found:
        from importlib.metadata import entry_points

        found = {point.name: point.value for point in entry_points(group=GROUP)}
    return found


def _section(path: str) -> list[tuple[str, str]]:
    """The entries of GROUP in one `entry_points.txt`; none where there is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return []
    _, _, rest = text.partition(f"[{GROUP}]")
    lines = (line.partition("=") for line in rest.partition("\n[")[0].splitlines() if not line.lstrip().startswith("#"))
    return [(key.strip(), value.strip()) for key, equals, value in lines if equals]


def find(name: str) -> tuple[Format, Dialect]:
    """The format and dialect that a user means by `name`: a format (its first dialect) or a dialect.

    Raises `UnknownFormat`, naming the known ones.
    """
    for form in formats().values():
        if form.name == name:
            return form, form.dialects[0]
        for dialect in form.dialects:
            if dialect.name == name:
                return form, dialect
    known = ", ".join(d.name for form in formats().values() for d in form.dialects)
    raise UnknownFormat(f"unknown format {name!r}; known: {known}")


def recognise(
    source: Source,
    only: str | Dialect | None = None,
    architecture: Architecture | None = None,
    allow_drop: bool = False,
) -> tuple[Format, Reading]:
    """The format and dialect of a source.

    Every dialect reads every key; the one that understands most wins, and of two that read the keys alike the one
    whose module names an architecture has.  `only` limits the choice: to a format or dialect by its name (`--from`), or to
    one dialect.

    Raises `NotAnAdapter`, `UnsupportedFormat`, or `AmbiguousFormat` where two dialects share the keys out
    between them.
    """
    shown = {end for form in formats().values() for d in form.dialects for end in d.shown_by}
    shown = {end for end in shown if any(key.endswith(end) for key in source.tensors)}
    chosen = {
        form: [
            d
            for d in form.dialects
            if only is d
            or only in (form.name, d.name)
            or (only is None and not d.asked and not d.last and (not d.shown_by or shown.intersection(d.shown_by)))
        ]
        for form in formats().values()
    }
    candidates = _whole_readings(source, chosen)
    if not candidates:
        candidates = _readings(source, {form: [d for d in own if not d.is_bare] for form, own in chosen.items()})
        if all(reading.unclaimed or reading.prefix == "" for _, reading in candidates):
            candidates += _readings(source, {form: [d for d in own if d.is_bare] for form, own in chosen.items()})
    candidates.sort(key=lambda c: _rank(c[1]), reverse=True)
    while candidates and bare(candidates[0][1]) and not _holds(candidates, source, architecture):
        del candidates[0]
    if only is not None and not candidates:
        if isinstance(only, str):
            find(only)
        raise UnsupportedFormat(f"{source.path}: no key reads as {only if isinstance(only, str) else only.name}")
    if not candidates or (candidates[0][1].unclaimed and not allow_drop):
        explain(source, candidates[0][1].unclaimed if candidates else source.tensors)
    elif candidates[0][1].prefix == "":
        # Without any prefix the keys of other writers read as module names too.
        explain(source, source.tensors)
    resort = None if candidates or only is not None else _last_resort(source)
    if resort is not None:
        return resort
    if not candidates:
        raise NotAnAdapter(_what_is_it(source) + _if_asked(source))
    _no_mixture(source, candidates)
    ties = [c for c in candidates if _rank(c[1]) == _rank(candidates[0][1])]
    return _of_ties(ties, source, architecture) if len(ties) > 1 else candidates[0]


def _last_resort(source: Source) -> tuple[Format, Reading] | None:
    """The reading of a file that no other dialect reads, by one that is tried last."""
    last = {form: [d for d in form.dialects if d.last] for form in formats().values()}
    return next(iter(_readings(source, last)), None)


def _holds(candidates: list[tuple[Format, Reading]], source: Source, given: Architecture | None) -> bool:
    """Whether the bare names of the first are a base model's: by shape, too, where another reading takes them as they stand."""
    first = candidates[0][1]
    if not names_known(first, given):
        return False
    others = any(not r.unclaimed and not any(map(needs_table, r.dialect.places)) for _, r in candidates[1:])
    return not others or best_fits([group(sample(first, 24), source.tensors)], given)[0] > 0


_ENOUGH = 256
"""The number of keys above which some of them are looked at first."""


def _whole_readings(source: Source, chosen: Mapping[Format, list[Dialect]]) -> list[tuple[Format, Reading]]:
    """The readings that understand every key of a large file, found by those that understand every key of a sample.

    None where a large file is no one dialect's: then all of them must read it.
    """
    keys = list(source.tensors)
    if len(keys) < _ENOUGH:
        return []
    some = replace(source, tensors={key: source.tensors[key] for key in keys[:: len(keys) // 61]})
    able = {form: [d for d in own if not d.is_bare] for form, own in chosen.items()}
    names = {reading.dialect.name for _, reading in _readings(some, able) if not reading.unclaimed}
    found = _readings(source, {form: [d for d in own if d.name in names] for form, own in able.items()})
    return [(form, reading) for form, reading in found if not reading.unclaimed and reading.prefix != ""]


def _readings(source: Source, chosen: Mapping[Format, list[Dialect]]) -> list[tuple[Format, Reading]]:
    return [
        (form, reading) for form, dialects in chosen.items() if dialects for reading in form.recognise(source, dialects)
    ]


def _of_ties(ties: list[tuple[Format, Reading]], source: Source, given: Architecture | None) -> tuple[Format, Reading]:
    """Of readings that differ in module names only the one whose names the most modules of a base model have; then of the base
    that a conversion recorded, or else the header or the config names; then the one whose names can be taken as they stand."""
    # A few dozen modules tell as well as all.
    some = [group(sample(reading, 24), source.tensors) for _, reading in ties]
    counts = best_fits(some, given)
    left = [n for n, count in enumerate(counts) if count == max(counts)]
    if len(left) == 1:
        return ties[left[0]]
    recorded = Carried.parse(source.metadata).architecture if given is None else None
    named = [recorded] if recorded in names() else _said(source, given)
    hinted = [max((best_fits([some[n]], load(name))[0] for name in named), default=0) for n in left]
    best = max(range(len(left)), key=lambda n: (hinted[n], not any(map(needs_table, ties[left[n]][1].dialect.places))))
    form, reading = ties[left[best]]
    if given is None and max(hinted) == 0:
        others = [ties[n][1] for n in left if n != left[best] and ties[n][0] is form]
        rivals = (base for other in others for base in whole_fits(group(other, source.tensors)))
        return form, reading._replace(rivals=tuple(dict.fromkeys(rivals)))
    return form, reading._replace(declared=recorded not in names() and min(hinted) < hinted[best] == max(counts))


def _said(source: Source, given: Architecture | None) -> list[str]:
    """The base models that the header or the config names, unless the user gave one."""
    if given is not None or not (source.metadata or source.config):
        return []
    from adapterops.architectures.declared import in_file  # most files are told by their keys

    return sorted(in_file(source.metadata, source.config))


def _rank(reading: Reading) -> tuple[float, int, int]:
    # A prefix tells most; a dialect that has none by rights is more like it than one whose own is missing.
    surely = 0 if reading.prefix == "" else 1 if bare(reading) else 2
    return reading.score, reading.updates_claimed, surely


def explain(source: Source, keys: Iterable[str]) -> None:
    """Raise `UnsupportedFormat` where one of `keys` is of a kind that a format knows by name and does not convert."""
    keys = tuple(keys)
    lines = "\n".join(keys)
    plain = lines.count("\n") == len(keys) - 1
    for form in formats().values():
        for pattern, what in form.foreign.items():
            matcher = re.compile(pattern)
            if _is_anchored(pattern):
                hit = next(filter(matcher.match, keys), None)
            elif plain and not re.search(pattern, lines, re.MULTILINE):
                continue  # one search of all keys tells that there is none (a class of characters may span lines)
            else:
                hit = next(filter(matcher.search, keys), None)
            if hit is not None:
                raise UnsupportedFormat(f"{source.path}: tensor {hit!r}: {what}")


def _is_anchored(pattern: str) -> bool:
    """Whether a regular expression fits at the beginning of a text only."""
    return pattern.startswith("^") and "|" not in re.sub(r"\([^()]*\)", "", pattern)


def _no_mixture(source: Source, candidates: list[tuple[Format, Reading]]) -> None:
    best = candidates[0][1]
    if best.prefix == "":
        _no_two_prefixes(source, [reading for _, reading in candidates[1:] if reading.prefix is None])
    if not best.unclaimed:
        return
    rest = set(best.unclaimed)
    for _, other in candidates[1:]:
        shared = [c.key for c in other.claims if c.key in rest and c.suffix.method != "saved"]
        if shared:
            raise AmbiguousFormat(
                f"{source.path}: holds two dialects: {len(best.claims)} keys of {best.dialect.title} "
                f"({best.claims[0].key!r}) and {len(shared)} of {other.dialect.title} ({shared[0]!r}); "
                "split them into two files, each in one dialect"
            )


def _no_two_prefixes(source: Source, readings: list[Reading]) -> None:
    """Raise `AmbiguousFormat` for keys that read as names only because two dialects share them out between them, each under
    its own prefix and with a base model's names."""
    parts = [r for r in readings if r.unclaimed and not bare(r)]
    for one in parts:
        for other in parts:
            if {c.key for c in other.claims}.issuperset(one.unclaimed) and names_known(one) and names_known(other):
                raise AmbiguousFormat(
                    f"{source.path}: holds two dialects: {len(one.claims)} keys of {one.dialect.title} "
                    f"({one.claims[0].key!r}) and {len(one.unclaimed)} of {other.dialect.title} ({one.unclaimed[0]!r}); "
                    "split them into two files, each in one dialect"
                )


def _if_asked(source: Source) -> str:
    """For a message: the dialects that would read every key, had the user named them."""
    asked = {form: [d for d in form.dialects if d.asked] for form in formats().values()}
    able = [reading.dialect for _, reading in _readings(source, asked) if not reading.unclaimed]
    return "".join(f"; if {d.title} wrote it, say --from {d.name}" for d in able)


def _what_is_it(source: Source) -> str:
    """The message for a file without any adapter key that is known."""
    keys = list(source.tensors)
    if not keys:
        return (
            f"{source.path}: holds no tensors: whatever saved it had none of the adapter's, as one process of a sharded "
            "training, or a model without an adapter"
        )
    if keys == [NAMELESS]:
        what = f"a bare Tensor {list(source.tensors[NAMELESS].shape)}"
        return (
            f"{source.path}: holds {what}, not a state dict (names to tensors): perhaps a soft prompt or an embedding"
        )
    if keys[0] == numbered(0):
        return f"{source.path}: holds a bare list of {len(keys)} tensors, not a state dict (names to tensors)"
    if len(keys) > 4 and all(t.numel == 1 for t in source.tensors.values()):
        return (
            f"{source.path}: holds {len(keys)} single numbers such as {keys[0]!r}, and no factor: whatever wrote it saved "
            "nothing of the adapter but these"
        )
    shapes = ", ".join(f"{k!r} {list(source.tensors[k].shape)}" for k in keys[:2])
    if len(keys) <= 4 and all(len(t.shape) <= 2 for t in source.tensors.values()):
        names = " ".join(keys).lower()
        if any(word in names for word in ("emb_params", "<", "clip_l", "clip_g", "string_to_param", "embed")):
            return f"{source.path}: is an embedding (textual inversion or soft prompt: {shapes}), not an adapter"
    endings_of = {
        dialect: tuple(
            s.text.replace("{adapter}", "") for p in dialect.places for s in p.suffixes if s.method == "lora"
        )
        for form in formats().values()
        for dialect in form.dialects
    }
    every = tuple({ending for own in endings_of.values() for ending in own})
    ending_so = [key for key in keys if key.endswith(every)]
    for dialect, endings in endings_of.items():
        hit = next((key for key in ending_so if key.endswith(endings)), None)
        if hit is not None:
            return (
                f"{source.path}: tensor {hit!r} ends as {dialect.title} spells a factor, but neither that format nor "
                f"another can read the file's {len(keys)} keys as an adapter: their beginnings are nobody's, or plain "
                "weights stand beside the factors. For a PEFT adapter, put its adapter_config.json beside "
                "adapter_model.safetensors"
            )
    weights = sum(1 for k in keys if k.endswith((".weight", ".bias")))
    if weights > 0.5 * len(keys):
        return (
            f"{source.path}: looks like a model's own weights ({len(keys)} tensors such as {keys[0]!r}), not an "
            "adapter: none of its keys is half of a low-rank pair"
        )
    return f"{source.path}: no installed format knows its keys ({len(keys)} tensors such as {shapes})"
