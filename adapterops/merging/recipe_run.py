"""A recipe's steps, in their order: each one's sources are opened, hashed beside the work, and merged."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from adapterops.adapter import Adapter
from adapterops.merging import sources
from adapterops.merging.content import hashing
from adapterops.merging.one_step import Workshop, run_step
from adapterops.merging.recipe import Recipe, Step
from adapterops.merging.run import Merged, widest
from adapterops.merging.settings import ModuleReport

Hashes = Sequence[Future[str] | None]
"""Of each source's content; none of an earlier step's result."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a recipe made, the recipe with the hash of each input, and the seconds that reading took."""

    merged: Merged
    recipe: Recipe
    earlier: tuple[tuple[str, tuple[ModuleReport, ...]], ...] = ()
    reading: float = 0.0


def run(
    recipe: Recipe,
    shop: Workshop,
    *,
    look: Callable[[Sequence[Adapter]], None] | None = None,
    ready: Callable[[Adapter], None] | None = None,
) -> Run:
    """Run every step of a recipe.  `look` is shown the adapters of a step before it begins, `ready` what the last one
    will give.

    Raises `UsageError` where a source is not what the recipe was written with, and what `merge` raises.
    """
    made: dict[str, Merged] = {}
    steps: list[Step] = []
    last: Merged | None = None
    files: list[Adapter] = []
    earlier: list[tuple[str, tuple[ModuleReport, ...]]] = []
    seconds = 0.0
    notes: list[str] = []
    for number, step in enumerate(recipe.steps, 1):
        final = number == len(recipe.steps)
        with hashing() as submit:
            started = time.perf_counter()
            step, adapters, hashes = _opened(step, recipe, made, submit)
            seconds += time.perf_counter() - started
            files += [adapter for adapter, ref in zip(adapters, step.sources, strict=True) if not ref.step]
            if look is not None:
                look(adapters)
            if any(ref.hash for ref in step.sources):
                sources.insist_unchanged(step, hashes)
            base = step.options.get("base_weights", "")
            base = recipe.located(base) if base else ""
            work = replace(shop, dtype=_dtype(recipe, shop.dtype, files, final))
            last = run_step(step, adapters, work, base, ready if final else None)
            step = _hashed(step, hashes)
        if base:
            sources.insist_same_base(step, last.base_hash)
            step = replace(step, options={**step.options, "base_hash": last.base_hash})
        notes += [*sources.twins(step.sources), *last.notes]
        if not final:
            earlier.append((step.name, last.modules))
        steps.append(step)
        if step.name:
            made[step.name] = last
    assert last is not None
    output = {**recipe.output, "dtype": shop.dtype}
    full = Recipe(tuple(steps), {name: value for name, value in output.items() if value and name != "path"})
    return Run(replace(last, notes=tuple(dict.fromkeys(notes))), full, tuple(earlier), seconds)


def _opened(
    step: Step, recipe: Recipe, made: Mapping[str, Merged], submit: Callable[[Adapter], Future[str]]
) -> tuple[Step, list[Adapter], Hashes]:
    """The step with the sources that it means, their adapters, and the hashes of those that are files."""
    refs, adapters = [], []
    hashes: list[Future[str] | None] = []
    for ref in step.sources:
        ref, adapter = (ref, made[ref.step].adapter) if ref.step else sources.chosen(ref, recipe)
        refs.append(ref)
        adapters.append(adapter)
        hashes.append(None if ref.step else submit(adapter))
    return replace(step, sources=tuple(refs)), adapters, hashes


def _dtype(recipe: Recipe, asked: str | None, files: Sequence[Adapter], final: bool) -> str | None:
    """What a step computes its result in; None where the engine takes the widest of its sources."""
    if final:
        return asked or (widest(files) if len(recipe.steps) > 1 else None)
    # What is merged again is not rounded before that.
    return "F64" if widest(files) == "F64" else "F32"


def _hashed(step: Step, hashes: Hashes) -> Step:
    """The step with the hash of each source that is a file."""
    refs = [ref if h is None else replace(ref, hash=h.result()) for ref, h in zip(step.sources, hashes, strict=True)]
    return replace(step, sources=tuple(refs))


__all__ = ["Run", "run"]
