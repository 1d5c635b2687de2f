"""Base models as tables of modules: canonical names, shapes, and the names other code bases give them.

`load(name)` gives a built-in architecture, `from_config(path)` that of any diffusers or transformers model,
`from_weights(path)` that of a checkpoint.
Importing this package imports neither torch nor numpy.
"""

from __future__ import annotations

import os

from adapterops.architectures.errors import BadBaseConfig, UnknownArchitecture
from adapterops.architectures.layout import LAYOUTS, published
from adapterops.architectures.spec import ModuleSpec
from adapterops.architectures.table import Architecture, Component, beginnings_of, load, names, parts_of

_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt")


def from_config(path: str | os.PathLike[str]) -> Architecture:
    """The architecture of any diffusers or transformers model, from its config: `architectures.base.from_config`."""
    from adapterops.architectures.base import from_config as build  # with it comes what only `--base` needs

    return build(path)


def from_weights(path: str | os.PathLike[str]) -> Architecture:
    """The architecture that a checkpoint's keys and shapes tell: `architectures.weights.from_weights`."""
    from adapterops.architectures.weights import from_weights as read  # with it comes what only `--base` needs

    return read(path)


def from_base(path: str | os.PathLike[str]) -> Architecture:
    """The architecture that `--base` names: a config, a folder that has one, or else the weights (a file of them, a folder, or
    `hf://owner/repo`), of which only the header is read.

    Raises `BadBaseConfig` for what is neither, and what opening weights raises.
    """
    name = os.fspath(path)
    if name.startswith("hf://") or name.lower().endswith(_WEIGHTS) or _holds_weights_alone(name):
        return from_weights(name)
    return from_config(path)


def _holds_weights_alone(folder: str) -> bool:
    """Whether a folder, or a subfolder of it, holds weights, and none a config."""
    if not os.path.isdir(folder):
        return False
    inside = [entry.path for entry in os.scandir(folder) if entry.is_dir()]
    names = [name for place in (folder, *inside) for name in os.listdir(place)]
    return not {"config.json", "model_index.json"} & set(names) and any(n.lower().endswith(_WEIGHTS) for n in names)


__all__ = [
    "LAYOUTS",
    "Architecture",
    "BadBaseConfig",
    "Component",
    "ModuleSpec",
    "UnknownArchitecture",
    "beginnings_of",
    "from_base",
    "from_config",
    "from_weights",
    "load",
    "names",
    "parts_of",
    "published",
]
