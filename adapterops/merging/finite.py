"""The bytes of computed tensors, and whether they are numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterops.storage import dtypes
from adapterops.storage.tensor import TORCH_NAMES

if TYPE_CHECKING:
    import torch


def data_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor."""
    import torch

    data: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(data) if data.size else memoryview(b"")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a CPU tensor holds neither NaN nor infinity."""
    import torch

    name = next((name for name in dtypes.FLOATS if getattr(torch, TORCH_NAMES[name]) == tensor.dtype), None)
    if name is None:
        return bool(torch.isfinite(tensor).all())
    return not dtypes.has_non_finite(name, data_of(tensor))
