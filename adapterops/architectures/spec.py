"""What the table of a base model says of one module."""

from __future__ import annotations

from typing import NamedTuple

Piece = tuple[str, int, int]
"""A canonical module, and the rows [start, stop) of its weight."""


class ModuleSpec(NamedTuple):
    """A module of a base model that owns a parameter or a buffer."""

    name: str
    """Canonical dotted name inside its component; "" for what the component's root owns."""
    original: str
    """The name in the authors' own repository; the canonical name where that is not known, "" where it has no such
    module (its weight is part of a fused one)."""
    shape: tuple[int, ...]
    """Of `weight`: (out, in), (out, in, *kernel), (num_embeddings, dim), (channels,); () without a `weight`.

    A grouped convolution's `in` is that of one group, as torch stores it.
    """
    kind: str
    """linear, conv, embedding, norm or other."""
    bias: bool
    transposed: bool = False
    """The weight is stored as (in, out), as GPT-2's Conv1D does; `shape` is still (out, in)."""
    tied_to: str | None = None
    """The module that owns this module's `weight`, where it is shared."""
    params: tuple[str, ...] = ("weight",)
    """The names of the parameters and buffers that the module owns itself."""
    joins: tuple[Piece, ...] = ()
    """For a fused module: the canonical modules, and which of their rows, that make up its rows, in order."""
    partial: bool = False
    """For a fused module: whether it is only some rows of the authors' own, named by dialects with a tail for them."""
    widens: bool = False
    """Whether adapters may give it more inputs than the base has (Flux.1's control adapters widen `x_embedder`)."""
