"""TIES: keep each tensor's largest entries, elect a sign an entry, and average those that agree; DARE before it.

Source: https://arxiv.org/abs/2306.01708 (TIES), https://arxiv.org/abs/2311.03099 (DARE), and their form in peft
`utils/merge_utils.py`: `ties`, `dare_ties`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from adapterops.merging.methods.pruning import drop_randomly_, trimmed_blocks
from adapterops.merging.parameters import DENSITY, MAJORITY_SIGN, SIGN_ELECTION
from adapterops.merging.registry import Kind, Space, merge_method
from adapterops.merging.stack import Stack, insist_on_float32

if TYPE_CHECKING:
    import torch


@merge_method(
    "ties",
    kind=Kind.ELEMENTS,
    spaces=(Space.FACTORS, Space.DELTA),
    summary="the largest entries of each adapter; where their signs differ, the mean of those with the majority's",
    source="https://arxiv.org/abs/2306.01708; peft utils/merge_utils.py: ties",
    parameters=(DENSITY, MAJORITY_SIGN, SIGN_ELECTION),
    aliases={"ties_svd": Space.DELTA},
)
def ties(stack: Stack, *, density: float, majority_sign: str, sign_election: str) -> torch.Tensor:
    """Each tensor trimmed to its ⌊density·size⌋ largest entries, then `elect_and_merge`."""
    blocks = trimmed_blocks(stack, density)
    out = stack.empty()
    for start, stop, values in blocks:
        elect_and_merge(values, stack.weights, out[start:stop], majority_sign, sign_election)
    return out


@merge_method(
    "dare_ties",
    kind=Kind.ELEMENTS,
    spaces=(Space.FACTORS, Space.DELTA),
    summary="random entries of each adapter, rescaled; where their signs differ, the mean of those with the majority's",
    source="https://arxiv.org/abs/2311.03099; peft utils/merge_utils.py: dare_ties",
    parameters=(DENSITY, MAJORITY_SIGN, SIGN_ELECTION),
    aliases={"dare_ties_svd": Space.DELTA},
    random=True,
)
def dare_ties(stack: Stack, *, density: float, majority_sign: str, sign_election: str) -> torch.Tensor:
    """Each entry kept with probability `density` and divided by it, then `elect_and_merge`."""
    out = stack.empty()
    rescaled = [weight / min(density, 1.0) for weight in stack.weights]
    for start, stop, values in stack.blocks():
        drop_randomly_(stack, start, stop, values, density)
        elect_and_merge(values, rescaled, out[start:stop], majority_sign, sign_election)
    return out


def elect_and_merge(
    values: list[torch.Tensor], weights: Sequence[float], out: torch.Tensor, majority_sign: str, sign_election: str
) -> None:
    """Into `out`: for each entry, the weighted mean of those of its K values that have the elected sign.

    The sign is that of the values' sum (`majority_sign` "total") or of the sum of their signs ("frequency"), and + where
    that is zero.  It is elected among the values as they are, and the weights are applied to those that agree
    (`sign_election` "peft"), or among the weighted values ("weighted"), so that a negative weight turns its tensor's
    signs round.  The mean is over the number of values that agree.

    `values` are K tensors of one shape, and are used up.
    """
    import torch

    insist_on_float32(weights)
    if sign_election == "weighted":
        for value, weight in zip(values, weights, strict=True):
            value.mul_(weight)
        weights = [1.0] * len(values)
    elected, agreeing = torch.zeros_like(out), torch.zeros_like(out)
    for value in values:
        elected.add_(value if majority_sign == "total" else torch.sign(value, out=agreeing))
    torch.copysign(elected.new_ones(1), elected, out=elected)
    agreeing.zero_()
    out.zero_()
    for value, weight in zip(values, weights, strict=True):
        value.mul_(elected).clamp_min_(0.0)  # what agrees is positive now, and the rest zero
        out.add_(value, alpha=weight)
        agreeing.add_(value.sign_())
    out.mul_(elected).div_(agreeing.clamp_min_(1.0))
