"""One pass over the bytes of tensors: what rules about values need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapterops.storage import LazyTensor


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the values of one tensor are like."""

    finite: bool


def scan(tensors: Mapping[str, LazyTensor]) -> dict[str, Statistics]:
    """The statistics of every tensor, by key."""
    raise NotImplementedError
