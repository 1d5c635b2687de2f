"""Recipes: merges written down, to be run again.

A recipe is a YAML or JSON file that people write, or the header entry `adapterops_recipe` that a merge leaves in its
output.  Its steps run in order; a source is a file, a folder, an `hf://` name, or an earlier step; the last step is the
result:

    adapterops: 1
    steps:
      - name: style
        method: dare_ties
        sources:
          - path: a.safetensors
            weight: 1.0                  # or the mapping of a weights file (weights.py)
          - path: b.safetensors
            alpha: 8                     # options of the reading, as on the command line
        density: 0.5                     # parameters of the method, and options of the run
        seed: 7
        patterns:                        # globs over component.module, or the module's name; the last that fits wins
          "text_encoder*": {method: svd, rank: 32}
      - method: svd
        rank: 16
        sources: [{step: style, weight: 0.7}, c.safetensors]
    output: {to: peft, path: merged, dtype: bfloat16}

The keys of a lone step may stand at the top.  What a pattern may set: `method`, `space`, `rank`, and parameters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adapterops.errors import UsageError
from adapterops.merging import document, written
from adapterops.merging.steps import Pattern, Setting, SourceRef, Step

__all__ = ["HEADER_ENTRY", "VERSION", "Pattern", "Recipe", "Setting", "SourceRef", "Step", "build", "load"]

HEADER_ENTRY = "adapterops_recipe"
VERSION = 1
_TOP = ("adapterops", "steps", "output")
_OUTPUT = ("to", "path", "dtype", "fold_alpha")


@dataclass(frozen=True, slots=True)
class Recipe:
    """Merges, in the order in which they run; the last one's result is the recipe's."""

    steps: tuple[Step, ...]
    output: Mapping[str, Any] = field(default_factory=dict)
    """`to`, `path` and `dtype`, where they are given, and whether to `fold_alpha`."""
    folder: str = field(default="", compare=False)
    """Of the file that it was read from."""

    def located(self, path: str) -> str:
        """Where a path of the recipe leads: as it is written, where that exists, else from the recipe's own folder, or from
        the one around it (a recipe may stand in a folder that was written beside its sources)."""
        return next(iter(self.places(path)), path)

    def places(self, path: str) -> list[str]:
        """All that a path of the recipe may mean, what `located` takes first."""
        if path.startswith("hf://"):
            return [path]
        beside = (os.path.join(folder, path) for folder in (self.folder, os.path.dirname(os.path.abspath(self.folder))))
        found: dict[str, str] = {}
        for place in (path, *beside):
            if os.path.lexists(place):
                found.setdefault(os.path.realpath(place), place)
        return list(found.values())

    def dump(self) -> dict[str, Any]:
        """The recipe as canonical JSON data: the same for the same recipe, its keys sorted.  `build` reads it."""
        canonical: dict[str, Any] = _sorted(self._data())
        return canonical

    def to_header(self) -> str:
        """What a merge writes into its output's header, under `HEADER_ENTRY`."""
        return json.dumps(self.dump(), sort_keys=True, separators=(",", ":"), allow_nan=False)

    def to_yaml(self) -> str:
        """The recipe as people write it."""
        data = self._data()
        for step in data["steps"]:
            for holder in (step, *(source.get("weight") for source in step["sources"])):
                if isinstance(holder, dict) and "patterns" in holder:
                    holder["patterns"] = dict(holder["patterns"])
        return document.to_yaml(data)

    def _data(self) -> dict[str, Any]:
        out: dict[str, Any] = {"adapterops": VERSION, "steps": [step.data() for step in self.steps]}
        return out | ({"output": dict(self.output)} if self.output else {})


def load(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a YAML or JSON file, or in the header of what a merge wrote (.safetensors, a folder, `hf://`).

    Raises `UnreadableFile` where there is no such file, `UsageError` for everything that is wrong in it, naming the
    file, the step and the key.
    """
    path = os.fspath(path)
    if path.startswith("hf://") or path.lower().endswith((".safetensors", ".safetensors.index.json")):
        return _from_header(path, "" if path.startswith("hf://") else os.path.dirname(path))
    if os.path.isdir(path):
        return _from_header(path, path)
    return build(document.read(path), path, os.path.dirname(path))


def build(data: Any, where: str, folder: str = "") -> Recipe:
    """A recipe from plain data, such as `Recipe.dump` gives.  Raises `UsageError`, which begins with `where`."""
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}: is no recipe, which is a mapping with steps, or with method and sources")
    version = data.get("adapterops", VERSION)
    if isinstance(version, bool) or version != VERSION:
        raise UsageError(
            f"{where}: adapterops: {version!r} is no version of recipes that is known here, only {VERSION} is"
        )
    if "steps" in data:
        document.insist_on_keys(data, _TOP, where)
        listed = data["steps"]
        if not isinstance(listed, list) or not listed:
            raise UsageError(f"{where}: steps: must be a list of at least one step")
    else:
        listed = [{key: value for key, value in data.items() if key not in _TOP}]
        if not listed[0]:
            raise UsageError(f"{where}: holds no steps, nor the method and sources of a lone one")
    steps: list[Step] = []
    for n, item in enumerate(listed, 1):
        steps.append(written.step(item, f"{where}: step {n}", [step.name for step in steps if step.name]))
    _insist_on_use(steps)
    return Recipe(tuple(steps), _output(data["output"], f"{where}: output") if "output" in data else {}, folder)


def _from_header(path: str, folder: str) -> Recipe:
    from adapterops.storage.source import open_source

    source = open_source(path)
    opened = list(source.parts.values()) or [source]
    texts = {part.metadata[HEADER_ENTRY] for part in opened if HEADER_ENTRY in part.metadata}
    if not texts:
        raise UsageError(
            f"{path}: its header has no {HEADER_ENTRY}, so no merge with adapterops wrote it; name a recipe"
        )
    if len(texts) > 1:
        raise UsageError(f"{path}: its subfolders hold different recipes; name one of them")
    where = f"{path}: header entry {HEADER_ENTRY}"
    found = build(document.parse_json(texts.pop(), where), where, folder)
    # Where to write is the user's to say, not a stranger's header's.
    return replace(found, output={key: value for key, value in found.output.items() if key != "path"})


def _insist_on_use(steps: list[Step]) -> None:
    used = {source.step for step in steps for source in step.sources}
    for step in steps[:-1]:
        if not step.name:
            raise UsageError(f"{step.where}: has no name, so no later step can use its result; give it one")
        if step.name not in used:
            raise UsageError(
                f"{step.where}: no later step uses its result; refer to it (step: {step.name}), or remove it"
            )


def _output(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}: must be a mapping of {', '.join(_OUTPUT)}")
    document.insist_on_keys(data, _OUTPUT, where)
    out: dict[str, Any] = {}
    for key in (key for key in _OUTPUT if key in data):
        read = written.flag if key == "fold_alpha" else document.text
        out[key] = read(data[key], f"{where}: {key}")
    return out


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(item) for item in value] if isinstance(value, list) else value
