"""The sources of a recipe: the adapters that they mean, what must be true of them, and how the output names them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

from adapterops import api
from adapterops.adapter import Adapter
from adapterops.errors import AdapterOpsError, UnreadableFile, UsageError
from adapterops.merging.content import content_hash
from adapterops.merging.recipe import Recipe, SourceRef, Step


def chosen(ref: SourceRef, recipe: Recipe) -> tuple[SourceRef, Adapter]:
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


def insist_unchanged(step: Step, hashes: Sequence[Future[str] | None]) -> None:
    """Raises `UsageError` where a source is not what the recipe's hash says."""
    for ref, future in zip(step.sources, hashes, strict=True):
        if ref.hash and future is not None and future.result() != ref.hash:
            raise UsageError(
                f"{step.where}: {ref.path} is not what the recipe was run with (its content is {future.result()[:16]}…, and "
                f"was {ref.hash[:16]}…); take the hash out of the recipe (--print-recipe writes it out) to use it as it is now"
            )


def insist_same_base(step: Step, found: str) -> None:
    """Raises `UsageError` where the base's weights are not those of the recipe."""
    stated = step.options.get("base_hash")
    if stated and stated != found:
        raise UsageError(
            f"{step.where}: {step.options['base_weights']} is not the base that the recipe was run with; take base_hash out "
            "of the recipe to use it all the same"
        )


def twins(refs: Sequence[SourceRef]) -> list[str]:
    """A note where two sources are the same adapter: the commonest slip of the hand."""
    seen: dict[str, str] = {}
    out = []
    for ref in refs:
        if ref.hash and ref.hash in seen:
            out.append(f"{seen[ref.hash]} and {ref.path} hold the same adapter")
        seen.setdefault(ref.hash, ref.path)
    return out


def findable(recipe: Recipe, asked: Recipe, home: str) -> Recipe:
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
