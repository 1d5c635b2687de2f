"""Base models as tables of modules: canonical names, shapes, and the names other code bases give them.

`load(name)` gives a built-in architecture, `from_config(path)` that of any diffusers or transformers model.
Importing this package imports neither torch nor numpy.
"""

from __future__ import annotations

from adapterops.architectures.base import from_config
from adapterops.architectures.errors import BadBaseConfig, UnknownArchitecture
from adapterops.architectures.layout import LAYOUTS, published
from adapterops.architectures.table import Architecture, Component, ModuleSpec, load, names

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
