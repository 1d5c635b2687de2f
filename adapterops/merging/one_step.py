"""One step of a recipe: its method, weights and options as the engine takes them, and what the user should know of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from adapterops import api
from adapterops.adapter import Adapter
from adapterops.architectures import Architecture
from adapterops.errors import UsageError
from adapterops.merging import bases
from adapterops.merging.modules import WeightOf
from adapterops.merging.registry import METHODS, find
from adapterops.merging.run import Merged, Progress, combine, nothing
from adapterops.merging.settings import Choice, Choose, Settings
from adapterops.merging.steps import Step
from adapterops.merging.weights import WeightRule
from adapterops.strength import insist_on_alphas, notes_on_alphas

_KEPT = ("ss_base_model_version", "ss_sd_model_name", "ss_sd_model_hash", "ss_new_sd_model_hash", "ss_v2",
         "modelspec.architecture", "modelspec.implementation", "modelspec.sai_model_spec", "modelspec.prediction_type",
         "modelspec.resolution")  # fmt: skip
"""Header entries about the base model: kept where no adapter says otherwise.  What is about one training is not."""


@dataclass(frozen=True, slots=True)
class Workshop:
    """Where and how a step is worked on, and who is told of it."""

    dtype: str | None = None
    """What is written; None: the widest type of the sources."""
    device: str = "auto"
    workers: int = 0
    folder: str = ""
    """Whose disk has the room for what is computed; "": the system's for temporary files."""
    progress: Progress = nothing


def run_step(
    step: Step,
    adapters: Sequence[Adapter],
    shop: Workshop,
    base_weights: str = "",
    ready: Callable[[Adapter], None] | None = None,
) -> Merged:
    """Merge the adapters as the step says; `ready` is shown what will come out before it is computed.

    Raises `UsageError` where the method takes another number of adapters, and what the engine raises.
    """
    method, _ = find(step.method, step.space)
    if method.adapters is not None and len(adapters) != method.adapters:
        raise UsageError(f"--method {step.method} merges {method.adapters} adapters, and {len(adapters)} are given")
    for adapter in adapters:
        insist_on_alphas(adapter)
    _, base = bases.common_base(adapters)
    rules = [ref.rule for ref in step.sources]
    modules = [{(u.component, u.module) for u in adapter} for adapter in adapters]
    for rule, own in zip(rules, modules, strict=True):
        rule.check(sorted(own), base)
    choose = _choose(step)
    weights = [_weight_of(rule, base, choose, n) for n, rule in enumerate(rules)]
    merged = combine(
        adapters,
        weights,
        choose,
        _settings(step, shop),
        folder=shop.folder,
        base_weights=base_weights,
        metadata=_metadata(adapters),
        check=step.check,
        ready=ready,
        progress=shop.progress,
    )
    scales = [f"{adapter.provenance.path}: {note}" for adapter in adapters for note in notes_on_alphas(adapter)]
    idle = _idle(step.options, [choose(*module) for module in sorted(set().union(*modules))])
    return replace(merged, notes=(*_notes(step, adapters, merged.shared), *idle, *merged.notes, *scales))


def _weight_of(rule: WeightRule, base: Architecture | None, choose: Choose, number: int) -> WeightOf:
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


def _settings(step: Step, shop: Workshop) -> Settings:
    options = step.options
    return Settings(
        seed=options.get("seed", 0),
        exact_svd=options.get("svd") == "exact",
        tolerance=options.get("svd_tolerance", 1e-5),
        split=options.get("split", "even"),
        saved=options.get("saved", "refuse"),
        allow_disjoint=bool(options.get("allow_disjoint")),
        dtype=api.dtype_named(shop.dtype),
        device=shop.device,
        workers=shop.workers,
    )


def _notes(step: Step, adapters: Sequence[Adapter], shared: int) -> list[str]:
    method, _ = find(step.method, step.space)
    out = []
    plain = not any(ref.weighed or ref.weight != 1.0 for ref in step.sources)
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


def _idle(options: Mapping[str, object], choices: Sequence[Choice]) -> list[str]:
    """Notes on options that were given and do nothing here."""
    names = ", ".join(dict.fromkeys(choice.method.name for choice in choices))
    out = []
    if "seed" in options and not any(_draws(choice) for choice in choices):
        out.append(f"--seed changes nothing: {names} draws nothing at random")
    given = [f"--{name.replace('_', '-')}" for name in ("svd", "svd_tolerance", "split") if name in options]
    if given and all(choice.method.keeps_factors(choice.space) for choice in choices):
        change = "changes" if len(given) == 1 else "change"
        out.append(f"{', '.join(given)} {change} nothing: {names} keeps the factors, and decomposes nothing")
    return out


def _draws(choice: Choice) -> bool:
    inner = METHODS.get(choice.parameters.get("inner", ""))
    return choice.method.random or (inner is not None and inner.random)


def _modules(count: int) -> str:
    return "one module" if count == 1 else f"{count} modules"


def _metadata(adapters: Sequence[Adapter]) -> dict[str, str]:
    out = {}
    for name in _KEPT:
        values = {a.metadata[name] for a in adapters if name in a.metadata}
        if len(values) == 1:
            out[name] = values.pop()
    return out
