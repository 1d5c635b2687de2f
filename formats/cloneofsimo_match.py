"""Which modules the positions of a file of cloneofsimo/lora are: the trainer's reader, with its base as a table.

A pair of factors is given to the next module of the walk that has as many dimensions; the rest of the shapes proves
that the walk is the right one (`monkeypatch_or_replace_lora_extended` in cloneofsimo/lora `lora_diffusion/lora.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from adapterops_formats.cloneofsimo_walk import CLASSES, EARLY, LATE, LISTED_KEY, walk

from adapterops.plugin import (
    METHODS,
    Architecture,
    Group,
    LazyTensor,
    ModuleSpec,
    Request,
    Source,
    Update,
    built_in,
    errors,
)

USUAL = {
    "unet": (
        ("CrossAttention", "Attention", "GEGLU"),
        ("ResnetBlock2D", "CrossAttention", "Attention", "GEGLU"),
        ("CrossAttention", "Attention"),
    ),
    "text_encoder": (("CLIPAttention",),),
}
"""The trainer's own targets: `UNET_DEFAULT_TARGET_REPLACE`, `UNET_EXTENDED_TARGET_REPLACE`, what `inject_trainable_lora`
had up to its version 0.0.6, and `TEXT_ENCODER_DEFAULT_TARGET_REPLACE`."""


@dataclass(slots=True)
class Found:
    """What the positions turned out to be."""

    groups: list[tuple[str, Group]] = field(default_factory=list)
    """Under the names of their modules, each with its component."""
    targets: dict[str, list[str]] = field(default_factory=dict)
    block: Sequence[str] = EARLY
    notes: list[str] = field(default_factory=list)


class _Pair(NamedTuple):
    """The factors of one position."""

    position: int
    group: Group

    @property
    def up(self) -> LazyTensor:
        return self.group.tensors["B"]

    @property
    def down(self) -> LazyTensor:
        return self.group.tensors["A"]

    def suits(self, spec: ModuleSpec) -> bool:
        """Whether the factors have the shapes of that module's: (out, r, 1 …) and (r, in, *kernel)."""
        up, down, ones = self.up.shape, self.down.shape, (1,) * (len(spec.shape) - 2)
        return (up[0], *up[2:]) == (spec.shape[0], *ones) and down[1:] == spec.shape[1:] and up[1] == down[0]


class _Assigned(NamedTuple):
    """What the positions of one component are in one order, how many of them, from the first on, have the right shape,
    and how many modules the walk meets."""

    modules: tuple[ModuleSpec, ...]
    targets: tuple[str, ...]
    fitting: int
    whole: bool
    met: int = 0


def named(groups: list[Group], source: Source, request: Request, said: Mapping[str, tuple[str, ...]]) -> Found:
    """The groups of positions under the names of their modules; `said` are the target classes in the header.

    Raises `BrokenAdapter` for incomplete pairs and missing positions, `UnknownArchitectureOfFile` where they are no walk
    over a base model, `UnsupportedFormat` where the walk has modules twice.
    """
    components: dict[str, list[_Pair]] = {}
    for group in groups:
        METHODS["lora"].check(Update(group.place.component, group.name, "lora", group.tensors))
        components.setdefault(group.place.component, []).append(_Pair(int(group.name), group))
    for component, pairs in components.items():
        pairs.sort(key=lambda pair: pair.position)
        gap = next((number for number, pair in enumerate(pairs) if pair.position != number), None)
        if gap is not None:
            raise errors.BrokenAdapter(
                f"{source.path}: {component} has no position {gap}, but a position {pairs[gap].position}; numbers mean "
                "modules "
                "only where none is missing",
                fault="missing-half",
            )
    best = max(_tries(components, request.architecture, said), key=lambda one: one[0], default=None)
    if best is None:
        raise errors.UnknownArchitectureOfFile(
            f"{source.path}: the base model has none of {', '.join(components)}; name another with --arch or --base"
        )
    (whole, _), architecture, block, assigned = best
    if not whole:
        raise _misfit(components, architecture, assigned, said, source)
    found = Found(block=block)
    for component, pairs in components.items():
        component = next(iter(assigned)) if component not in assigned else component
        targets = assigned[component].targets
        found.targets[component] = list(targets)
        if component not in said:
            shown = ", ".join(targets)
            found.notes.append(
                f"the target classes of {component} are in no header: those of the trainer ({shown}) are taken, whose "
                f"{len(pairs)} modules of {architecture.name} have the shapes of the file's"
            )
        ranks = ((p, source.metadata.get(f"{component}:{p.position}:rank")) for p in pairs)
        wrong = next((p for p, rank in ranks if rank not in (None, str(p.up.shape[1]))), None)
        if wrong is not None:
            found.notes.append(
                f"the header's ranks are not the tensors' (so in {wrong.up.key!r}); the tensors are believed"
            )
        for pair, spec in zip(pairs, assigned[component].modules, strict=True):
            found.groups.append((component, pair.group._replace(name=spec.name, stated=spec.name)))
    return found


_Try = tuple[tuple[bool, int], Architecture, Sequence[str], dict[str, _Assigned]]


def _tries(
    components: Mapping[str, list[_Pair]],
    given: Architecture | None,
    said: Mapping[str, tuple[str, ...]],
) -> Iterator[_Try]:
    """Every base model and order that the positions may be of, with how well they fit; a whole fit ends the search."""
    listed = any(LISTED_KEY.fullmatch(pair.up.key) for pairs in components.values() for pair in pairs)
    for architecture in (given,) if given is not None else built_in():
        whose = [c for c in CLASSES if c in architecture.components] if listed else list(components)
        if not whose or any(c not in architecture.components for c in whose):
            continue
        for block in (EARLY, LATE):
            for meant in [[c] for c in whose] if listed else [whose]:
                pairs = {c: next(iter(components.values())) if listed else components[c] for c in meant}
                assigned = {c: _assign(pairs[c], architecture, c, said.get(c), block) for c in meant}
                whole = all(a.whole for a in assigned.values())
                yield (whole, sum(a.fitting for a in assigned.values())), architecture, block, assigned
                if whole:
                    return


def _assign(
    pairs: list[_Pair], architecture: Architecture, component: str, said: tuple[str, ...] | None, block: Sequence[str]
) -> _Assigned:
    """The modules that the trainer's reader gives the pairs to."""
    specs = list(architecture.components[component].modules.values())
    dims = [len(pair.up.shape) for pair in pairs]
    best = _Assigned((), said or (), 0, False)
    for targets in (said,) if said is not None else USUAL[component]:
        steps = walk(specs, component, targets, block)
        modules = taken(steps, dims)
        fitting = next(
            (n for n, (p, s) in enumerate(zip(pairs, modules, strict=False)) if not p.suits(s)), len(modules)
        )
        kinds = {spec.kind for spec in modules}
        every = [spec for spec in steps if spec.kind in kinds]
        whole = fitting == len(pairs) == len(every) and len({s.name for s in every}) == len(every)
        made = _Assigned(tuple(modules), tuple(targets), fitting, whole, len(every))
        best = max(best, made, key=lambda one: (one.whole, one.fitting))
    return best


def taken(steps: Sequence[ModuleSpec], dims: Sequence[int]) -> list[ModuleSpec]:
    """The modules that pairs of so many dimensions are given to: what the next pair has not the dimensions of is
    passed over."""
    out: list[ModuleSpec] = []
    for spec in steps:
        if len(out) < len(dims) and dims[len(out)] == len(spec.shape):
            out.append(spec)
    return out


def _misfit(
    components: Mapping[str, list[_Pair]],
    architecture: Architecture,
    assigned: Mapping[str, _Assigned],
    said: Mapping[str, tuple[str, ...]],
    source: Source,
) -> errors.AdapterOpsError:
    """The error for positions that are no walk over the nearest base model."""
    component, found = next((c, a) for c, a in assigned.items() if not a.whole)
    pairs = components.get(component) or next(iter(components.values()))
    unknown = [name for name in said.get(component, ()) if name not in CLASSES[component]]
    names = ", ".join(found.targets) or "no class"
    known = (
        f"; {unknown[0]} is none of the classes that are known here ({', '.join(CLASSES[component])})"
        if unknown
        else ""
    )
    if len({s.name for s in found.modules}) < len(found.modules):
        return errors.UnsupportedFormat(
            f"{source.path}: of the classes {names} one holds another, so that the trainer numbers modules twice; such "
            "a file "
            "cannot be converted"
        )
    if found.fitting < min(len(pairs), len(found.modules)):
        pair, spec = pairs[found.fitting], found.modules[found.fitting]
        what = (
            f"tensors {pair.up.key!r} {list(pair.up.shape)} and {pair.down.key!r} {list(pair.down.shape)} cannot act "
            f"on {spec.name}, "
            f"whose weight is {list(spec.shape)}"
        )
    else:
        what = f"it has {len(pairs)} pairs, and {found.met} modules could take one"
    return errors.UnknownArchitectureOfFile(
        f"{source.path}: {component} is no walk over the modules of {names}{known}; on {architecture.name}, the "
        f"nearest, {what}. If the "
        "base is another model, name it with --arch or --base CONFIG"
    )
