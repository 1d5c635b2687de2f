"""DoRA's magnitude on any delta: W' = m · (W + ΔW) / ‖W + ΔW‖, the norm taken over the axes that m has not.

Sources: DoRA https://arxiv.org/abs/2402.09353; peft `tuners/lora/dora.py`; LyCORIS `lycoris/modules/locon.py`
(`apply_weight_decompose`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter

if TYPE_CHECKING:
    import torch


def normalised(update: Update, weight: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W' − W (float32, W's shape), and the factor on each output where the magnitude is per output; 0 where W + ΔW is 0.

    Raises `BrokenAdapter` for a magnitude of another size than the axis that it is for.
    """
    import torch

    base = weight.double()
    total = base + delta.double().reshape(base.shape)
    per_output = update.options["dora_axis"] == "out"
    # An embedding's outputs are its second axis.
    axis = int(per_output == (update.options.get("kind") == "embedding"))
    tensor = update.tensors["magnitude"]
    if tensor.numel != total.shape[axis]:
        raise BrokenAdapter(
            f"{tensor.where}: {tensor.numel} magnitudes, but the base's weight {list(total.shape)} has {total.shape[axis]} "
            f"{'outputs' if per_output else 'inputs'}: it is another model's"
        )
    magnitude = tensor.torch().double().reshape(-1)
    norm = total.square().sum([i for i in range(total.dim()) if i != axis]).sqrt()
    factor = torch.where(norm > 0, magnitude / norm, torch.zeros_like(norm))
    spread = [-1 if i == axis else 1 for i in range(total.dim())]
    return (total * factor.reshape(spread) - base).float(), factor if per_output else None
