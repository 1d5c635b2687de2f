"""The shapes in which tensors are stored: with a kernel's dimensions or without them, a magnitude as a vector or a column."""

from __future__ import annotations

from adapterops.adapter import Update
from adapterops.architectures import Architecture, ModuleSpec
from adapterops.dialects.table import Dialect
from adapterops.errors import CannotRepresent
from adapterops.storage import LazyTensor


def as_usual(update: Update, architecture: Architecture | None) -> bool:
    """Whether the factors have the module's dimensions and nothing else has a shape that could be another's."""
    if update.method != "lora":
        return "magnitude" not in update.tensors
    dims = _dimensions(update, architecture)
    return "magnitude" not in update.tensors and all(
        len(update.tensors[role].shape) == dims for role in ("A", "B") if role in update.tensors
    )


def shaped(
    dialect: Dialect, update: Update, role: str, tensor: LazyTensor, architecture: Architecture | None
) -> LazyTensor:
    """The tensor in the shape that the dialect's readers expect; bytes never change."""
    if role == "magnitude":
        dims = _dimensions(update, architecture)
        return tensor.reshape(_magnitude_shape(dialect, update, dims, tensor.numel))
    if update.method != "lora":
        return tensor
    dims = _dimensions(update, architecture)
    if role in ("A", "B") and dialect.exact_shapes and dims != len(tensor.shape):
        spec = spec_of(update, architecture)
        if role == "B":
            return tensor.reshape((*tensor.shape[:2], *(1,) * (dims - 2)))
        kernel = spec.shape[2:] if spec is not None and dims > 2 else ()
        inputs = spec.shape[1] if spec is not None and dims > 2 else tensor.numel // tensor.shape[0]
        return tensor.reshape((tensor.shape[0], inputs, *kernel))
    return tensor


def spec_of(update: Update, architecture: Architecture | None) -> ModuleSpec | None:
    """The module in the base's table, where it is known."""
    component = architecture.components.get(update.component) if architecture else None
    return component.spec(update.module) if component else None


def _dimensions(update: Update, architecture: Architecture | None) -> int:
    """The number of dimensions of the module's weight: the base's if it is known, else the first factor's."""
    spec = spec_of(update, architecture)
    if spec is not None:
        return len(spec.shape)
    return max(len(t.shape) for role, t in update.tensors.items() if role != "magnitude")


def _magnitude_shape(dialect: Dialect, update: Update, dims: int, size: int) -> tuple[int, ...]:
    if not dialect.vectors:
        return (size, *(1,) * (dims - 1)) if update.options["dora_axis"] == "out" else (1, size, *(1,) * (dims - 2))
    if update.options["dora_axis"] == "in":
        raise CannotRepresent(
            f"{update.name}: its DoRA magnitude is per input (tensor {update.tensors['magnitude'].key!r}); readers of "
            f"{dialect.title} normalise per output only, so no conversion of the tensors is exact"
        )
    return (1, size, *(1,) * (dims - 2)) if dims > 2 else (size,)
