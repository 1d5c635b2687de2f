"""From an adapter, a file or a folder to updates under the names of a pipeline's own modules."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from adapterops import loading, registry
from adapterops.adapter import COMPONENTS, Adapter, Update
from adapterops.architectures import Architecture
from adapterops.dialects.aligning import align, rename
from adapterops.dialects.fitting import fit
from adapterops.dialects.match import Group, Reading
from adapterops.dialects.read import Request
from adapterops.dialects.resolve import identify
from adapterops.dialects.table import Place
from adapterops.errors import AdapterOpsError, AmbiguousFormat, BrokenAdapter, CannotRepresent, UsageError
from adapterops.integrations.pipeline import architecture_of
from adapterops.methods import METHODS
from adapterops.plugin import Target
from adapterops.proof import check_finite
from adapterops.storage import Source, open_source
from adapterops.strength import insist_on_alphas


def for_pipeline(
    pipe: Any,
    adapter: Adapter | str | os.PathLike[str],
    loadable: Sequence[str],
    components: Iterable[str] | None,
    *,
    alpha: float | str | None,
    format: str | None,
    allow_drop: bool,
) -> Adapter:
    """The adapter with its modules named and shaped as `pipe` has them, `base` being the pipeline's architecture.

    Nothing of the pipeline is touched.  Raises the errors of `load`; `CannotRepresent` for a component that the pipeline
    lacks, or does not manage adapters of, unless `components` leaves it out.
    """
    architecture = architecture_of(pipe)
    wanted = _Wanted(type(pipe).__name__, architecture, tuple(loadable), _names(components))
    if isinstance(adapter, Adapter):
        if alpha is not None or format is not None:
            raise UsageError("alpha and format say how a file is read; give them to load, or a path here")
        found = _placed(adapter, architecture)
    else:
        alpha = _alpha(alpha)
        source = _narrowed(open_source(adapter), format, wanted, allow_drop)
        found = _read(source, format, architecture, alpha, allow_drop)
    wanted.insist(found.components, found.provenance.path)
    found = found.with_updates(u for u in found if wanted.takes(u.component))
    if isinstance(adapter, Adapter):
        found = _renamed(found, architecture, allow_drop)
    if not found.updates:
        raise UsageError(f"{found.provenance.path}: has nothing of {', '.join(wanted.names or loadable)}")
    _insist_on_init(found)
    insist_on_alphas(found)
    _insist_on_widths(found, architecture)
    check_finite(found)
    # A config of the source speaks of its own names; what it says of a scale is among the updates' facts.
    return replace(found, base=architecture, config={})


def _alpha(alpha: float | str | None) -> float | str | None:
    """As `load` takes it."""
    if isinstance(alpha, str) and alpha not in ("tensors", "header", "config"):
        raise UsageError(f"alpha {alpha!r} is neither a number nor one of tensors, header, config")
    if isinstance(alpha, (int, float)) and not isfinite(alpha):
        raise UsageError(f"alpha {alpha} is no number that a scale can have")
    return float(alpha) if isinstance(alpha, int) else alpha


def _names(components: Iterable[str] | None) -> tuple[str, ...]:
    if isinstance(components, str):
        raise UsageError(f"components is a list of names, [{components!r}]")
    if components is None:
        return ()
    names = tuple(components)
    if not names:
        raise UsageError("components names none; leave it out to load all")
    return names


class _Wanted:
    """Which components are to be loaded, and the sentences that refuse the others."""

    def __init__(
        self, kind: str, architecture: Architecture, loadable: tuple[str, ...], names: tuple[str, ...]
    ) -> None:
        self.kind, self.architecture, self.loadable, self.names = kind, architecture, loadable, names
        self.insist(names, "components")

    def takes(self, component: str) -> bool:
        return not self.names or component in self.names

    def insist(self, components: Iterable[str], where: str) -> None:
        """Raise `CannotRepresent` for the first component that is wanted and has no place in the pipeline."""
        present = [c for c in components if self.takes(c)]
        able = [c for c in self.loadable if c in self.architecture.components]
        for component in present:
            rest = [c for c in present if c in able]
            remedy = f"; components={rest} loads the rest" if rest and where != "components" else ""
            if component not in self.architecture.components:
                raise CannotRepresent(f"{where}: is for {component}, and this {self.kind} has none{remedy}")
            if component not in able:
                raise CannotRepresent(
                    f"{where}: is for {component}, of which {self.kind} manages no adapters (only of "
                    f"{', '.join(able)}){remedy}"
                )


def _narrowed(source: Source, format: str | None, wanted: _Wanted, allow_drop: bool) -> Source:
    """The source without the components that are not wanted.  Raises as `_Wanted.insist` for those that are."""
    if source.parts:
        wanted.insist([name for name in source.parts if name in COMPONENTS], source.path)
        return replace(source, parts={n: p for n, p in source.parts.items() if wanted.takes(n) or n not in COMPONENTS})
    _, reading = registry.recognise(source, format, wanted.architecture, allow_drop)
    places = _places(reading, wanted.architecture)
    wanted.insist(dict.fromkeys(places.values()), source.path)
    left = {key for key, component in places.items() if not wanted.takes(component)}
    return replace(source, tensors={key: t for key, t in source.tensors.items() if key not in left}) if left else source


def _places(reading: Reading, architecture: Architecture) -> dict[str, str]:
    """The component of every key whose prefix says one."""
    return {
        claim.key: claim.place.among(architecture.components) or claim.place.component
        for claim in reading.claims
        if claim.place.component != "*"
    }


def _read(
    source: Source, format: str | None, architecture: Architecture, alpha: float | str | None, allow_drop: bool
) -> Adapter:
    """The adapter by the pipeline's own names; where that fails, by those that it has without the pipeline, renamed.

    A file under the authors' names may need a built-in table: a pipeline's models are known by such names only where
    they equal it.  A published name may be another than the installed class's, in one component and not in the next.
    """
    for drop in (False, True) if allow_drop else (False,):
        try:
            return loading.read_source(source, format, Request(architecture, alpha))
        except AdapterOpsError as error:
            reason = error
        try:
            plain = _placed(loading.read_source(source, format, Request(None, alpha, allow_drop=drop)), architecture)
        except AdapterOpsError:
            continue
        try:
            return _renamed(plain, architecture, drop)
        except AdapterOpsError as error:
            reason = error
    if allow_drop:
        return loading.read_source(source, format, Request(architecture, alpha, allow_drop=True))
    raise reason


def _renamed(adapter: Adapter, architecture: Architecture, allow_drop: bool = False) -> Adapter:
    """The adapter with fused projections split and its modules under the pipeline's names.

    Raises `UnknownModule` and `BrokenAdapter` for what the pipeline has not.
    """
    dropped: list[str] = []
    if any(_is_fused(update, adapter.base) for update in adapter):
        form, dialect = registry.find("peft")
        spelled = form.spell(adapter, Target(dialect, adapter.base, allow_drop=allow_drop))
        adapter, dropped = spelled.adapter, spelled.dropped
    pairs: list[tuple[Update, Group]] = []
    for component in adapter.components:
        own = adapter.of(component)
        pairs += zip(own, _groups(own, component, architecture), strict=True)
    found = identify([g for _, g in pairs], adapter.provenance.path, architecture, allow_drop=allow_drop)
    lost = {id(group) for group in found.unknown}
    dropped += [t.key for group in found.unknown for t in group.tensors.values()]
    provenance = replace(adapter.provenance, dropped=(*adapter.provenance.dropped, *dropped))
    kept = [replace(update, module=group.name) for update, group in pairs if id(group) not in lost]
    return replace(adapter, provenance=provenance).with_updates(kept)


def _groups(updates: Sequence[Update], component: str, architecture: Architecture) -> list[Group]:
    """The updates as modules of one component, under the names that it has for them."""
    place = Place(component, f"{component}.", ())
    groups = [Group(place, u.module, u.method, u.module, dict(u.tensors), dict(u.options)) for u in updates]
    return _aligned(groups, architecture)


def _placed(adapter: Adapter, architecture: Architecture) -> Adapter:
    """An adapter of a lone model as one of the pipeline's component that its modules fit best.

    Raises `AmbiguousFormat` where two have them all.
    """
    if adapter.components != ("model",) or "model" in architecture.components:
        return adapter
    fits = {c: fit(architecture, _groups(list(adapter), c, architecture)) for c in architecture.components}
    whole = [component for component, found in fits.items() if found.whole]
    if len(whole) > 1:
        raise AmbiguousFormat(
            f"{adapter.provenance.path}: its modules are those of {' and of '.join(whole)}; put it into a folder with a "
            f"subfolder of the component's name ({whole[0]}/), and give that folder"
        )
    best = max(fits, key=lambda component: fits[component].shaped)
    if not fits[best].shaped:
        return adapter
    return adapter.with_updates(replace(update, component=best) for update in adapter)


def _aligned(groups: list[Group], architecture: Architecture) -> list[Group]:
    """The groups of one component under the names of the installed class, as far as they have any there."""
    change = align(groups, architecture)
    if change is not None:
        strip, add = change
        return [g._replace(name=add + g.name[len(strip) :]) for g in groups]
    renamed = rename(groups, architecture)
    if renamed is not None:
        return renamed
    # A module is missing: the others still have the beginning that the class has lost.
    component = architecture.components[groups[0].place.component]
    known, lost = component.modules, component.optional_prefix
    return [g._replace(name=n) if (n := g.name.removeprefix(lost)) in known else g for g in groups]


def _is_fused(update: Update, base: Architecture | None) -> bool:
    component = base.components.get(update.component) if base is not None else None
    return component is not None and update.module in component.fused


def _insist_on_init(adapter: Adapter) -> None:
    if adapter.mutated_init:
        raise CannotRepresent(
            f"{adapter.provenance.path}: was trained from {adapter.mutated_init}, which changed the base weights: on the "
            "pipeline's its deltas are wrong. Make a plain LoRA of it first (peft: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )


def _insist_on_widths(adapter: Adapter, architecture: Architecture) -> None:
    """Raise `BrokenAdapter` for factors of more inputs than the module has (a control adapter widens its base)."""
    for update in adapter:
        component = architecture.components[update.component]
        spec = component.spec(update.module)
        if spec is not None and spec.widens and not METHODS[update.method].fits(update, spec.shape):
            tensor = next(iter(update.tensors.values()))
            raise BrokenAdapter(
                f"{tensor.where}: has more inputs than the {spec.shape[1]} of {update.name}: it is a control adapter; "
                "load it with FluxControlPipeline.load_lora_weights, which widens the module"
            )
