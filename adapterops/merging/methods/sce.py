"""SCE: select the entries on which the adapters differ most, calculate a weight for each adapter, erase minority signs.

Source: FuseChat, https://arxiv.org/abs/2408.07990; `density` is the paper's τ, mergekit's `select_topk`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.linalg.trimming import find_cut, trim_
from adapterops.merging.parameters import DENSITY
from adapterops.merging.registry import Kind, merge_method
from adapterops.merging.stack import Stack

if TYPE_CHECKING:
    import torch


@merge_method(
    "sce",
    kind=Kind.ELEMENTS,
    summary="the entries that differ most between adapters, each adapter weighted by its energy, minority signs erased",
    source="https://arxiv.org/abs/2408.07990",
    parameters=(DENSITY,),
)
def sce(stack: Stack, *, density: float) -> torch.Tensor:
    """Σ ηₖ·yₖ / Σ ηₖ over the yₖ = wₖ·xₖ that have the sign of Σ yₖ (+ for zero); 0 where nothing is selected.

    Selected are the ⌊density·size⌋ entries with the highest variance across the adapters (of equal ones the first in
    row-major order).  Entries on which all adapters are equal are never among them, unless `density` is 1 or all entries
    are such: then everything is selected.  ηₖ is the share of yₖ in the sum of squares of the selected entries.  The
    paper has no weights: here they multiply the deltas before anything else.  An adapter that leaves the module as it is
    counts as one whose delta is zero, so that whether a file holds zeros or nothing makes no difference.
    """
    import torch

    out = stack.empty()
    selects = _select(stack, density, out)
    squares = [torch.zeros(stack.shape[0], dtype=torch.float64) for _ in range(len(stack))]
    for start, stop, values in stack.blocks():
        _weigh_and_select(values, stack.weights, out[start:stop] if selects else None)
        for k, value in enumerate(values):
            # Row by row, so that the sum does not depend on the blocks.
            squares[k][start:stop] = value.cpu().double().square_().sum(dim=1)
    energies = [float(rows.sum()) for rows in squares]
    total = sum(energies)
    if not total:
        return out.zero_()
    for start, stop, values in stack.blocks():
        _weigh_and_select(values, stack.weights, out[start:stop] if selects else None)
        _erase(values, [energy / total for energy in energies], out[start:stop])
    return out


def _weigh_and_select(
    values: list[torch.Tensor], weights: tuple[float, ...], variance: torch.Tensor | None = None
) -> None:
    """The values times their weights, zero where the variance (None: not asked) is."""
    selected = (variance != 0).to(variance.dtype) if variance is not None else None
    for value, weight in zip(values, weights, strict=True):
        value.mul_(weight)
        if selected is not None:
            value.mul_(selected)


def _select(stack: Stack, density: float, out: torch.Tensor) -> bool:
    """Puts the variance of the selected entries into `out`, 0 for the others.  False: all are selected."""
    if density >= 1:
        return False
    for start, stop, values in stack.blocks():
        _weigh_and_select(values, stack.weights)
        _variance(values, stack.absent, out[start:stop])
    rows, width = stack.shape
    if not bool(out.any()):
        return False
    trim_(out, find_cut(out, int(density * rows * width)), 0)
    return True


def _variance(values: list[torch.Tensor], zeros: int, out: torch.Tensor) -> None:
    """The sum of squares about the mean, into `out`; exactly 0 where all are equal.  Changes `values`.

    `zeros` more values are 0, and `values` none.
    """
    mean = values[0].clone()
    if not zeros:
        for value in values:
            value.sub_(mean)
    mean.zero_()
    for value in values:
        mean.add_(value, alpha=1 / (len(values) + zeros))
    out.zero_().addcmul_(mean, mean, value=zeros)
    for value in values:
        value.sub_(mean)
        out.addcmul_(value, value)


def _erase(values: list[torch.Tensor], shares: list[float], out: torch.Tensor) -> None:
    """The mean, by `shares`, of the values that have the sign of their sum."""
    import torch

    out.zero_()
    for value in values:
        out.add_(value)
    elected = torch.where(out >= 0, 1.0, -1.0).to(out.dtype)
    weight = torch.zeros_like(out)
    out.zero_()
    for value, share in zip(values, shares, strict=True):
        value.mul_(elected).clamp_min_(0.0)  # what agrees is positive now, and the rest zero
        out.add_(value, alpha=share)
        weight.add_(value.sign_(), alpha=share)
    out.mul_(elected).div_(weight.masked_fill_(weight == 0, 1.0))
