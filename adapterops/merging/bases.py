"""Whether adapters can be merged at all: one base model, something in common, nothing that would be lost."""

from __future__ import annotations

from collections.abc import Sequence

from adapterops.adapter import Adapter, Certainty, Fact, Update, Verbatim
from adapterops.architectures import Architecture
from adapterops.dialects.resolve import noted, oldest
from adapterops.errors import BrokenAdapter, CannotRepresent, UsageError
from adapterops.merging.experts import stack_of
from adapterops.merging.modules import CARRIED
from adapterops.methods import METHODS
from adapterops.registry import find
from adapterops.storage import dtypes

_NAME = "base_model_name_or_path"


def common_base(adapters: Sequence[Adapter]) -> tuple[Fact[str | None], Architecture | None]:
    """The base model of all adapters, where one of them tells.

    Raises `UsageError` where two of them tell of different ones.
    """
    known = [a for a in adapters if a.architecture.value is not None]
    if not known:
        return Fact(None, Certainty.UNKNOWN, "no source names a known base model"), None
    # One that was trained on few modules may fit two tables alike; the base that another one shows serves all.  Canonical
    # names alone do not tell: how a file spells them and where its blocks end may have ruled a base out.
    certain = [a for a in known if a.architecture.certainty is not Certainty.ASSUMED]
    # A variant has all that its base has.
    first = next((a for a in certain if a.base is not None and a.base.variant), (certain or known)[0])
    for other in known:
        if other.architecture.value == first.architecture.value:
            continue
        varied = first.base is not None and first.base.variant and first.base.family == other.architecture.value
        alike = varied or first.architecture.value in other.architecture.others
        if not alike or not _is_of(other, first.base):
            raise UsageError(
                f"{other.provenance.path} is for {other.architecture.value} ({other.architecture.source}), and "
                f"{first.provenance.path} for {first.architecture.value} ({first.architecture.source}): adapters of "
                "different base models cannot be merged"
            )
    fact = first.architecture
    if certain or fact.value is None:
        return fact, first.base
    left = [name for name in fact.others if name and all(name in _may_be(adapter) for adapter in known)]
    if not left:
        return Fact(fact.value, Certainty.DERIVED, "the one base model that all of the adapters fit"), first.base
    return oldest(fact.value, left), first.base


def common_names(adapters: Sequence[Adapter]) -> Verbatim | None:
    """How names are spelled that no known base model has; None where they are known, or are used as they stand everywhere.

    Raises `UsageError` where adapters spell them in different ways, or only some are of a base that is not known.
    """
    first = next((adapter for adapter in adapters if adapter.verbatim is not None), None)
    if first is None or first.verbatim is None:
        return None
    rows = dict(first.verbatim.rows)
    for other in adapters:
        own = other.verbatim.rows if other.verbatim is not None else None
        if own is None or any(rows.setdefault(name, row)[1:] != row[1:] for name, row in own.items()):
            why = (
                f"is for {other.architecture.value}"
                if other.architecture.value is not None
                else f"spells names as {find(other.provenance.dialect)[1].title} does"
            )
            raise UsageError(
                f"{first.provenance.path}: is for a base model that is not known, and spells its names as "
                f"{find(first.provenance.dialect)[1].title} does; {other.provenance.path} {why}: nothing tells which modules are "
                "the same. --base CONFIG of the base model does; or convert one of them to the other's spelling, where that goes"
            )
    return Verbatim(rows, first.verbatim.why)


def carried_notes(adapters: Sequence[Adapter], fact: Fact[str | None]) -> tuple[str, ...]:
    """What the adapters' readings told, each once, and of what a base model was assumed for only what holds of all, `fact`."""
    out: dict[str, None] = {}
    for adapter in adapters:
        own = adapter.architecture
        for note in adapter.provenance.notes:
            if own.certainty is not Certainty.ASSUMED or note != noted(own):
                out[note] = None
            elif fact.certainty is Certainty.ASSUMED:
                out[noted(fact)] = None
    return tuple(out)


def _may_be(adapter: Adapter) -> tuple[str | None, ...]:
    return adapter.architecture.value, *adapter.architecture.others


def _is_of(adapter: Adapter, base: Architecture | None) -> bool:
    """Whether a base model has all modules of an adapter, in their shapes."""
    if base is None:
        return False
    for update in adapter:
        component = base.components.get(update.component)
        spec = component.spec(update.module) if component is not None else None
        if spec is None or not METHODS[update.method].fits(update, spec.shape):
            return False
    return True


def notes(adapters: Sequence[Adapter]) -> list[str]:
    """What the user should know about the adapters' bases."""
    names: dict[str, str] = {}
    for adapter in adapters:
        for config in adapter.config.values():
            name = config.get(_NAME)
            if isinstance(name, str) and name:
                names.setdefault(name, adapter.provenance.path)
    if len(names) < 2:
        return []
    listed = ", ".join(f"{name} ({path})" for name, path in names.items())
    return [f"the adapters name different base models: {listed}; the shapes agree, the output names the first"]


def insist(adapters: Sequence[Adapter]) -> None:
    """Raise for an adapter that no merge can take: scale 0, no scale, a changed base."""
    _insist_on_same_layers(adapters)
    for adapter in adapters:
        if adapter.mutated_init:
            raise CannotRepresent(
                f"{adapter.provenance.path}: was trained from {adapter.mutated_init}, which changed the base weights: its "
                "deltas are not relative to the published base, and cannot be added to others. Make a plain LoRA of it "
                "first (peft: save_pretrained with path_initial_model_for_weight_conversion)"
            )
        for update in adapter:
            _insist_on_delta(update)
            method = METHODS[update.method]
            odd = next((t for t in update.tensors.values() if method.scaled and t.dtype not in dtypes.NUMBERS), None)
            if odd is not None:
                raise CannotRepresent(
                    f"{odd.where}: has dtype {odd.dtype}: quantised factors without their scales are not what was trained; "
                    "merge the adapter as it was before it was quantised"
                )
            if method.scaled and update.alpha is not None and method.scale(update) == 0:
                raise BrokenAdapter(
                    f"{next(iter(update.tensors.values())).where}: the scale of {update.name} is 0 (alpha "
                    f"{update.alpha}): it would change nothing; give the alpha that it was trained with (--alpha X), or "
                    "leave it out"
                )


def _insist_on_same_layers(adapters: Sequence[Adapter]) -> None:
    """Raise `UsageError` where one adapter is for a base whose layers are repeated, and another for the base itself."""
    found: dict[str, str] = {}
    for adapter in adapters:
        # Saved modules and experts do not say it; the adapter's other updates do, all of them the same.
        own = [update.options.get(REPLICATION) for update in adapter if update.method not in CARRIED]
        if own:
            found.setdefault(repr(next((value for value in own if value is not None), None)), adapter.provenance.path)
    if len(found) > 1:
        listed = ", ".join(f"{'none' if value == 'None' else value} ({path})" for value, path in found.items())
        raise UsageError(
            f"the adapters are for bases whose layers are repeated in different ways ({REPLICATION}): {listed}; what is called "
            "the same layer is not, and they cannot be merged"
        )


REPLICATION = "layer_replication"
"""The option of an update that says which layers of the base are repeated in the model that it is for."""
_OWN_RULES = frozenset({"lora", "loha", "lokr", "ia3", "diff", "saved", "trainable_tokens", "bundled"})
"""Methods of which every part has a rule of merging."""


def _insist_on_delta(update: Update) -> None:
    """Raise `CannotRepresent` for an update that is more, or less, than a weight delta that its tensors hold."""
    method = METHODS[update.method]
    if update.method in _OWN_RULES:
        return
    where = next(iter(update.tensors.values())).where
    if not method.linear:
        raise CannotRepresent(
            f"{where}: {method.title} changes no weight ({update.name}), so there is nothing to merge"
        )
    if method.form.startswith("none"):
        raise CannotRepresent(
            f"{where}: {method.title} replaces numbers of {update.name} ({method.form}); it is not merged"
        )
    more = update.tensors.keys() & {"bias", "vector", "magnitude"}
    unknown = method.needs_shape and "shape" not in update.options and method.weight_shape(update) is None
    if unknown and not more and not method.acts_on_base(update):
        raise CannotRepresent(
            f"{where}: what {method.title} does to {update.name} needs the shape of its weight, which the tensors do not hold: "
            "--base CONFIG of the base model says it"
        )
    if method.acts_on_base(update) or more or method.weight_shape(update) is None:
        raise CannotRepresent(
            f"{where}: what {method.title} does to {update.name} is not a weight delta that the tensors alone hold; make a "
            "plain LoRA of it first (adapterops to-lora, with --base or --base-weights), and merge that"
        )


def _own_count(adapter: Adapter) -> int:
    """How many modules an adapter changes, as its file counts them: the experts of a stack are one."""
    return len({(update.component, stack_of(update.module)) for update in adapter})


def insist_on_overlap(adapters: Sequence[Adapter], touched: Sequence[frozenset[int]], allowed: bool) -> None:
    """Raise `UsageError` where an adapter shares no module with any other one; `touched` are each module's adapters."""
    if allowed or len(adapters) < 2:
        return
    for number, adapter in enumerate(adapters):
        own = [found for found in touched if number in found]
        if own and all(found == {number} for found in own):
            others = {c for n, a in enumerate(adapters) if n != number for c in a.components}
            apart = others.isdisjoint(adapter.components) and adapter.architecture.value is not None
            why = f"it changes the {' and '.join(adapter.components)} only, they {' and '.join(sorted(others))}"
            raise UsageError(
                f"{adapter.provenance.path}: none of its {_own_count(adapter)} modules is in any other adapter: "
                f"{why if apart else 'they may be for different base models'}; --allow-disjoint puts them together all the same"
            )
