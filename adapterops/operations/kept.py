"""Computed tensors, kept on disk under no name until they are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from adapterops.errors import CannotRepresent
from adapterops.storage import dtypes
from adapterops.storage.spool import Spool
from adapterops.storage.tensor import TORCH_NAMES, LazyTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Keeper:
    """Takes tensors and gives lazy ones back."""

    spool: Spool

    def keep(self, key: str, values: torch.Tensor) -> LazyTensor:
        """The tensor, on disk.  Raises `CannotRepresent` for one that its dtype does not hold."""
        import torch

        kept = values.detach().contiguous()
        dtype = next(name for name, own in TORCH_NAMES.items() if getattr(torch, own) == kept.dtype)
        place = self.spool.reserve(key, dtype, tuple(kept.shape))
        if kept.numel():
            data = kept.reshape(-1).view(torch.uint8).numpy()
            self.spool.write(place, data.data)
            if dtypes.has_non_finite(dtype, data.tobytes()):
                raise CannotRepresent(
                    f"{key}: {dtype} cannot hold the LoRA's factors: they became NaN or infinity; choose --dtype bfloat16 or "
                    "float32"
                )
        return place
