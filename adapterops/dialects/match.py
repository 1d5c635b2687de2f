"""Reading keys by a dialect's table: which keys it claims, and as what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

from adapterops.dialects.table import ANY, Dialect, Place, Suffix
from adapterops.errors import AdapterOpsError, AmbiguousFormat, BrokenAdapter
from adapterops.methods import METHODS
from adapterops.storage.dtypes import BITS
from adapterops.storage.tensor import LazyTensor

_SLOT = "{adapter}"
PARAMETERS = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
"""The names under which torch's own layers keep parameters and buffers."""


class Claim(NamedTuple):
    """One key, read: its place, the module's name as spelled (tail undone), its suffix, and the key without it."""

    key: str
    place: Place
    name: str
    suffix: Suffix
    stem: str


_PLACE, _SUFFIX = attrgetter("place"), attrgetter("suffix")


class Reading(NamedTuple):
    """A dialect's reading of a file's keys."""

    dialect: Dialect
    claims: tuple[Claim, ...]
    unclaimed: tuple[str, ...]
    adapter_name: str = ""
    prefix: str | None = None
    """The prefix that stands in the file where the table's own is left out or doubled."""
    stands_for: str = ""
    """The place's own prefix, which that one stands for."""
    declared: bool = False
    """Whether another dialect reads the keys as well, and the base model that the header or the config names has decided."""
    rivals: tuple[str, ...] = ()
    """The base models by whose names another dialect of the format reads the keys as well, where nothing has decided."""

    def under(self, dialect: Dialect) -> Reading | None:
        """The reading as `dialect`'s, where its rows read keys as this one's do (only modules' names may differ)."""
        if [p.reads for p in dialect.places] != [p.reads for p in self.dialect.places]:
            return None
        places = dict(zip(self.dialect.places, dialect.places, strict=True))
        claims = tuple([Claim(key, places[p], name, suffix, stem) for key, p, name, suffix, stem in self.claims])
        return self._replace(dialect=dialect, claims=claims)

    @property
    def score(self) -> float:
        """The share of keys that the dialect understands as parts of updates (saved parameters prove nothing)."""
        total = len(self.claims) + len(self.unclaimed)
        return len(self.claims) / total if total else 0.0

    @property
    def updates_claimed(self) -> int:
        """The number of keys read as factors."""
        counts = Counter(map(_SUFFIX, self.claims))
        return sum(count for suffix, count in counts.items() if suffix.method != "saved")


def read_keys(dialect: Dialect, keys: Iterable[str], variants: Mapping[str, tuple[str, ...]] | None = None) -> Reading:
    """Read `keys` by the dialect's table.

    `variants` maps a place's prefix to others that mean the same; the one that fits the most keys is used for
    the whole file.
    """
    keys = tuple(keys)
    best: Reading | None = None
    ends = _ends(keys)
    names = _adapter_names(dialect, ends)
    # Most dialects have not one of a file's endings; that is cheap to see before their prefixes are tried.
    texts = (text for place in dialect.places if not place.whole for name in names for text in _table(place, name))
    if ends.present.isdisjoint(texts) and not any(_has_whole(place, keys) for place in dialect.places if place.whole):
        return Reading(dialect, (), keys)
    swaps = [swap for swap in _swaps(dialect, variants or {}) if swap is None or ends.any_begins(swap[1])]
    ways = [(swap, adapter) for swap in swaps for adapter in names]
    if len(keys) >= _MANY:
        # A stranger's file may make each of them a long look; those that read nothing of a spread of keys are left.
        some = _Ends(keys[:: len(keys) // _SPREAD])
        ways = [way for way in ways if _read(dialect, some, way[1], way[0]).claims] or ways[:1]
    for swap, adapter in ways:
        reading = _read(dialect, ends, adapter, swap)
        if best is None or (reading.score, reading.updates_claimed) > (best.score, best.updates_claimed):
            best = reading
        if best.score == 1.0 and best.updates_claimed:
            return best
    assert best is not None
    return best


def _swaps(dialect: Dialect, variants: Mapping[str, tuple[str, ...]]) -> list[tuple[str, str] | None]:
    out: list[tuple[str, str]] = []
    for place in dialect.places:
        out += [(place.prefix, other) for other in variants.get(place.prefix, ())]
    # A doubled prefix first: to the single one its second half would read as part of every module's name.
    return [*(s for s in out if s[1].startswith(s[0])), None, *(s for s in out if not s[1].startswith(s[0]))]


_Found = tuple[str, Suffix] | None
"""The ending by which a key is known to be a place's, if it is; and as what."""


def _read(dialect: Dialect, ends: _Ends, adapter: str, swap: tuple[str, str] | None) -> Reading:
    claims, unclaimed = [], []
    places: list[tuple[Place, str, dict[str, Suffix], dict[str, _Found]]] = []
    for place in dialect.places:
        prefix = place.prefix if swap is None or place.prefix != swap[0] else swap[1]
        if ends.any_begins(prefix):
            places.append((place, prefix, _table(place, adapter), {}))
    for key, end in zip(ends.keys, ends.ends, strict=True):
        claim = None
        for place, prefix, table, known in places:
            if not key.startswith(prefix):
                continue
            if place.whole:
                if key[len(place.prefix) :].partition(".")[0] not in _firsts(place, adapter):
                    continue
                claim = _whole(key, place, adapter)
                if claim is not None:
                    break
                continue
            if end in known:
                found = known[end]
            else:
                found = _found(end, table)
                if ends.few:
                    known[end] = found
            if found is not None:
                ending, suffix = found
                stem = key[: len(key) - len(ending)]
                name = stem[len(prefix) :]
                if place.tails:
                    claim = _tailed(key, place, name, suffix, stem)
                elif name:
                    claim = Claim(key, place, name, suffix, stem)
            elif place.saved:
                claim = _saved(key, len(prefix), place)
            if claim is not None:
                break
        if claim is None:
            unclaimed.append(key)
        else:
            claims.append(claim)
    return Reading(
        dialect, tuple(claims), tuple(unclaimed), adapter, swap[1] if swap else None, swap[0] if swap else ""
    )


@lru_cache(maxsize=256)
def _table(place: Place, adapter: str) -> dict[str, Suffix]:
    """The place's suffixes by their text, with an adapter's name in it."""
    return {s.text.replace(_SLOT, f".{adapter}" if adapter else ""): s for s in place.suffixes}


_MANY, _SPREAD = 8192, 256
"""What are many keys, and how many of those are looked at first."""
_DEPTH = 4
"""The most dots that a suffix has, an adapter's name included."""


def _found(end: str, table: Mapping[str, Suffix]) -> _Found:
    """The longest of the endings of a key's end that is in the table, and what it is there."""
    at = 0
    while at >= 0:
        ending = end[at:]
        if ending in table:
            return ending, table[ending]
        at = end.find(".", at + 1)
    return None


class _Ends:
    """Keys and how they end, which every dialect asks for."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.keys = keys
        self.ends = [key[len(key.rsplit(".", _DEPTH)[0]) :] for key in keys]
        """The longest ending of each that a suffix can be."""
        distinct = set(self.ends)
        self.few = len(distinct) < _MANY
        """Whether ends are worth remembering: a stranger's file may have as many as keys."""
        self.present = frozenset(ending for end in distinct for ending in _endings(end))
        """Every dotted ending that some key has."""
        self._begun: dict[str, bool] = {}
        self._tails: dict[str, Counter[tuple[str, str]]] = {}

    def any_begins(self, prefix: str) -> bool:
        """Whether any key begins so."""
        if prefix not in self._begun:
            self._begun[prefix] = not prefix or any(map(str.startswith, self.keys, repeat(prefix)))
        return self._begun[prefix]

    def tails(self, after: str) -> Counter[tuple[str, str]]:
        """What may be adapters' names before `after` in the keys, each with the end of what stands before it."""
        if after not in self._tails:
            self._tails[after] = _tails(self.keys, after)
        return self._tails[after]


def _endings(end: str) -> Iterator[str]:
    """The dotted endings of an ending, longest first."""
    while end:
        yield end
        at = end.find(".", 1)
        end = end[at:] if at > 0 else ""


@lru_cache(maxsize=4)
def _ends(keys: tuple[str, ...]) -> _Ends:
    return _Ends(keys)


def _tailed(key: str, place: Place, name: str, suffix: Suffix, stem: str) -> Claim | None:
    """A key of a place that spells the ends of modules' names in its own way; None for a module that it has not."""
    for canonical, spelled in place.tails:
        if name.endswith(spelled):
            return Claim(key, place, name[: len(name) - len(spelled)] + canonical, suffix, stem)
    return None


def _has_whole(place: Place, keys: Iterable[str]) -> bool:
    """Whether any key begins as one of a `whole` place does; told without a look at each."""
    start = len(place.prefix)
    firsts = {key[start:].partition(".")[0] for key in keys if key.startswith(place.prefix)}
    return not firsts.isdisjoint(suffix.text.replace(_SLOT, "").rstrip(".") for suffix in place.suffixes)


@lru_cache(maxsize=256)
def _firsts(place: Place, adapter: str) -> frozenset[str]:
    """The first parts of what may stand behind a `whole` place's prefix."""
    return frozenset(text.partition(".")[0] for text in _table(place, adapter))


def _whole(key: str, place: Place, adapter: str) -> Claim | None:
    """A key of what the component has once: the prefix and a suffix, or the beginning of one."""
    if not key.startswith(place.prefix):
        return None
    table, rest = _table(place, adapter), key[len(place.prefix) :]
    suffix = table.get(rest)
    if suffix is not None:
        return Claim(key, place, "", suffix, place.prefix)
    first, dot, name = rest.partition(".")
    start = table.get(first + dot) if dot else None
    if start is None or not name:
        return None
    return Claim(key, place, "", replace(start, role=f"{start.role}.{name}"), place.prefix)


@lru_cache(maxsize=256)
def _reserved(place: Place) -> frozenset[str]:
    """The names that stand right after a module's in the keys of an update."""
    return frozenset(suffix.text.split(".")[1].replace(_SLOT, "") for suffix in place.suffixes) - PARAMETERS


def _saved(key: str, start: int, place: Place) -> Claim | None:
    name, dot, parameter = key[start:].rpartition(".")
    if not dot or not name or parameter not in PARAMETERS:
        return None
    if isinstance(place.saved, tuple) and not name.endswith(place.saved):
        return None
    # `x.lora_A.other.weight` is a factor of an adapter called `other`, not a saved module `x.lora_A.other`.
    if not _reserved(place).isdisjoint(name.split(".")):
        return None
    return Claim(key, place, name, Suffix("." + parameter, "saved", parameter), key[:start] + name)


_MOST_NAMES, _FEW_NAMES = 8, 2
"""Adapter names that are tried, and how many of a file of many keys: a file holds one adapter, and a stranger's may be made
to hold thousands of names."""


def _adapter_names(dialect: Dialect, ends: _Ends) -> list[str]:
    """The adapter names that the keys may hold, "" (none) first."""
    found: dict[str, int] = {}
    for after, befores in _around(dialect):
        if after.startswith(".") and after not in ends.present:
            continue
        for (tail, name), count in ends.tails(after).items():
            if tail.endswith(befores):
                found[name] = found.get(name, 0) + count
    names = sorted((n for n in found if n and n not in PARAMETERS), key=lambda n: -found[n])
    return ["", *names[: _MOST_NAMES if len(ends.keys) < _MANY else _FEW_NAMES]]


@lru_cache(maxsize=256)
def _around(dialect: Dialect) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """What stands behind an adapter's name, and what may stand before it there."""
    around: dict[str, dict[str, None]] = {}
    for place in dialect.places:
        for suffix in place.suffixes:
            before, slot, after = suffix.text.partition(_SLOT)
            if slot:
                around.setdefault(after, {})[before] = None
    return tuple((after, tuple(own)) for after, own in around.items())


_BEFORE = 64
"""The most letters, of at most two parts, that stand before an adapter's name in a suffix."""


def _tails(keys: tuple[str, ...], after: str) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for key in keys:
        if key.endswith(after):
            head, _, name = key[: len(key) - len(after)].rpartition(".")
            if name and head:
                at = head.rfind(".", 0, max(head.rfind("."), 0))
                found[head[max(at, len(head) - _BEFORE, 0) :], name] += 1
    return found


class Group(NamedTuple):
    """The claimed tensors of one module and method, by role."""

    place: Place
    name: str
    method: str
    stem: str
    tensors: dict[str, LazyTensor]
    options: dict[str, Any]
    stated: str = ""
    """The module's name as the file has it, where it was changed to be the base's."""


def bare(reading: Reading) -> bool:
    """Whether names stand in the keys without anything before them, so that any writer's keys read as names."""
    return any(place.bare for place in set(map(_PLACE, reading.claims)))


def sample(reading: Reading, size: int) -> Reading:
    """The same reading of some `size` modules, spread over the file."""
    names = list(dict.fromkeys(claim.name for claim in reading.claims))
    chosen = set(names[:: max(1, len(names) // size)])
    return reading._replace(claims=tuple(claim for claim in reading.claims if claim.name in chosen))


def _raise(error: AdapterOpsError) -> None:
    raise error


def _scaled(
    reading: Reading, tensors: Mapping[str, LazyTensor], tell: Callable[[AdapterOpsError], None]
) -> dict[tuple[Place, str], str]:
    """The scaled method of each module that has one: whose an alpha is.  Where it has two and an alpha, that is told."""
    methods: dict[tuple[Place, str], str] = {}
    used = {suffix.method for suffix in set(map(_SUFFIX, reading.claims))}
    scaled = {m for m in used if m != ANY and (METHODS[m].scaled or METHODS[m].alpha_role)}
    for claim in reading.claims:
        method = claim.suffix.method
        if method not in scaled:
            continue
        known = methods.setdefault((claim.place, claim.name), method)
        if known != method:
            tell(
                AmbiguousFormat(
                    f"{tensors[claim.key].where}: {claim.name} has factors of two methods, {METHODS[known].title} and "
                    f"{METHODS[method].title}, and nothing says whose its alpha is; split them into two files",
                    keys=(claim.key,),
                )
            )
    return methods


def group(
    reading: Reading, tensors: Mapping[str, LazyTensor], tell: Callable[[AdapterOpsError], None] | None = None
) -> list[Group]:
    """The claimed tensors, gathered into updates.

    Raises `AmbiguousFormat` where two keys claim one role of one module, or two methods its alpha; with `tell` that is told,
    and the first of them taken.
    """
    out: dict[tuple[Place, str, str], Group] = {}
    scaled = _scaled(reading, tensors, tell or _raise)
    for claim in reading.claims:
        method, tensor = claim.suffix.method, tensors[claim.key]
        if claim.suffix.transposed and len(tensor.shape) == 2:
            if BITS[tensor.dtype] % 8:
                text = f"{tensor.where}: elements of {tensor.dtype} are no bytes, and cannot be transposed"
                (tell or _raise)(BrokenAdapter(text, keys=(claim.key,)))
                continue
            tensor = tensor.transposed()
        role = claim.suffix.role
        if method == ANY:
            method = scaled.get((claim.place, claim.name), "lora")
            role = METHODS[method].alpha_role or role if role == "alpha" else role
        at = (claim.place, claim.name, method)
        entry = out.get(at)
        if entry is None:
            entry = out[at] = Group(*at, claim.stem, {}, {})
        if role in entry.tensors:
            twins = (claim.key, entry.tensors[role].key)
            (tell or _raise)(
                AmbiguousFormat(
                    f"{tensors[claim.key].where} and {twins[1]!r} both claim to be {role} of {claim.name}",
                    fault="twice",
                    keys=twins,
                )
            )
            continue
        entry.tensors[role] = tensor
        entry.options.update(claim.suffix.options)
    return list(out.values())
