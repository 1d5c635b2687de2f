"""Several adapters made into one: the front door of `adapterops.merging`.

    import adapterops as ao

    ao.merge(["style.safetensors", "face-peft"], "both.safetensors", method="ties_svd", density=0.3, rank=32)
    merged = ao.combine([one, two], method="svd", weights=[0.7, 0.3]).adapter
    ao.merge(recipe="recipe.yaml")

Every merge is a recipe of one or more steps; what is given as arguments is a recipe of one.  The recipe, with the hash of
what each input holds, is written into the output's header, and `recipe=` runs it again from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from adapterops import api
from adapterops.adapter import Adapter
from adapterops.api import Result
from adapterops.errors import CannotRepresent, UsageError
from adapterops.loading import PathLike
from adapterops.merging import sources as inputs
from adapterops.merging.arguments import Weights, recipe_of
from adapterops.merging.destination import Destination
from adapterops.merging.one_step import Workshop, run_step
from adapterops.merging.recipe import HEADER_ENTRY, Recipe
from adapterops.merging.recipe_run import run
from adapterops.merging.run import Merged, nothing
from adapterops.merging.run import Progress as ModuleProgress
from adapterops.merging.settings import ModuleReport
from adapterops.storage.output import Progress
from adapterops.storage.output import nothing as no_bytes


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What a merge did: what was written (as of a conversion), what became of every module, and the recipe."""

    written: Result
    modules: tuple[ModuleReport, ...] = field(repr=False)
    notes: tuple[str, ...]
    recipe: Recipe
    earlier: tuple[tuple[str, tuple[ModuleReport, ...]], ...] = ()
    """The name of each step before the last, and what became of its modules."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of reading the sources' headers, of computing, and of writing with its proof."""

    @property
    def path(self) -> str:
        """Where the output is."""
        return self.written.path


def merge(
    sources: Sequence[PathLike] = (),
    output: PathLike | None = None,
    method: str | None = None,
    *,
    recipe: PathLike | Recipe | Mapping[str, Any] | None = None,
    weights: Weights = None,
    to: str | None = None,
    space: str | None = None,
    reading: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    device: str = "auto",
    workers: int = 0,
    overwrite: bool = False,
    verify: bool = True,
    fields: Mapping[str, Any] | None = None,
    fold_alpha: bool = False,
    progress: ModuleProgress = nothing,
    writing: Progress = no_bytes,
    **parameters: Any,
) -> MergeResult:
    """Merge the adapters in `sources`, or run `recipe`, and write the result.

    - `method` is one of `adapterops.merging.registry.METHODS` or PEFT's names for them (`ties_svd` …); `space` "factors" or
      "delta" where it can act in both;
    - `weights` are one number an adapter (or a mapping as in a weights file), or the path of such a file; 1 each where nothing
      is said;
    - `parameters` are the method's (density …) and rank, seed, svd, svd_tolerance, split, saved, allow_disjoint;
    - `reading` are options of `load`, for all sources; `to`, `dtype`, `fields`, `fold_alpha`, `overwrite`, `verify` those of
      `save`;
    - `device` and `workers` say where the work is done; they change no byte on CPUs.

    Raises the errors of `adapterops.errors`; nothing is left behind then.
    """
    stated = {"to": to, "dtype": dtype, "fold_alpha": fold_alpha or None, "path": output and os.fspath(output)}
    asked = recipe_of(sources, method, recipe, weights, space, reading, parameters, stated)
    started = time.perf_counter()
    place = Destination(asked, fields or {}, overwrite)
    shop = Workshop(asked.output.get("dtype"), device, workers, place.room(), progress)
    made = run(asked, shop, look=place.look, ready=place.ready)
    computed = time.perf_counter()
    adapter, told = place.fitted(made.merged.adapter)
    kept = inputs.findable(made.recipe, asked, place.home(adapter))
    adapter = replace(adapter, metadata={**adapter.metadata, HEADER_ENTRY: kept.to_header()})
    _, dialect, path = place.target(adapter)
    try:
        written = api.save(
            adapter,
            path,
            format=dialect.name,
            fold_alpha=place.folds(dialect),
            fields=place.own_fields(adapter),
            allow_drop=place.drops,
            overwrite=overwrite,
            verify=verify,
            progress=writing,
        )
    except CannotRepresent as error:
        raise place.offering(error, adapter) from error
    seconds = {
        "read": made.reading,
        "compute": computed - started - made.reading,
        "write": time.perf_counter() - computed,
    }
    return MergeResult(written, made.merged.modules, (*made.merged.notes, *told), kept, made.earlier, seconds)


def combine(
    adapters: Sequence[Adapter],
    method: str,
    *,
    weights: Weights = None,
    space: str | None = None,
    dtype: str | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: ModuleProgress = nothing,
    **parameters: Any,
) -> Merged:
    """Merge adapters that are loaded already, with the options of `merge`; the result can be saved or loaded into a model.

    Its tensors stand in a nameless temporary file that goes with the adapter.
    """
    if not all(isinstance(adapter, Adapter) for adapter in adapters):
        raise UsageError("combine takes adapters, as load gives them; merge takes paths")
    paths = [adapter.provenance.path or f"adapter {n + 1}" for n, adapter in enumerate(adapters)]
    step = recipe_of(paths, method, None, weights, space, None, parameters).steps[-1]
    shop = Workshop(dtype, device, workers, progress=progress)
    return run_step(step, adapters, shop, step.options.get("base_weights", ""))


__all__ = ["MergeResult", "Merged", "combine", "merge"]
