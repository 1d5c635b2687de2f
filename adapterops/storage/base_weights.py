"""The weights of a base model, one module's at a time, for what depends on them (DoRA).

A base is a file, a folder with one set of weights (shards and their index included), or a pipeline's folder with one
subfolder a component, as transformers and diffusers save them; or an authors' own checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapterops.errors import UnreadableFile, UsageError
from adapterops.storage.source import Source, open_source
from adapterops.storage.tensor import LazyTensor


@dataclass(frozen=True, slots=True)
class BaseWeights:
    """The tensors of a base model by component; one that serves every component stands under ""."""

    path: str
    parts: Mapping[str, Source]

    def has(self, component: str, names: Iterable[str], parameter: str = "weight") -> bool:
        """Whether a module of one of these names has the parameter, or more than one has."""
        part = self.parts.get(component) or self.parts.get("")
        ends = [f"{name}.{parameter}" for name in names if name]
        return part is not None and any(key == end or key.endswith(f".{end}") for key in part.tensors for end in ends)

    def weight(self, component: str, names: Iterable[str], parameter: str = "weight") -> LazyTensor:
        """The weight (or another parameter) of a module that is called one of `names` (its own name, its authors').

        No byte of it is read.
        A key may have anything in front of the name (`model.`, `model.diffusion_model.`), where only one such key is there.

        Raises `UsageError` where there is none, or more than one.
        """
        part = self.parts.get(component) or self.parts.get("")
        if part is None:
            raise UsageError(
                f"{self.path}: holds no {component} ({', '.join(self.parts)} only), whose weights this adapter needs"
            )
        wanted = [f"{name}.{parameter}" for name in names if name]
        for key in wanted:
            if key in part.tensors:
                return part.tensors[key]
        for key in wanted:
            found = [own for own in part.tensors if own.endswith(f".{key}")]
            if len(found) == 1:
                return part.tensors[found[0]]
            if found:
                raise UsageError(
                    f"{part.path}: {key} may be {found[0]} or {found[1]}; name the one model's own weights"
                )
        raise UsageError(f"{part.path}: has no tensor {wanted[0]}; is it the base model of this adapter?")


def open_base(path: str | os.PathLike[str], components: Iterable[str]) -> BaseWeights:
    """The weights of the base at `path`: what stands there, or in its subfolders called as `components`.

    Raises `UnreadableFile` and its kin for what cannot be read.
    """
    path = os.fspath(path)
    inside = [name for name in components if os.path.isdir(os.path.join(path, name))]
    if inside:
        return BaseWeights(path, {name: open_source(os.path.join(path, name)) for name in inside})
    source = open_source(path)
    if source.parts:
        raise UnreadableFile(f"{path}: holds adapters, not the weights of a base model")
    return BaseWeights(path, {"": source})
