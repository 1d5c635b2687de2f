"""What the methods share that multiply a module's weight by matrices, most of them orthogonal.

A skew-symmetric matrix S = −Sᵀ makes a rotation: exactly by Cayley's transform, (I − S)(I + S)⁻¹, or approximately by
the first terms of (I + S)(I − S)⁻¹ = I + 2S + 2S² + …, which turns the other way.

Sources: Cayley's transform https://arxiv.org/abs/2306.07280 (OFT), its series https://arxiv.org/abs/2506.19847 (OFTv2).
"""

from __future__ import annotations

from math import isqrt, prod
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Method, Own, need_own
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import torch

TERMS = 5
"""How many terms of the series peft takes where a config says nothing."""


class OfTheWeight(Method):
    """A method whose delta is a function of the module's own weight: W' = W · M, or M · W."""

    needs_weight = True

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(
            f"{update.name}: {self.title} multiplies the module's weight, so its delta needs the base weight "
            "(--base-weights)"
        )

    def own(self, update: Update, own: Own | None) -> Own:
        """The base's parameters, which the update fits.  Raises `CannotRepresent`, `BrokenAdapter`."""
        found = need_own(update, own)
        shape = tuple(found.weight.shape)
        if not self.fits(update, shape):
            tensors = ", ".join(f"{t.key!r} {list(t.shape)}" for t in update.tensors.values())
            first = next(iter(update.tensors.values()))
            raise BrokenAdapter(
                f"{first.where}: {update.name} has a weight {list(shape)} in the base, which {tensors} cannot act on: "
                "they belong to another model"
            )
        return found


def values(tensor: LazyTensor) -> torch.Tensor:
    """The numbers in float64."""
    return tensor.torch().double()


def flag(update: Update, name: str, default: bool) -> bool:
    """A true-or-false option, `default` where nothing says it."""
    value = update.options.get(name)
    if isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise CannotRepresent(f"{update.name}: {name} is true or false, not {value!r}")
        return value.lower() == "true"
    return default if value is None else bool(value)


def number(update: Update, name: str, default: float) -> float:
    """An option that is a number, `default` where nothing says it."""
    value = update.options.get(name)
    try:
        return default if value is None else float(value)
    except (TypeError, ValueError):
        raise CannotRepresent(f"{update.name}: {name} is a number, not {value!r}") from None


def count(update: Update, name: str, value: Any) -> int:
    """An option that counts something.  Raises `CannotRepresent` unless it is a whole number above zero."""
    try:
        found = int(value)
    except (TypeError, ValueError):
        found = 0
    if found < 1 or isinstance(value, bool) or found != float(value):
        raise CannotRepresent(f"{update.name}: {name} is a whole number above zero, not {value!r}")
    return found


def side(entries: int) -> int | None:
    """b of a skew-symmetric (b, b) whose upper part has b·(b − 1)/2 entries; None where no b has so many."""
    b = (1 + isqrt(1 + 8 * entries)) // 2
    return b if b * (b - 1) // 2 == entries else None


def skew(upper: torch.Tensor) -> torch.Tensor:
    """S (n, b, b) from the entries above its diagonals, row by row (n, b·(b − 1)/2).

    Raises `ValueError` for a number of entries that no matrix has.
    """
    import torch

    b = side(upper.shape[1])
    if b is None:
        raise ValueError(f"{upper.shape[1]} entries are no upper part")
    out = upper.new_zeros(upper.shape[0], b, b)
    rows, columns = torch.triu_indices(b, b, 1)
    out[:, rows, columns] = upper
    return out - out.mT


def skew_part(blocks: torch.Tensor) -> torch.Tensor:
    """(M − Mᵀ)/2 of each (b, b)."""
    return (blocks - blocks.mT) / 2


def cayley(s: torch.Tensor) -> torch.Tensor:
    """(I − S)(I + S)⁻¹ of each (b, b), whose two factors commute.

    By numpy: torch 2.13's solver of many matrices fails in threads beside another ("Pivots given to lu_solve …").
    """
    import numpy as np
    import torch

    eye = torch.eye(s.shape[-1], dtype=s.dtype)
    return torch.from_numpy(np.linalg.solve((eye + s).numpy(), (eye - s).numpy()))


def neumann(s: torch.Tensor, terms: int, halved: bool = True) -> torch.Tensor:
    """I + 2S + 2S² + … + 2Sᵏ, whose last term has no factor 2 where there are three or more and `halved` is set.

    Before peft 0.18 (not `halved`) there are `terms` of them.  Since then, `terms` of 3 and 4 both end with S³.
    """
    import torch

    out = torch.eye(s.shape[-1], dtype=s.dtype).expand_as(s).clone()
    last = terms - 1 if terms < 3 or not halved else max(terms - 1, 3)
    power = s
    for exponent in range(1, last + 1):
        power = s if exponent == 1 else power @ s
        out += power if halved and exponent == last and exponent > 1 else 2 * power
    return out


def within(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """Each (b, b), shortened to the Frobenius norm `limit` where it is longer (COFT)."""
    norms = blocks.flatten(1).norm(dim=1)[:, None, None]
    return blocks * (limit / norms.clamp(min=limit)) if limit > 0 else blocks * 0


def turned(weight: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """W · diag(blocks)ᵀ (out, n) in float32: of W (out, n), n = k·b columns, and k blocks (b, b), or one for all."""
    import torch

    b = blocks.shape[-1]
    kept = blocks.float().expand(weight.shape[1] // b, b, b)
    product = torch.einsum("okb,kcb->okc", weight.float().reshape(len(weight), -1, b), kept)
    return product.reshape(weight.shape)


def minus_eye(blocks: torch.Tensor) -> torch.Tensor:
    """What (…, b, b) changes: without it, W' − W would lose digits."""
    import torch

    return blocks - torch.eye(blocks.shape[-1], dtype=blocks.dtype)


def blocks_error(one: torch.Tensor, two: torch.Tensor) -> float:
    """‖R − R'‖ / ‖R − I‖ of block diagonals (n, b, b), absolute where R is I; a lone block stands for all."""
    if one.shape[-1] != two.shape[-1] or (one.shape[0] != two.shape[0] and 1 not in (one.shape[0], two.shape[0])):
        return float("inf")
    size = max(one.shape[0], two.shape[0])
    wide = one.expand(size, *one.shape[1:])
    norm, difference = float(minus_eye(wide).norm()), float((wide - two).norm())
    return difference / norm if norm else difference


def columns(shape: tuple[int, ...]) -> int:
    """The inputs of one output: in · kernel of a weight (out, in, *kernel)."""
    return prod(shape[1:])
