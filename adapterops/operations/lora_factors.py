"""The best LoRA of one update: its exact factors where it is of low rank, else the leading singular vectors of its delta.

By Eckart and Young (https://doi.org/10.1007/BF02288367) the truncated singular value decomposition has the least error of
any factors of that rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt
from typing import TYPE_CHECKING

from adapterops.errors import CannotRepresent
from adapterops.linalg.dense import truncated
from adapterops.linalg.lowrank import Svd, decompose
from adapterops.linalg.random import Draw
from adapterops.methods.lora import product_error

if TYPE_CHECKING:
    import torch

_FIRST = 32
"""The rank that is tried first where an energy decides."""
_SEED = 0
_MOST = 1e18
"""Numbers below this have squares that float32 holds."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How much of a delta is kept: a rank, a share of ‖ΔW‖², or a relative error; all of it where all are None."""

    rank: int | None = None
    energy: float | None = None
    error: float | None = None

    @property
    def everything(self) -> bool:
        """Whether nothing may be lost."""
        return self.rank is None and self.energy is None and self.error is None

    @property
    def share(self) -> float:
        """The least share of ‖ΔW‖² that must be kept."""
        if self.energy is not None:
            return self.energy
        return 1.0 - (self.error or 0.0) ** 2

    def choose(self, s: torch.Tensor, energy: float) -> int | None:
        """The least rank whose singular values (descending) keep enough of ‖ΔW‖²; None where all of `s` do not."""
        if self.rank is not None:
            return min(self.rank, len(s))
        kept = s.double().square().cumsum(0)
        enough = (kept >= self.share * energy * (1 - 1e-12)).nonzero()
        return int(enough[0]) + 1 if len(enough) else None


@dataclass(frozen=True, slots=True)
class Factors:
    """B (out, r) and A (r, in · kernel), their scale, the share of ‖ΔW‖² that they hold, and ‖ΔW − s·B·A‖ / ‖ΔW‖."""

    b: torch.Tensor
    a: torch.Tensor
    scale: float = 1.0
    kept: float = 1.0
    error: float = 0.0

    @property
    def rank(self) -> int:
        """r."""
        return int(self.b.shape[1])


def of_factors(b: torch.Tensor, a: torch.Tensor, scale: float, budget: Budget, dtype: torch.dtype | None) -> Factors:
    """The LoRA of ΔW = scale · b·a; computed factors are rounded to `dtype` (None: float32).

    Factors that may stay as they are keep their numbers and type.
    """
    import torch

    if not b.shape[1]:
        # Nothing is left of it (every triplet of an AdaLoRA is masked): a LoRA has one rank at least.
        kind = dtype or (torch.float32 if b.dtype == torch.float64 else b.dtype)
        return Factors(torch.zeros(b.shape[0], 1, dtype=kind), torch.zeros(1, a.shape[1], dtype=kind))
    wide = b.shape[1] > min(b.shape[0], a.shape[1])
    if budget.everything and not wide:
        exact = b.dtype == torch.float64 or dtype is not None
        new = [t.to(dtype or torch.float32) if exact else t for t in (b, a)]
        return Factors(new[0], new[1], scale, 1.0, _product_error(b, a, new[0], new[1]) if exact else 0.0)
    found = decompose(b * scale, a, exact=wide)
    limit = min(b.shape[0], a.shape[1])
    rank = limit if budget.everything else (budget.choose(found.s, found.energy) or len(found.s))
    found = found.truncated(min(rank, limit, max(1, int((found.s > found.s[:1] * 1e-13).sum()))))
    made = _halved(found, dtype)
    return Factors(*made, 1.0, found.kept, _product_error(b * scale, a, *made))


def of_matrix(matrix: torch.Tensor, budget: Budget, dtype: torch.dtype | None, *purpose: str) -> Factors:
    """The LoRA of a dense ΔW (out, in · kernel), float32, of the rank that the budget asks for.

    Raises `CannotRepresent` where nothing may be lost.
    """
    if budget.everything:
        raise CannotRepresent("is not of low rank: say how much to keep with --rank R, --energy E or --error T")
    if not float(matrix.abs().max()) < _MOST:
        raise CannotRepresent("adds numbers that are infinite, or nearly so: the training broke, or the file did")
    found = _leading(matrix, budget, Draw(_SEED, "to-lora", *purpose))
    b, a = _halved(found, dtype)
    size = float(matrix.double().norm())
    lost = float((matrix - b.float() @ a.float()).double().norm())
    return Factors(b, a, 1.0, found.kept, lost / size if size else lost)


def _leading(matrix: torch.Tensor, budget: Budget, draw: Draw) -> Svd:
    """The leading part of the decomposition, as much as the budget asks for."""
    most = min(matrix.shape)
    if budget.rank is not None:
        return truncated(matrix, budget.rank, draw=draw, exact=budget.rank * 4 > most)[0]
    rank = _FIRST
    while rank * 4 <= most:
        found = truncated(matrix, rank, draw=draw)[0]
        chosen = budget.choose(found.s, found.energy)
        if chosen is not None:
            return found.truncated(chosen)
        rank *= 2
    found = truncated(matrix, most, draw=draw, exact=True)[0]
    return found.truncated(budget.choose(found.s, found.energy) or most)


def _halved(found: Svd, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A with the roots of the singular values in both."""
    import torch

    roots = found.s.sqrt()
    wanted = dtype or torch.float32
    return (found.u * roots).to(wanted).contiguous(), (roots[:, None] * found.vh).to(wanted).contiguous()


def _product_error(b: torch.Tensor, a: torch.Tensor, b2: torch.Tensor, a2: torch.Tensor) -> float:
    """‖b·a − b2·a2‖ / ‖b·a‖ in float64, without a product."""
    return product_error(*(t.double().numpy() for t in (b, a, b2, a2)))


def kernel_shape(a: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of A (r, in, *kernel) for a module's weight (out, in, *kernel)."""
    inner = shape[1:] if len(shape) > 1 and prod(shape[1:]) == a.shape[1] else (a.shape[1],)
    return (a.shape[0], *inner)


def relative(share: float) -> float:
    """The relative error that goes with a kept share of the energy."""
    return sqrt(max(0.0, 1.0 - share))
