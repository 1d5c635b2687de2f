"""Weighted sums of sparse tensors: the largest entries of each (magnitude pruning), or random ones (DARE).

Source: https://arxiv.org/abs/2311.03099 (DARE), and peft `utils/merge_utils.py`: `magnitude_prune`, `dare_linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adapterops.linalg.trimming import find_cut, trim_
from adapterops.merging.methods.linear import weighted_sum
from adapterops.merging.parameters import DENSITY
from adapterops.merging.registry import Kind, Space, merge_method
from adapterops.merging.stack import Stack

if TYPE_CHECKING:
    import torch


@merge_method(
    "magnitude_prune",
    kind=Kind.ELEMENTS,
    spaces=(Space.FACTORS, Space.DELTA),
    summary="the weighted sum of each adapter's largest entries",
    source="peft utils/merge_utils.py: magnitude_prune",
    parameters=(DENSITY,),
    sums=True,
    aliases={"magnitude_prune_svd": Space.DELTA},
)
def magnitude_prune(stack: Stack, *, density: float) -> torch.Tensor:
    """Σ wₖ·xₖ, each xₖ trimmed to its ⌊density·size⌋ largest entries."""
    blocks = trimmed_blocks(stack, density)
    out = stack.empty()
    for start, stop, values in blocks:
        weighted_sum(values, stack.weights, out[start:stop])
    return out


@merge_method(
    "dare_linear",
    kind=Kind.ELEMENTS,
    spaces=(Space.FACTORS, Space.DELTA),
    summary="the weighted sum of random entries of each adapter, rescaled so that the mean stays",
    source="https://arxiv.org/abs/2311.03099; peft utils/merge_utils.py: dare_linear",
    parameters=(DENSITY,),
    sums=True,
    aliases={"dare_linear_svd": Space.DELTA},
    random=True,
)
def dare_linear(stack: Stack, *, density: float) -> torch.Tensor:
    """Σ wₖ·xₖ, each entry of xₖ kept with probability `density` and divided by it."""
    out = stack.empty()
    rescaled = tuple(weight / min(density, 1.0) for weight in stack.weights)
    for start, stop, values in stack.blocks():
        drop_randomly_(stack, start, stop, values, density)
        weighted_sum(values, rescaled, out[start:stop])
    return out


def trimmed_blocks(stack: Stack, density: float) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """The stack's blocks, each tensor trimmed to exactly ⌊density·size⌋ entries, the largest ones.

    PEFT's number; of entries that tie, the first ones in row-major order (PEFT leaves open which).  Looks at the whole
    tensors when called, and at the blocks as they are asked for.
    """
    rows, columns = stack.shape
    keep = int(density * (rows * columns))
    cuts = [find_cut(stack.whole(k), keep) for k in range(len(stack))] if density < 1 else []

    def trimmed() -> Iterator[tuple[int, int, list[torch.Tensor]]]:
        for start, stop, values in stack.blocks():
            for value, cut in zip(values, cuts, strict=False):
                trim_(value, cut, start * columns)
            yield start, stop, values

    return trimmed()


def drop_randomly_(stack: Stack, start: int, stop: int, values: list[torch.Tensor], density: float) -> None:
    """Zero what the stack's random masks do not keep, in place; nothing is rescaled."""
    import torch

    if density >= 1:
        return
    for k, value in enumerate(values):
        value.mul_(stack.keep(k, start, stop, density).view(torch.uint8))
