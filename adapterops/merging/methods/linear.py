"""PEFT's weighted sum of factors, and the factors one beside the other.

Source: peft `tuners/lora/model.py`, `add_weighted_adapter`, combination types "linear" and "cat".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.merging.registry import Kind, Space, merge_method
from adapterops.merging.stack import Stack, insist_on_float32

if TYPE_CHECKING:
    import torch


@merge_method(
    "linear",
    kind=Kind.ELEMENTS,
    spaces=(Space.FACTORS,),
    summary="PEFT's sum of the A's and of the B's: fast, and not the weighted sum of the deltas (svd and cat are)",
    source="peft tuners/lora/model.py: add_weighted_adapter",
    sums=True,
)
def linear(stack: Stack) -> torch.Tensor:
    """Σ wₖ·xₖ."""
    out = stack.empty()
    for start, stop, values in stack.blocks():
        weighted_sum(values, stack.weights, out[start:stop])
    return out


def weighted_sum(values: list[torch.Tensor], weights: tuple[float, ...], out: torch.Tensor) -> None:
    """Σ wₖ·xₖ into `out`."""
    import torch

    insist_on_float32(weights)
    torch.mul(values[0], weights[0], out=out)
    for value, weight in zip(values[1:], weights[1:], strict=True):
        out.add_(value, alpha=weight)


@merge_method(
    "cat",
    kind=Kind.STACKED,
    summary="the factors one beside the other: exactly the weighted sum of the deltas, at the sum of the ranks",
    source="peft tuners/lora/model.py: add_weighted_adapter",
    sums=True,
)
def cat() -> None:
    """The engine stacks the factors; there is nothing to compute."""
