"""Tensors and low-rank pairs for the tests of merge methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapterops.linalg.lowrank import Pair
from adapterops.linalg.random import Draw
from adapterops.merging.stack import TensorStack

HEIGHTS = (0, 1, 5)
"""Rows of a block: all of them, and two that do not divide most shapes."""


def tensors(count: int, rows: int = 12, columns: int = 20, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator) for _ in range(count)]


def draws(count: int, seed: int = 0) -> list[Draw]:
    return [Draw("test", seed, k) for k in range(count)]


def stack(
    values: Sequence[torch.Tensor], weights: Sequence[float] | None = None, rows: int = 0, seed: int = 0
) -> TensorStack:
    return TensorStack(values, weights or [1.0] * len(values), draws(len(values), seed), rows)


def pairs(ranks: Sequence[int], rows: int = 18, columns: int = 14, seed: int = 0) -> list[Pair]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(rows, rank, generator=generator, dtype=torch.float64),
            torch.randn(rank, columns, generator=generator, dtype=torch.float64),
        )
        for rank in ranks
    ]


def product(pair: Pair) -> torch.Tensor:
    return pair[0] @ pair[1]
