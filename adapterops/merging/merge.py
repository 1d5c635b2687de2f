"""Several adapters made into one: the front door of `adapterops.merging`.

    import adapterops as ao

    ao.merge(["style.safetensors", "face-peft"], "both.safetensors", method="ties_svd", density=0.3, rank=32)
    merged = ao.combine([one, two], method="svd", weights=[0.7, 0.3]).adapter
    ao.merge(recipe="recipe.yaml")

Every merge is a recipe of one or more steps; what is given as arguments is a recipe of one.  The recipe, with the hash of
what each input holds, is written into the output's header, and `recipe=` runs it again from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from adapterops import api, registry
from adapterops.adapter import Adapter
from adapterops.api import Result
from adapterops.architectures import Architecture
from adapterops.dialects.table import AlphaIn, Dialect
from adapterops.errors import AdapterOpsError, UnreadableFile, UsageError
from adapterops.loading import KEPT_FIELDS, PathLike
from adapterops.merging import bases, one_scale
from adapterops.merging import weights as weighing
from adapterops.merging.modules import WeightOf
from adapterops.merging.recipe import HEADER_ENTRY, Recipe, SourceRef, Step, build
from adapterops.merging.recipe import load as load_recipe
from adapterops.merging.registry import METHODS, find
from adapterops.merging.run import Merged, nothing, widest
from adapterops.merging.run import Progress as ModuleProgress
from adapterops.merging.run import combine as run_step
from adapterops.merging.settings import Choice, Choose, ModuleReport, Settings
from adapterops.merging.steps import FLAGS, OPTIONS, TEXTS
from adapterops.methods import METHODS as ADAPTER_METHODS
from adapterops.plugin import Format, Target
from adapterops.storage.output import Progress
from adapterops.storage.output import nothing as no_bytes
from adapterops.storage.tensor import CHUNK, ByteSource, MemorySource, fill

_KEPT = ("ss_base_model_version", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_v2",
         "modelspec.architecture", "modelspec.implementation", "modelspec.sai_model_spec", "modelspec.prediction_type",
         "modelspec.resolution")  # fmt: skip
"""Header entries about the base model: kept where no adapter says otherwise.  What is about one training is not."""


_AS_IN_RECIPES = {"format": "from", "fields": "set"}
"""What recipes and the command line call the arguments of `load`, where that is something else."""

Weights = Sequence[float | Mapping[str, Any]] | PathLike | None
"""A number an adapter, or a mapping as in a weights file; or the path of one."""


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
    decides, shown = _deciding(asked), list[Sequence[Adapter]]()

    def target(adapters: Sequence[Adapter]) -> tuple[Format, Dialect, PathLike]:
        form, dialect = registry.find(asked.output.get("to") or adapters[0].provenance.dialect)
        return form, dialect, asked.output.get("path") or ("merged" if form.is_folder else f"merged{form.suffixes[0]}")

    def look(adapters: Sequence[Adapter]) -> None:
        shown.append(adapters)
        if len(shown) > decides:
            form, _, place = target(shown[decides])
            api.insist_on_place(place, form, [adapter for step in shown for adapter in step], overwrite)

    def folds(dialect: Dialect) -> bool:
        # The scale that stacked factors keep is our own choice; where no reader asks for one there is none.
        return bool(asked.output.get("fold_alpha")) or dialect.alpha is AlphaIn.NOWHERE

    # Who lets keys go when reading lets go what the target cannot hold, too; the output lists both.
    drops = any(ref.reading.get("allow_drop") for step in asked.steps for ref in step.sources)

    def own_fields(merged: Adapter) -> dict[str, Any]:
        # What every source was read with (its scale, say) is not said again of what became of them.
        taken = set(merged.provenance.given) - set(KEPT_FIELDS)
        return {name: value for name, value in (fields or {}).items() if name not in taken}

    def trial(adapter: Adapter, form: Format, dialect: Dialect) -> None:
        form.write(adapter, Target(dialect, adapter.base, own_fields(adapter), allow_drop=drops))

    def ready(planned: Adapter) -> None:
        form, dialect, _ = target([planned])
        if not folds(dialect):
            one_scale.fitting(planned, lambda adapter: trial(adapter, form, dialect))

    made = run(
        asked,
        look=look,
        ready=ready,
        dtype=asked.output.get("dtype"),
        device=device,
        workers=workers,
        folder=_room(asked.output.get("path")),
        progress=progress,
    )
    computed = time.perf_counter()
    adapter, notes = made.merged.adapter, made.merged.notes
    form, dialect, place = target([adapter])
    if one_scale.differ(adapter) and not folds(dialect):
        adapter, told = one_scale.fitting(adapter, lambda adapter: trial(adapter, form, dialect))
        notes = (*notes, *told)
    home = os.path.abspath(api.place_of(os.fspath(place), form))
    kept = _findable(made.recipe, asked, home if form.is_folder else os.path.dirname(home))
    adapter = replace(adapter, metadata={**adapter.metadata, HEADER_ENTRY: kept.to_header()})
    written = api.save(
        adapter,
        place,
        format=dialect.name,
        fold_alpha=folds(dialect),
        fields=own_fields(adapter),
        allow_drop=drops,
        overwrite=overwrite,
        verify=verify,
        progress=writing,
    )
    seconds = {
        "read": made.reading,
        "compute": computed - started - made.reading,
        "write": time.perf_counter() - computed,
    }
    return MergeResult(written, made.merged.modules, notes, kept, made.earlier, seconds)


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
    return _run_step(step, adapters, dtype, device, workers, "", progress, step.options.get("base_weights", ""))


def recipe_of(
    sources: Sequence[PathLike],
    method: str | None,
    recipe: PathLike | Recipe | Mapping[str, Any] | None,
    weights: Weights,
    space: str | None,
    reading: Mapping[str, Any] | None,
    parameters: Mapping[str, Any],
    output: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe that the arguments of `merge` mean; `output` are its `to`, `dtype`, `fold_alpha` and `path`, where they are
    given, and go before a recipe's own.

    Raises `UsageError` where the arguments contradict each other.
    """
    found = _recipe_of(sources, method, recipe, weights, space, reading, parameters)
    stated = {name: value for name, value in (output or {}).items() if value is not None}
    return replace(found, output={**found.output, **stated})


def _recipe_of(
    sources: Sequence[PathLike],
    method: str | None,
    recipe: PathLike | Recipe | Mapping[str, Any] | None,
    weights: Weights,
    space: str | None,
    reading: Mapping[str, Any] | None,
    parameters: Mapping[str, Any],
) -> Recipe:
    # The command line says False of every flag that is not there.
    given = {n: _plain(v) for n, v in parameters.items() if v is not None and not (v is False and n in FLAGS)}
    read_with = {_AS_IN_RECIPES.get(n, n): _plain(v) for n, v in (reading or {}).items() if v is not None}
    if recipe is not None:
        stated = [
            *(["sources"] if sources else []),
            *(["method"] if method else []),
            *(["weights"] if weights is not None else []),
            *(["space"] if space else []),
            *given,
            *read_with,
        ]
        if stated:
            raise UsageError(
                f"--recipe says it all; {', '.join(stated)} would contradict it: change the recipe instead (--print-recipe "
                "writes it out)"
            )
        if isinstance(recipe, Mapping):
            return build(recipe, "recipe")
        return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    if method is None:
        find("svd")  # fills the table
        raise UsageError(f"--method says how to merge: {', '.join(METHODS)} (adapterops methods --merge explains them)")
    if isinstance(sources, str | os.PathLike):
        raise UsageError(f"sources is a list of paths, and not one path ({os.fspath(sources)})")
    sources = list(sources)
    if any(isinstance(source, Adapter) for source in sources):
        raise UsageError("sources are paths; adapters that are loaded already are merged by combine")
    if not sources:
        raise UsageError("nothing to merge: name the adapters, or a --recipe")
    found, _ = find(method, space)
    unknown = {name: value for name, value in given.items() if name not in (*OPTIONS, *FLAGS, *TEXTS)}
    found.settle(unknown)
    rules = _rules(weights, len(sources))
    described = [
        {"path": os.fspath(path), "weight": rule.data(), **read_with} for path, rule in zip(sources, rules, strict=True)
    ]
    whole = {"method": method, "sources": described, **({"space": space} if space else {}), **given}
    try:
        made = build(whole, "merge")
    except UsageError as error:
        # There is no recipe that the user would know of.
        raise UsageError(re.sub(r"^merge: step 1: (?:(?:source \d+|\w+): )*", "", str(error))) from error
    step = made.steps[0]
    # A weights file is named where one of its entries is wrong.
    refs = tuple(replace(ref, where=rule.where) for ref, rule in zip(step.sources, rules, strict=True))
    return replace(made, steps=(replace(step, sources=refs, where=f"--method {method}"),))


def _plain(value: Any) -> Any:
    """A path as text, and a number of numpy or torch as Python's: what a recipe can hold."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _deciding(recipe: Recipe) -> int:
    """Which step has the source whose dialect is written, where nothing else is said: the first source of the last step, or
    of the one whose result that is."""
    numbers = {step.name: number for number, step in enumerate(recipe.steps)}
    number = len(recipe.steps) - 1
    while recipe.steps[number].sources[0].step:
        number = numbers[recipe.steps[number].sources[0].step]
    return number


def _rules(weights: Weights, count: int) -> Sequence[weighing.WeightRule]:
    if weights is None:
        return [weighing.WeightRule() for _ in range(count)]
    if isinstance(weights, str | os.PathLike):
        return weighing.parse(os.fspath(weights), count)
    if hasattr(weights, "tolist"):  # an array or a tensor
        weights = weights.tolist()
    if not isinstance(weights, Sequence):
        raise UsageError(f"weights {weights!r}: give a list with one entry an adapter, or the path of a weights file")
    rules = [weighing.entry(_plain(weight), f"weights: entry {n}") for n, weight in enumerate(weights, 1)]
    if len(rules) != count:
        raise UsageError(f"weights: {len(rules)} for {count} adapters; give one for each, in their order")
    return rules


@dataclass(frozen=True, slots=True)
class Run:
    """What a recipe made, the recipe with the hash of each input, and the seconds that reading took."""

    merged: Merged
    recipe: Recipe
    earlier: tuple[tuple[str, tuple[ModuleReport, ...]], ...] = ()
    reading: float = 0.0


def run(
    recipe: Recipe,
    *,
    dtype: str | None = None,
    device: str = "auto",
    workers: int = 0,
    folder: str = "",
    look: Callable[[Sequence[Adapter]], None] | None = None,
    ready: Callable[[Adapter], None] | None = None,
    progress: ModuleProgress = nothing,
) -> Run:
    """Run every step of a recipe.  `look` is shown the adapters of a step before it begins, `ready` what the last one
    will give.

    Raises `UsageError` where a source is not what the recipe was written with, and what `merge` raises.
    """
    made: dict[str, Merged] = {}
    steps: list[Step] = []
    last: Merged | None = None
    sources: list[Adapter] = []
    earlier: list[tuple[str, tuple[ModuleReport, ...]]] = []
    seconds = 0.0
    notes: list[str] = []
    for number, step in enumerate(recipe.steps):
        with _hashing() as submit:
            adapters: list[Adapter] = []
            hashes: list[Future[str] | None] = []
            found: list[SourceRef] = []
            started = time.perf_counter()
            for ref in step.sources:
                ref, adapter = (ref, made[ref.step].adapter) if ref.step else _chosen(ref, recipe)
                found.append(ref)
                adapters.append(adapter)
                hashes.append(None if ref.step else submit(adapters[-1]))
            step = replace(step, sources=tuple(found))
            seconds += time.perf_counter() - started
            sources += [a for a, ref in zip(adapters, step.sources, strict=True) if not ref.step]
            if look is not None:
                look(adapters)
            if any(ref.hash for ref in step.sources):
                _insist_unchanged(step, hashes)
            final = number == len(recipe.steps) - 1
            weights = step.options.get("base_weights", "")
            weights = recipe.located(weights) if weights else ""
            # What is merged again is not rounded before that.
            kind = dtype or (widest(sources) if len(recipe.steps) > 1 else None)
            kind = kind if final else ("F64" if widest(sources) == "F64" else "F32")
            last = _run_step(step, adapters, kind, device, workers, folder, progress, weights, ready if final else None)
            refs = [
                replace(ref, hash=h.result()) if h is not None else ref
                for ref, h in zip(step.sources, hashes, strict=True)
            ]
        options = dict(step.options)
        if weights:
            _insist_same_base(step, last.base_hash)
            options["base_hash"] = last.base_hash
        notes += [*_twins(step, refs), *last.notes]
        if not final:
            earlier.append((step.name, last.modules))
        steps.append(replace(step, sources=tuple(refs), options=options))
        if step.name:
            made[step.name] = last
    assert last is not None
    full = Recipe(tuple(steps), {k: v for k, v in {**recipe.output, "dtype": dtype}.items() if v and k != "path"})
    return Run(replace(last, notes=tuple(dict.fromkeys(notes))), full, tuple(earlier), seconds)


def _twins(step: Step, refs: Sequence[SourceRef]) -> list[str]:
    """A note where two sources are the same adapter: the commonest slip of the hand."""
    seen: dict[str, str] = {}
    out = []
    for ref in refs:
        if ref.hash and ref.hash in seen:
            out.append(f"{seen[ref.hash]} and {ref.path} hold the same adapter")
        seen.setdefault(ref.hash, ref.path)
    return out


def _findable(recipe: Recipe, asked: Recipe, home: str) -> Recipe:
    """The recipe with paths that lead to its sources from the current folder, or from `home`, where it will stand."""

    def path(written: str) -> str:
        located = asked.located(written)
        # What leads there from the current folder stays as the user wrote it: the same command gives the same bytes.
        if not written or written.startswith("hf://") or os.path.isabs(written) or located == written:
            return written
        for folder in (home, os.path.dirname(home)):
            if os.path.realpath(os.path.join(folder, written)) == os.path.realpath(located):
                return written  # `Recipe.located` looks there
        return os.path.relpath(located, home)

    steps = []
    for step in recipe.steps:
        refs = tuple(replace(ref, path=path(ref.path)) for ref in step.sources)
        weights = {"base_weights": path(step.options["base_weights"])} if "base_weights" in step.options else {}
        steps.append(replace(step, sources=refs, options={**step.options, **weights}))
    return replace(recipe, steps=tuple(steps))


def _chosen(ref: SourceRef, recipe: Recipe) -> tuple[SourceRef, Adapter]:
    """The adapter that a source means; where several files have its name, the one that the recipe was run with."""
    first, *others = recipe.places(ref.path) or [ref.path]
    if ref.hash and others:
        for place in (first, *others):
            with contextlib.suppress(AdapterOpsError):
                adapter = _load(replace(ref, path=place), recipe)
                if content_hash(adapter) == ref.hash:
                    return (ref if place == first else replace(ref, path=place)), adapter
    return ref, _load(ref, recipe)


def _load(ref: SourceRef, recipe: Recipe) -> Adapter:
    located = recipe.located(ref.path)
    if recipe.folder and not located.startswith("hf://") and not os.path.lexists(located):
        raise UnreadableFile(
            f"{ref.path}: the recipe's source is neither in the current folder nor in {recipe.folder}; run the command where "
            "the sources are, or change the path (--print-recipe writes the recipe out)"
        )
    arguments = dict(ref.arguments)
    if arguments.get("base"):
        arguments["base"] = recipe.located(arguments["base"])
    return api.load(recipe.located(ref.path), **arguments)


def _insist_unchanged(step: Step, hashes: Sequence[Future[str] | None]) -> None:
    for ref, future in zip(step.sources, hashes, strict=True):
        if ref.hash and future is not None and future.result() != ref.hash:
            raise UsageError(
                f"{step.where}: {ref.path} is not what the recipe was run with (its content is {future.result()[:16]}…, and "
                f"was {ref.hash[:16]}…); take the hash out of the recipe (--print-recipe writes it out) to use it as it is now"
            )


def _insist_same_base(step: Step, found: str) -> None:
    stated = step.options.get("base_hash")
    if stated and stated != found:
        raise UsageError(
            f"{step.where}: {step.options['base_weights']} is not the base that the recipe was run with; take base_hash out "
            "of the recipe to use it all the same"
        )


@contextlib.contextmanager
def _hashing() -> Iterator[Callable[[Adapter], Future[str]]]:
    """Hashes in a thread beside the work, which reads the same; given up at once where that fails."""
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="adapterops-hash") as pool:
        try:
            yield lambda adapter: pool.submit(content_hash, adapter, stop)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def content_hash(adapter: Adapter, stop: threading.Event | None = None) -> str:
    """SHA-256 of what an adapter does: every update's name, method, scale, options and tensors, in the order of names.

    Neither the order of the keys in a file nor the header's words change it.  `stop` ends it early, with no sense in it.
    """
    digest = hashlib.sha256()
    # Many small tensors in one call: each one waits for the work beside it to let Python go.
    room, filled = memoryview(bytearray(CHUNK)), 0
    pieces: list[tuple[ByteSource, int, memoryview]] = []
    for source, start, length in _content(adapter):
        end = start + length
        while start < end:
            take = min(end - start, CHUNK - filled)
            pieces.append((source, start, room[filled : filled + take]))
            start, filled = start + take, filled + take
            if filled == CHUNK:
                if stop is not None and stop.is_set():
                    return ""
                fill(pieces)
                digest.update(room)
                filled = 0
                pieces.clear()
    fill(pieces)
    digest.update(room[:filled])
    return digest.hexdigest()


def _content(adapter: Adapter) -> Iterator[tuple[ByteSource, int, int]]:
    """What is hashed, in order: the sources of bytes, where to begin, and how many."""
    for key in sorted(adapter.updates):
        update = adapter.updates[key]
        scale = ADAPTER_METHODS[update.method].scale(update)
        text = repr((key, scale, sorted(update.options.items(), key=lambda item: item[0])))
        for role in sorted(update.tensors):
            tensor = update.tensors[role]
            text += repr((role, tensor.dtype, tensor.shape))
            yield MemorySource(text.encode()), 0, len(text.encode())
            yield tensor.source, tensor.start, tensor.nbytes
            text = ""
        if text:
            yield MemorySource(text.encode()), 0, len(text.encode())


def _run_step(
    step: Step,
    adapters: Sequence[Adapter],
    dtype: str | None,
    device: str,
    workers: int,
    folder: str,
    progress: ModuleProgress,
    base_weights: str = "",
    ready: Callable[[Adapter], None] | None = None,
) -> Merged:
    method, _ = find(step.method, step.space)
    if method.adapters is not None and len(adapters) != method.adapters:
        raise UsageError(f"--method {step.method} merges {method.adapters} adapters, and {len(adapters)} are given")
    for adapter in adapters:
        api.insist_on_alphas(adapter)
    _, base = bases.common_base(adapters)
    rules = [ref.rule for ref in step.sources]
    modules = [{(u.component, u.module) for u in adapter} for adapter in adapters]
    for rule, own in zip(rules, modules, strict=True):
        rule.check(sorted(own), base)
    choose = _choose(step)
    weights = [_weight_of(rule, base, choose, n) for n, rule in enumerate(rules)]
    merged = run_step(
        adapters,
        weights,
        choose,
        _settings(step, dtype, device, workers),
        folder=folder,
        base_weights=base_weights,
        metadata=_metadata(adapters),
        check=step.check,
        ready=ready,
        progress=progress,
    )
    return replace(merged, notes=(*_notes(step, adapters, merged.shared), *merged.notes))


def _weight_of(rule: weighing.WeightRule, base: Architecture | None, choose: Choose, number: int) -> WeightOf:
    def weight(component: str, module: str) -> float:
        signs = choose(component, module).method.signs or (1.0, 1.0)
        return signs[min(number, 1)] * rule.weight(component, module, base)

    return weight


def _choose(step: Step) -> Choose:
    @cache
    def choose(component: str, module: str) -> Choice:
        setting = step.for_module(component, module)
        return Choice(METHODS[setting.method], setting.space, setting.parameters, setting.rank)

    return choose


def _settings(step: Step, dtype: str | None, device: str, workers: int) -> Settings:
    options = step.options
    return Settings(
        seed=options.get("seed", 0),
        exact_svd=options.get("svd") == "exact",
        tolerance=options.get("svd_tolerance", 1e-5),
        split=options.get("split", "even"),
        saved=options.get("saved", "refuse"),
        allow_disjoint=bool(options.get("allow_disjoint")),
        dtype=api.dtype_named(dtype),
        device=device,
        workers=workers,
    )


def _notes(step: Step, adapters: Sequence[Adapter], shared: int) -> list[str]:
    method, _ = find(step.method, step.space)
    out = []
    plain = all(ref.weight == 1.0 for ref in step.sources)
    if method.sums and plain and shared and method.signs is None:
        share = ",".join(f"{1 / len(adapters):.4g}" for _ in adapters)
        out.append(
            f"weights are 1 each: the adapters' effects add up in the {_modules(shared)} that several have; --weights {share} "
            "takes the mean"
        )
    if method.signs is not None and any(not isinstance(r.weight, Mapping) and r.weight < 0 for r in step.sources[1:]):
        out.append(f"{method.name} turns the sign of every weight but the first: a negative one adds that adapter")
    if method.name == "linear" and len(adapters) > 1:
        out.append(
            "linear adds A's and B's, so the result is not the sum of the adapters' effects; svd and cat give that"
        )
    return out


def _modules(count: int) -> str:
    return "one module" if count == 1 else f"{count} modules"


def _metadata(adapters: Sequence[Adapter]) -> dict[str, str]:
    out = {}
    for name in _KEPT:
        values = {a.metadata[name] for a in adapters if name in a.metadata}
        if len(values) == 1:
            out[name] = values.pop()
    return out


def _room(output: PathLike | None) -> str:
    """The folder where the output will stand, or the nearest one above it that is there: its disk has the room."""
    place = os.path.dirname(os.path.abspath(os.fspath(output))) if output is not None else os.getcwd()
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    return place


__all__ = ["MergeResult", "Merged", "Run", "combine", "content_hash", "merge", "recipe_of", "run"]
