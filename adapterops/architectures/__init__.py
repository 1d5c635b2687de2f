"""Base models as tables of modules: canonical names, shapes, and the names other code bases give them.

`load(name)` gives a built-in architecture, `from_config(path)` that of any diffusers or transformers model.
Importing this package imports neither torch nor numpy.
"""

from __future__ import annotations

import os

from adapterops.architectures.errors import BadBaseConfig, UnknownArchitecture
from adapterops.architectures.layout import LAYOUTS, published
from adapterops.architectures.table import Architecture, Component, ModuleSpec, load, names


def from_config(path: str | os.PathLike[str]) -> Architecture:
    """The architecture of any diffusers or transformers model, from its config: `architectures.base.from_config`."""
    from adapterops.architectures.base import from_config as build  # with it comes what only `--base` needs

    return build(path)


__all__ = [
    "LAYOUTS",
    "Architecture",
    "BadBaseConfig",
    "Component",
    "ModuleSpec",
    "UnknownArchitecture",
    "from_config",
    "load",
    "names",
    "published",
]
