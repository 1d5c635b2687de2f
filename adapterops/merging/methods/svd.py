"""The weighted sum of deltas, exact at the rank of the sum and the best approximation at any smaller one.

Source: Eckart and Young (1936); peft `add_weighted_adapter`, combination type "svd".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterops.merging.registry import Kind, merge_method

if TYPE_CHECKING:
    import torch


@merge_method(
    "svd",
    kind=Kind.SPAN,
    summary="the weighted sum of the deltas, exact where the rank allows, else the best of that rank",
    source="peft tuners/lora/model.py: add_weighted_adapter",
    sums=True,
)
def svd(gram: torch.Tensor, weights: Sequence[float]) -> Sequence[float]:
    """The weights themselves."""
    return weights


@merge_method(
    "subtract",
    kind=Kind.SPAN,
    summary="the first adapter minus the others (task negation), exact where the rank allows",
    source="https://arxiv.org/abs/2212.04089",
    signs=(1.0, -1.0),
    sums=True,
)
def subtract(gram: torch.Tensor, weights: Sequence[float]) -> Sequence[float]:
    """The weights themselves; those of all adapters but the first come negated (`signs`)."""
    return weights
