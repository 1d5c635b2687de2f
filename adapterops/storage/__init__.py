"""Lazy tensors, containers, and output that appears whole or not at all."""

from adapterops.storage.source import Source, open_source
from adapterops.storage.tensor import LazyTensor, scalar

__all__ = ["LazyTensor", "Source", "open_source", "scalar"]
