"""A model without weights, made of the modules that an adapter speaks of: enough for peft to find its targets."""

from __future__ import annotations

from math import prod
from typing import Any

from adapterops.adapter import Update
from adapterops.methods import METHODS
from adapterops.validation.subject import Subject

_LARGEST = 1 << 34
"""Elements of a weight.  The meta device holds none of them, but sizes beyond this are no model's."""


class NoSkeleton(Exception):
    """The adapter's tensors do not say what the modules are; a base model's config would."""


def skeleton(subject: Subject) -> Any:
    """The model.  Raises `NoSkeleton` where the adapter's own tensors do not tell a module's kind and size."""
    import torch

    if (subject.config or {}).get("target_modules") == "all-linear":
        raise NoSkeleton("target_modules is all-linear, which asks for the base model; give --base")
    updates = subject.adapter.as_stated() if subject.adapter is not None else []
    if not updates:
        raise NoSkeleton("nothing of the adapter is understood")
    root = torch.nn.Module()
    with torch.device("meta"):
        # Outer modules first: a saved head may hold others.
        for update in sorted(updates, key=lambda u: u.module.count(".")):
            _put(root, update.module.split("."), _module(update))
    return root


def _put(root: Any, path: list[str], made: Any) -> None:
    import torch

    for name in path[:-1]:
        if not hasattr(root, name):
            root.add_module(name, torch.nn.Module())
        root = getattr(root, name)
        if not isinstance(root, torch.nn.Module):
            raise NoSkeleton(f"{'.'.join(path)[:200]!r} cannot be a module's name")
    # What a module owns beside its update (a bias that was saved) is in the module that is there.
    if not hasattr(root, path[-1]):
        try:
            root.add_module(path[-1], made)
        except (KeyError, TypeError) as error:
            raise NoSkeleton(f"{'.'.join(path)[:200]!r} cannot be a module's name") from error


def _module(update: Update) -> Any:
    import torch

    if update.method == "saved":
        shape: tuple[int, ...] | None = update.tensors["weight"].shape if "weight" in update.tensors else None
    elif update.method in ("lora", "loha", "lokr", "adalora", "delora", "gralora"):
        shape = METHODS[update.method].weight_shape(update)
    else:
        shape = None
    if not shape or 0 in shape or prod(shape) > _LARGEST:
        raise NoSkeleton(f"{update.method} on {update.module[:200]!r} does not tell the module's size; give --base")
    if len(shape) == 1:
        return torch.nn.LayerNorm(shape[0])
    if update.options.get("kind") == "embedding":
        return torch.nn.Embedding(shape[1], shape[0])
    if len(shape) == 2:
        return torch.nn.Linear(shape[1], shape[0])
    if len(shape) > 5:
        raise NoSkeleton(f"{update.module[:200]!r} would have a weight of {len(shape)} dimensions")
    kind: Any = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[len(shape) - 3]
    return kind(shape[1], shape[0], shape[2:])
