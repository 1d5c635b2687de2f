"""What the arguments of `merge` and `combine` mean: a recipe of one step, or the recipe that they name."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from adapterops.adapter import Adapter
from adapterops.errors import UsageError
from adapterops.loading import PathLike
from adapterops.merging import weights as weighing
from adapterops.merging.recipe import Recipe, build
from adapterops.merging.recipe import load as load_recipe
from adapterops.merging.registry import METHODS, find
from adapterops.merging.steps import FLAGS, OPTIONS, TEXTS

_AS_IN_RECIPES = {"format": "from", "fields": "set"}
"""What recipes and the command line call the arguments of `load`, where that is something else."""

Weights = Sequence[float | Mapping[str, Any]] | PathLike | None
"""A number an adapter, or a mapping as in a weights file; or the path of one."""


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
    # The command line says False of every flag that is not there.
    given = {n: _plain(v) for n, v in parameters.items() if v is not None and not (v is False and n in FLAGS)}
    read_with = {_AS_IN_RECIPES.get(n, n): _plain(v) for n, v in (reading or {}).items() if v is not None}
    if recipe is not None:
        stated = {"sources": sources, "method": method, "weights": weights is not None, "space": space}
        _insist_on_recipe_alone([*(name for name, value in stated.items() if value), *given, *read_with])
        found = _named(recipe)
    else:
        found = _one_step(_paths(sources, method), method or "", weights, space, read_with, given)
    own = {name: value for name, value in (output or {}).items() if value is not None}
    return replace(found, output={**found.output, **own})


def _insist_on_recipe_alone(stated: Sequence[str]) -> None:
    if stated:
        raise UsageError(
            f"--recipe says it all; {', '.join(stated)} would contradict it: change the recipe instead (--print-recipe "
            "writes it out)"
        )


def _named(recipe: PathLike | Recipe | Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, Mapping):
        return build(recipe, "recipe")
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _paths(sources: Sequence[PathLike], method: str | None) -> list[PathLike]:
    """The sources, where they and a method are given."""
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
    for number, source in enumerate(sources, 1):
        if not os.fspath(source).strip():
            raise UsageError(
                f"adapter {number} of {len(sources)} has an empty name (a shell's variable that is not set?)"
            )
    return sources


def _one_step(
    sources: Sequence[PathLike],
    method: str,
    weights: Weights,
    space: str | None,
    read_with: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Recipe:
    """A recipe of one step; what is wrong with it is told as of options, and not as of a recipe."""
    found, _ = find(method, space)
    unknown = {name: value for name, value in given.items() if name not in (*OPTIONS, *FLAGS, *TEXTS)}
    found.settle(unknown)
    rules = _rules(weights, len(sources))
    described: list[dict[str, Any]] = [{"path": os.fspath(path), **read_with} for path in sources]
    if weights is not None:
        described = [{**item, "weight": rule.data()} for item, rule in zip(described, rules, strict=True)]
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
