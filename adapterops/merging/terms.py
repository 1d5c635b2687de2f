"""What each adapter contributes to a module: its weight delta as a term of the merge.

A term is a matrix (out, in · kernel); an embedding's is (dim, tokens).  It has exact low-rank factors where its method
has, and rows in any case; neither is made before it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, NamedTuple

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent, UsageError
from adapterops.merging.finite import is_finite
from adapterops.methods import METHODS
from adapterops.methods.products import Rows
from adapterops.proof import check_finite

if TYPE_CHECKING:
    import numpy as np
    import torch

    from adapterops.linalg.lowrank import Pair


class Shape(NamedTuple):
    """The shape that a module's weight has according to its updates."""

    sizes: tuple[int, ...]
    """(out, in, *kernel); an embedding's is (dim, tokens)."""

    @property
    def rows(self) -> int:
        """Of the matrix."""
        return self.sizes[0]

    @property
    def columns(self) -> int:
        """Of the matrix: in · kernel."""
        return prod(self.sizes[1:])


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter's delta on one module.

    `pieces` are the rows of `update`'s module that this one has, where that is a fused projection and this is one of its
    parts.  `foreign` replaces the update's own delta: one that was folded against the base.  `beside` is what the adapter
    does to the same module by other updates (LyCORIS keeps what a low rank left over in a sparse matrix): one delta, to a
    merge.
    """

    adapter: int
    weight: float
    update: Update
    pieces: Sequence[tuple[int, int]] | None = None
    foreign: Rows | None = None
    beside: tuple[Term, ...] = ()

    @property
    def scale(self) -> float:
        """What the factors of `pair` are multiplied by, the user's weight aside."""
        if self.beside:
            return 1.0
        scale = METHODS[self.update.method].scale(self.update)
        return 1.0 if scale is None else scale

    @property
    def where(self) -> str:
        """The file and the tensor that a message names."""
        return next(iter(self.update.tensors.values())).where

    @property
    def kind(self) -> str:
        """What it is, for messages."""
        if self.foreign is not None:
            return "DoRA folded against the base"
        return " and ".join([self.update.method, *(term.kind for term in self.beside)])

    @property
    def whole(self) -> bool:
        """Whether it is nothing but whole differences, which merge as such."""
        return self.update.method == "diff" and all(term.whole for term in self.beside)

    @property
    def plain(self) -> bool:
        """Whether the update is LoRA, whose factors are what its tensors are."""
        whole = self.foreign is None and not self.beside
        return whole and self.update.method == "lora" and "mid" not in self.update.tensors

    @property
    def shape(self) -> Shape:
        """Of its matrix."""
        sizes = METHODS[self.update.method].weight_shape(self.update)
        assert sizes is not None
        return Shape((self._count, *sizes[1:]) if self.pieces is not None else sizes)

    @property
    def _count(self) -> int:
        return sum(stop - start for start, stop in self.pieces or ())

    @property
    def rank(self) -> int | None:
        """The rank that its file gives it; None where it has none (a whole difference, a LoKr of whole factors)."""
        return METHODS[self.update.method].rank(self.update)

    @property
    def exact_rank(self) -> int | None:
        """The rank of the factors that `pair` gives; None where it gives none."""
        own = None if self.foreign is not None else METHODS[self.update.method].exact_rank(self.update)
        others = [term.exact_rank for term in self.beside]
        return None if own is None or None in others else own + sum(rank for rank in others if rank is not None)

    def pair(self) -> Pair | None:
        """B and A, the scale aside, as `Method.low_rank` gives them.  Raises `BrokenAdapter` for NaN and infinity."""
        if self.exact_rank is None:
            return None
        if self.beside:
            return _side_by_side([replace(self, beside=()), *self.beside])
        found = None if self.foreign is not None else METHODS[self.update.method].low_rank(self.update)
        if found is None:
            return None
        b, a = found
        for factor in (b, a):
            insist_finite(factor, self)
        if self.pieces is not None:
            import torch

            b = torch.cat([b[start:stop] for start, stop in self.pieces])
        return b, a

    def matrix(self) -> Rows:
        """Its rows, the scale included."""
        if self.beside:
            return _sum([term.matrix() for term in (replace(self, beside=()), *self.beside)])
        check_finite([self.update])
        whole = self.foreign or METHODS[self.update.method].matrix(self.update)
        if self.pieces is None:
            return whole
        return _some_rows(whole, self.pieces, self._count)


def _side_by_side(terms: Sequence[Term]) -> Pair:
    import torch

    pairs = [(pair, term.scale) for term in terms if (pair := term.pair()) is not None]
    b = torch.cat([pair[0].double() * scale for pair, scale in pairs], dim=1)
    return b, torch.cat([pair[1].double() for pair, _ in pairs], dim=0)


def _sum(parts: Sequence[Rows]) -> Rows:
    def at(start: int, stop: int) -> np.typing.NDArray[np.float64]:
        total = parts[0].at(start, stop).copy()
        for part in parts[1:]:
            total += part.at(start, stop)
        return total

    return Rows(parts[0].shape, at)


def _some_rows(whole: Rows, pieces: Sequence[tuple[int, int]], count: int) -> Rows:
    import numpy as np

    index = np.concatenate([np.arange(start, stop) for start, stop in pieces])

    def at(start: int, stop: int) -> np.typing.NDArray[np.float64]:
        wanted = index[start:stop]
        # Pieces are ranges: what is asked for lies close together, and is mostly one of them.
        low, high = int(wanted.min()), int(wanted.max()) + 1
        if high - low == len(wanted):
            rows: np.typing.NDArray[np.float64] = whole.at(low, high)[wanted - low]
            return rows
        return np.concatenate([whole.at(int(row), int(row) + 1) for row in wanted])

    return Rows((count, whole.shape[1]), at)


def insist_finite(values: torch.Tensor, term: Term) -> None:
    """Raise `BrokenAdapter` where a tensor of the term's update holds NaN or infinity."""
    if not is_finite(values):
        raise BrokenAdapter(
            f"{term.where}: holds NaN or infinity ({term.update.name}); the training broke, or the file did: "
            "use an earlier checkpoint"
        )


def common_shape(terms: Sequence[Term]) -> Shape:
    """The one shape of all terms: the one that says most of a kernel that others keep flattened.

    Raises `UsageError` where their matrices have different sizes.
    """
    best = max(terms, key=lambda term: len(term.shape.sizes))
    shape = best.shape
    for term in terms:
        other = term.shape
        if (other.rows, other.columns) != (shape.rows, shape.columns):
            raise UsageError(
                f"{term.where}: {term.update.name} is {list(other.sizes)} here and {list(shape.sizes)} in "
                f"{best.update.tensors[next(iter(best.update.tensors))].source.path}: the adapters are for different base "
                "models, and cannot be merged"
            )
    kinds = {term.update.options.get("kind") == "embedding" for term in terms}
    if len(kinds) > 1:
        raise CannotRepresent(
            f"{terms[0].update.name}: one adapter changes it as an embedding (lora_embedding_A), another as a matrix; "
            "convert them to one format first"
        )
    return shape
