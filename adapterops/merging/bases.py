"""Whether adapters can be merged at all: one base model, something in common, nothing that would be lost."""

from __future__ import annotations

from collections.abc import Sequence

from adapterops.adapter import Adapter, Certainty, Fact, Update
from adapterops.architectures import Architecture
from adapterops.errors import BrokenAdapter, CannotRepresent, UsageError
from adapterops.methods import METHODS
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
    first = next((a for a in known if a.architecture.certainty is not Certainty.ASSUMED), known[0])
    for other in known:
        if other.architecture.value == first.architecture.value:
            continue
        alike = first.architecture.value in other.architecture.others
        if not alike or not _is_of(other, first.base):
            raise UsageError(
                f"{other.provenance.path} is for {other.architecture.value} ({other.architecture.source}), and "
                f"{first.provenance.path} for {first.architecture.value} ({first.architecture.source}): adapters of "
                "different base models cannot be merged"
            )
    return first.architecture, first.base


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
    if method.acts_on_base(update) or more or method.weight_shape(update) is None:
        raise CannotRepresent(
            f"{where}: what {method.title} does to {update.name} is not a weight delta that the tensors alone hold; make a "
            "plain LoRA of it first (adapterops to-lora, with --base or --base-weights), and merge that"
        )


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
                f"{adapter.provenance.path}: none of its {len(own)} modules is in any other adapter: "
                f"{why if apart else 'they may be for different base models'}; --allow-disjoint puts them together all the same"
            )
