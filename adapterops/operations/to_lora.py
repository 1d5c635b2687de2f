"""Any adapter as a plain LoRA: exact where its methods are of low rank, else the best of a rank, an energy or an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adapterops import api, registry
from adapterops.adapter import Adapter, Update
from adapterops.errors import CannotRepresent, UsageError
from adapterops.loading import KEPT_FIELDS, insist_on_use
from adapterops.methods import METHODS
from adapterops.operations.demutate import Sources, demutated
from adapterops.operations.kept import Keeper
from adapterops.operations.lora_factors import Budget
from adapterops.operations.lora_maker import AS_THEY_ARE, Maker, ModuleReport
from adapterops.operations.own_parameters import OwnParameters
from adapterops.storage.base_weights import open_base
from adapterops.storage.output import Progress, nothing
from adapterops.storage.spool import Spool

Steps = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ToLoraResult:
    """A conversion to LoRA: the written file, and each module's rank and error."""

    written: api.Result
    modules: tuple[ModuleReport, ...]
    dropped: tuple[str, ...] = ()


def to_lora(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    to: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    target_rank: int | None = None,
    initial: str | os.PathLike[str] | None = None,
    base_weights: str | os.PathLike[str] | None = None,
    residual_base: str | os.PathLike[str] | None = None,
    accept_approximate: bool = False,
    reading: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    allow_drop: bool = False,
    overwrite: bool = False,
    verify: bool = True,
    progress: Steps = lambda done, total: None,
    copied: Progress = nothing,
) -> ToLoraResult:
    """Write the plain LoRA that does what the adapter `source` does, or the nearest one.

    - `rank`, `energy` (a share of ‖ΔW‖², 0 to 1) or `error` (of ‖ΔW‖, relative) say how much of each module's delta is
      kept; without any of them the result is exact, or the adapter is refused;
    - `target_rank` first re-allocates the triplets of an AdaLoRA: so many on average stay in a module, the strongest of all;
    - `base_weights` are the base's own weights, which some methods act on;
    - an adapter that was trained on a changed base (PiSSA, OLoRA, CorDA, LoRA-GA) becomes relative to the published one:
      by `initial`, the adapter before its training; by `base_weights` where the start follows from them; or by these and
      `residual_base`, the changed base.  `accept_approximate` lets a random start be estimated;
    - `to` is the format, by default that of the source where it can hold a LoRA; `reading` are the options of `ao.load`.

    Raises `UsageError` for options that do not go together, `CannotRepresent` where something would be lost (each with the
    way that works), and what `ao.load` and `ao.save` raise.
    """
    budget = budget_of(rank, energy, error)
    adapter = api.load(source, allow_drop=allow_drop, **dict(reading or {}))
    fields = dict((reading or {}).get("fields") or {})
    insist_on_use(adapter, fields, KEPT_FIELDS)
    own_form = registry.find(adapter.provenance.dialect)[0]
    form, dialect = registry.find(to or own_form.for_lora or adapter.provenance.dialect)
    place = output if output is not None else api.default_output(source, form, dialect, "lora")
    if target_rank is not None:
        adapter = with_target_rank(adapter, target_rank)
    first = api.load(initial, allow_drop=allow_drop, **dict(reading or {})) if initial is not None else None
    folder = os.path.dirname(os.path.abspath(api.place_of(os.fspath(place), form)))
    spool_folder = folder if os.path.isdir(folder) else ""
    made, modules, dropped = as_lora(
        adapter, budget, base_weights, initial=first, residual_base=residual_base, accept_approximate=accept_approximate,
        dtype=dtype, allow_drop=allow_drop, folder=spool_folder, progress=progress,
    )  # fmt: skip
    written = api.save(
        made,
        place,
        format=dialect.name,
        fields={name: value for name, value in fields.items() if name in KEPT_FIELDS},
        allow_drop=allow_drop,
        overwrite=overwrite,
        verify=verify,
        progress=copied,
    )
    return ToLoraResult(written, tuple(modules), tuple(dropped))


def budget_of(rank: int | None, energy: float | None, error: float | None) -> Budget:
    """The budget that the options say.  Raises `UsageError`."""
    if sum(value is not None for value in (rank, energy, error)) > 1:
        raise UsageError("--rank, --energy and --error each say how much to keep; give one of them")
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank}: a rank is 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"--energy {energy}: the share of each delta's energy to keep, above 0 and up to 1")
    if error is not None and not 0 <= error < 1:
        raise UsageError(f"--error {error}: the relative error that is allowed, 0 or more and less than 1")
    return Budget(rank, energy, error)


def with_target_rank(adapter: Adapter, target_rank: int) -> Adapter:
    """An AdaLoRA with `target_rank` triplets a module on average.  Raises `UsageError` for other adapters."""
    from adapterops.operations.triplets import reallocate

    own = [u for u in adapter if u.method == "adalora"]
    if not own:
        raise UsageError(
            f"{adapter.provenance.path}: --target-rank re-allocates the triplets of an AdaLoRA, and this is none; "
            "--rank, --energy and --error serve every method"
        )
    if target_rank < 1:
        raise UsageError(f"--target-rank {target_rank}: the average number of triplets a module, 1 or more")
    rest = [u for u in adapter if u.method != "adalora"]
    return adapter.with_updates([*reallocate(own, target_rank), *rest])


def as_lora(
    adapter: Adapter,
    budget: Budget | None = None,
    base_weights: str | os.PathLike[str] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    initial: Adapter | None = None,
    residual_base: str | os.PathLike[str] | None = None,
    accept_approximate: bool = False,
    dtype: str | None = None,
    allow_drop: bool = False,
    folder: str = "",
    progress: Steps = lambda done, total: None,
) -> tuple[Adapter, list[ModuleReport], list[str]]:
    """The adapter with every update a LoRA, a report for each, and what was dropped (with `allow_drop` only).

    `rank`, `energy` or `error` say the budget as those of `to_lora` do.

    Raises `CannotRepresent` where an update has no LoRA, or none without a budget or the base's weights.
    """
    if budget is None:
        budget = budget_of(rank, energy, error)
    elif not isinstance(budget, Budget):
        raise TypeError(f"the budget is {budget!r}: give rank=, energy= or error=, or a Budget")
    own = OwnParameters(open_base(base_weights, adapter.components), adapter) if base_weights is not None else None
    keeper = Keeper(Spool("the LoRA", folder))
    if adapter.mutated_init or initial is not None or residual_base is not None:
        residual = open_base(residual_base, adapter.components) if residual_base is not None else None
        changed = OwnParameters(residual, adapter) if residual is not None else None
        adapter, said = demutated(adapter, Sources(initial, own, changed, accept_approximate), keeper)
        provenance = replace(adapter.provenance, notes=(*_other_notes(adapter), *said))
        adapter = replace(adapter, provenance=provenance)
    if own is not None:
        adapter = _sized(adapter, own)
    maker = Maker(budget, own, keeper, api.dtype_named(dtype), adapter)
    updates: list[Update] = []
    reports: list[ModuleReport] = []
    dropped: list[str] = []
    total = len(adapter)
    for done, update in enumerate(adapter):
        progress(done, total)
        try:
            made, report = maker.make(update)
        except CannotRepresent as error:
            if not allow_drop:
                raise _explained(error, adapter) from error
            dropped.append(str(error))
            continue
        updates += made
        reports.append(report)
    progress(total, total)
    left = any(u.method in ("lora", "lora_parameters") for u in updates)
    if dropped and not left:
        raise CannotRepresent(f"{adapter.provenance.path}: nothing would be left of it (first: {dropped[0]})")
    if not left:
        raise CannotRepresent(
            f"{adapter.provenance.path}: nothing in it is a change of a weight that a LoRA could make"
        )
    updates = maker.with_biases(updates)
    config = {name: _travelling(fields, maker.changed) for name, fields in adapter.config.items()}
    return replace(adapter.with_updates(updates), config=config), reports, dropped


def _explained(error: CannotRepresent, adapter: Adapter) -> CannotRepresent:
    """The error with the file, and with whatever else nothing has said of it."""
    path, text = adapter.provenance.path, str(error)
    others = [
        n for n in adapter.provenance.notes if n.startswith("unknown: ") and "--set " in text and n[9:] not in text
    ]
    if path in text and not others:
        return error
    return CannotRepresent("; ".join([text if path in text else f"{path}: {text}", *others]))


def _sized(adapter: Adapter, own: OwnParameters) -> Adapter:
    """The adapter with the shapes of its modules, where its tensors do not hold them, from the base's weights.

    Raises `UsageError` where the weights are another model's.
    """
    updates, changed = [], False
    for update in adapter:
        method = METHODS[update.method]
        if update.method in AS_THEY_ARE or not update.module or not method.linear:
            updates.append(update)
            continue
        needed = method.needs_shape and "shape" not in update.options
        shape = own.shape(update) if needed or own.has(update) else None
        known = update.options.get("shape")
        if shape is not None and (not method.fits(update, shape) or (known and tuple(known) != shape)):
            tensor = next(iter(update.tensors.values()))
            raise UsageError(
                f"{tensor.where}: shape {list(tensor.shape)} ({method.title}) cannot act on {update.name}, whose weight in "
                f"{own.weights.path} is {list(shape)}: it is for another base model"
            )
        changed = changed or needed
        updates.append(replace(update, options={**update.options, "shape": shape}) if needed else update)
    adapter = adapter.with_updates(updates)
    return registry.find(adapter.provenance.dialect)[0].completed(adapter) if changed else adapter


def _other_notes(adapter: Adapter) -> list[str]:
    """The notes that still hold of an adapter that is relative to the published base."""
    return [note for note in adapter.provenance.notes if "changed the base weights" not in note]


def _travelling(fields: Mapping[str, Any], changed: bool) -> dict[str, Any]:
    return {k: v for k, v in fields.items() if k in KEPT_FIELDS} if changed else dict(fields)
