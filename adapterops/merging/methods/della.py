"""DELLA: random pruning that spares the large entries of each row, then the election of signs.

Source: https://arxiv.org/abs/2406.11617 (MagPrune; Drop, Elect, Fuse), with ranks inside each row.  `epsilon` is what it is
in the authors' code and in mergekit: half the width of the range of probabilities.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.errors import UsageError
from adapterops.merging.methods.linear import weighted_sum
from adapterops.merging.methods.ties import elect_and_merge
from adapterops.merging.parameters import DENSITY, MAJORITY_SIGN, SIGN_ELECTION
from adapterops.merging.registry import Kind, Parameter, merge_method
from adapterops.merging.stack import Stack

if TYPE_CHECKING:
    import torch

EPSILON = Parameter(
    "epsilon",
    "the smallest entry of a row is kept with probability density - epsilon, the largest with density + epsilon",
    default=0.1,
    least=0.0,
    most=0.5,
)
_SOURCE = "https://arxiv.org/abs/2406.11617"
_INDEX = 32
"""Bits of a sort key below the magnitude: the column."""


@merge_method(
    "della",
    kind=Kind.ELEMENTS,
    summary="random pruning that spares each row's large entries, then election of signs (DARE by magnitude)",
    source=_SOURCE,
    parameters=(DENSITY, EPSILON, MAJORITY_SIGN, SIGN_ELECTION),
    random=True,
)
def della(stack: Stack, *, density: float, epsilon: float, majority_sign: str, sign_election: str) -> torch.Tensor:
    """The weighted mean of the pruned entries that agree in sign.

    A factor that all weights share is the paper's λ.  Raises `UsageError` where a probability would leave (0, 1].
    """
    probabilities = keep_probabilities(density, epsilon, stack.shape[1])
    out = stack.empty()
    for start, stop, values in stack.blocks():
        _prune_block(stack, start, stop, values, probabilities)
        elect_and_merge(values, stack.weights, out[start:stop], majority_sign, sign_election)
    return out


@merge_method(
    "della_linear",
    kind=Kind.ELEMENTS,
    summary="random pruning that spares each row's large entries, then the weighted sum",
    source=_SOURCE,
    parameters=(DENSITY, EPSILON),
    sums=True,
    random=True,
)
def della_linear(stack: Stack, *, density: float, epsilon: float) -> torch.Tensor:
    """Σ wₖ·(pruned xₖ).  Its expected value is Σ wₖ·xₖ.

    Raises `UsageError` where a probability would leave (0, 1].
    """
    probabilities = keep_probabilities(density, epsilon, stack.shape[1])
    out = stack.empty()
    for start, stop, values in stack.blocks():
        _prune_block(stack, start, stop, values, probabilities)
        weighted_sum(values, stack.weights, out[start:stop])
    return out


def keep_probabilities(density: float, epsilon: float, width: int) -> torch.Tensor:
    """The probabilities that entries of a row are kept, by rank of magnitude: the smallest first (width,), float32.

    Evenly spread over density ± epsilon, ends included, so that their mean is `density`; a density of 1 keeps all.
    Raises `UsageError` where one would leave (0, 1].
    """
    import torch

    if density >= 1:
        return torch.ones(width)
    if density - epsilon <= 0 or density + epsilon > 1 + 1e-9:
        raise UsageError(
            f"--density {density:g} --epsilon {epsilon:g}: entries are kept with probabilities from density - epsilon "
            f"to density + epsilon, which must be above 0 and at most 1; for this density --epsilon may be "
            f"{'below ' + format(density, 'g') if density <= 0.5 else 'at most ' + format(1 - density, 'g')}"
        )
    if width == 1:
        return torch.full((1,), density)
    spread = torch.linspace(density - epsilon, density + epsilon, width, dtype=torch.float64)
    return spread.float().clamp_max_(1)


def magprune_(block: torch.Tensor, uniform: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Keeps the entries of `block` (rows, columns) whose random number is below their probability p, divided by p.

    `probabilities` (columns,) go by rank of magnitude inside the row, the smallest first; of equal magnitudes the
    entry further left ranks lower.
    """
    import torch

    chances = torch.empty_like(block)
    chances.scatter_(1, _ascending(block), probabilities.to(block.device).expand_as(block))
    block.mul_((uniform < chances).view(torch.uint8)).div_(chances)


def _prune_block(stack: Stack, start: int, stop: int, values: list[torch.Tensor], probabilities: torch.Tensor) -> None:
    if float(probabilities[0]) >= 1:
        return
    for k, value in enumerate(values):
        magprune_(value, stack.uniform(k, start, stop), probabilities)


def _ascending(block: torch.Tensor) -> torch.Tensor:
    """The columns of each row in order of magnitude.

    The bits of a non-negative float32 sort as an integer: magnitude and column in one key need no stable sort, and
    numpy sorts whole numbers several times faster than torch finds an order.
    """
    import torch

    keys = block.abs().contiguous().view(torch.int32).long() << _INDEX
    keys |= torch.arange(block.shape[1], device=block.device)
    if keys.device.type == "cpu":
        keys.numpy().sort(axis=1)
    else:
        keys = keys.sort(dim=1).values
    return keys & ((1 << _INDEX) - 1)
