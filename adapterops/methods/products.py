"""What LoHa and LoKr share: low-rank pairs with or without a Tucker core, and matrices compared a few rows at a time.

A pair is `a` (out, r) and `b` (r, in), `b` with a kernel behind its inputs or flattened into them; with a core `t`
(r, r, *kernel), `a` is (r, out) and `b` (r, in).  Both make a matrix (out, in · kernel).

Source: LyCORIS `lycoris/functional/general.py` (`rebuild_tucker`), `lycoris/modules/loha.py`, `lycoris/modules/lokr.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import need, tensor_error
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]

BLOCK = 1 << 18
"""Numbers of a matrix that are built at a time: 2 MiB of float64."""


class Shape(NamedTuple):
    """What the shapes of a pair say.  `kernel` is empty where there is none or where it is flattened into `inputs`."""

    out: int
    rank: int
    inputs: int
    kernel: tuple[int, ...] = ()

    @property
    def columns(self) -> int:
        """in · kernel."""
        return self.inputs * prod(self.kernel)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a module's weight can have this matrix added; ones and a flattened kernel do not matter."""
        if len(shape) < 2 or self.out != shape[0]:
            return False
        if (self.inputs, prod(self.kernel)) == (shape[1], prod(shape[2:])):
            return True
        return prod(self.kernel) == 1 and self.inputs == prod(shape[1:])


def pair_shape(update: Update, a: str, b: str, core: str) -> Shape:
    """The shape of the pair under these roles (`core` need not be there).

    Raises `BrokenAdapter` where a tensor is missing or the ranks disagree.
    """
    need(update, a, b)
    one, two, t = update.tensors[a], update.tensors[b], update.tensors.get(core)
    for factor in (one, two):
        if len(factor.shape) < 2 or 0 in factor.shape:
            raise BrokenAdapter(
                f"{factor.where}: shape {list(factor.shape)} is no low-rank factor (an unsharded export?)",
                fault="empty" if 0 in factor.shape else "impossible-shape",
            )
    for factor in (one,) if t is None else (one, two):
        if prod(factor.shape[2:]) != 1:
            raise BrokenAdapter(f"{factor.where}: shape {list(factor.shape)}; this factor has no kernel of its own")
    out, rank = one.shape[:2] if t is None else one.shape[1::-1]
    if two.shape[0] != rank:
        raise BrokenAdapter(
            f"{one.where}: shape {list(one.shape)} has rank {rank}, but {two.key!r} {list(two.shape)} has rank "
            f"{two.shape[0]}; they are not halves of one update",
            fault="ranks",
        )
    if t is not None and (len(t.shape) < 2 or t.shape[:2] != (rank, rank)):
        raise BrokenAdapter(
            f"{t.where}: shape {list(t.shape)} is no core between {one.key!r} {list(one.shape)} and {two.key!r} "
            f"{list(two.shape)}: it must be ({rank}, {rank}, kernel)",
            fault="ranks",
        )
    return Shape(out, rank, two.shape[1], two.shape[2:] if t is None else t.shape[2:])


def pair_factors(update: Update, a: str, b: str, core: str) -> tuple[Array, Array]:
    """(out, r) and (r, in · kernel) in float64; a core is multiplied into the second."""
    import numpy as np

    one, two = (update.tensors[role].numpy().astype(np.float64) for role in (a, b))
    t = update.tensors.get(core)
    two = two.reshape(len(two), -1)
    if t is None:
        return one.reshape(len(one), -1), two
    one = one.reshape(len(one), -1)
    middle = np.einsum("ij...,jr->ir...", t.numpy().astype(np.float64), two)
    return np.ascontiguousarray(one.T), middle.reshape(len(one), -1)


class Rows(NamedTuple):
    """A matrix that is never whole in memory: `at(start, stop)` gives those rows in float64."""

    shape: tuple[int, int]
    at: Callable[[int, int], Array]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows, some MiB each, that cover the matrix."""
        step = max(1, BLOCK // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])

    def dense(self) -> torch.Tensor:
        """The whole matrix in float32."""
        import torch

        out = torch.empty(self.shape, dtype=torch.float32)
        for start, stop in self.blocks():
            out[start:stop] = torch.from_numpy(self.at(start, stop))
        return out

    def norm(self) -> float:
        """‖self‖ (Frobenius)."""
        import numpy as np

        return sqrt(sum(float(np.vdot(rows, rows)) for start, stop in self.blocks() for rows in [self.at(start, stop)]))

    def error(self, other: Rows) -> float:
        """‖self − other‖ / ‖self‖ (Frobenius; absolute where self is zero); inf for other shapes.

        Differences are taken element by element before anything is squared, so small ones do not cancel away.
        """
        import numpy as np

        if self.shape != other.shape:
            return float("inf")
        size = difference = 0.0
        for start, stop in self.blocks():
            one = self.at(start, stop)
            size += float(np.vdot(one, one))
            one = one - other.at(start, stop)
            difference += float(np.vdot(one, one))
        return sqrt(difference / size) if size else sqrt(difference)


def alpha_over_rank(update: Update, rank: int) -> float | None:
    """alpha / r, or alpha / √r (rsLoRA); None while alpha is unknown."""
    if update.alpha is None or update.alpha.value is None:
        return None
    return update.alpha.value / (sqrt(rank) if update.rslora else rank)


def known(update: Update, scale: float | None) -> float:
    """The scale.  Raises `CannotRepresent` while it is unknown."""
    if scale is None:
        raise CannotRepresent(f"{update.name}: its scale is unknown, so its delta is too (give --alpha)")
    return scale


def check_magnitude(update: Update, out: int, inputs: int) -> None:
    """Raise `BrokenAdapter` for a DoRA magnitude of another size; `inputs` may have a kernel flattened into it."""
    magnitude = update.tensors.get("magnitude")
    if magnitude is None:
        return
    axis = update.options["dora_axis"]
    size = inputs if axis == "in" else out
    if magnitude.numel != size and not (axis == "in" and magnitude.numel and size % magnitude.numel == 0):
        raise BrokenAdapter(
            f"{magnitude.where}: shape {list(magnitude.shape)}; a DoRA magnitude per {axis}put of this module has "
            f"{size} elements"
        )


def magnitude_error(update: Update, other: Update) -> float:
    """The relative difference of the DoRA magnitudes: 0 where neither has one, inf where only one has."""
    one, two = update.tensors.get("magnitude"), other.tensors.get("magnitude")
    if one is None or two is None:
        return 0.0 if one is two else float("inf")
    return tensor_error(one, two) if update.options["dora_axis"] == other.options["dora_axis"] else float("inf")


def magnitude_rows(update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
    """The magnitude of those rows, if there is one.

    Raises `CannotRepresent` for one per input, whose norms go over all rows.
    """
    magnitude = update.tensors.get("magnitude")
    if magnitude is None:
        return {}
    if update.options["dora_axis"] == "in":
        raise CannotRepresent(
            f"{update.name}: its DoRA magnitude (tensor {magnitude.key!r}) is per input: the norm goes over all rows of "
            "the fused projection, so its parts cannot have magnitudes of their own; a target that keeps the projection "
            "whole holds it (--to kohya, --to comfy)"
        )
    return {"magnitude": magnitude.reshape((magnitude.numel,)).rows(pieces)}
