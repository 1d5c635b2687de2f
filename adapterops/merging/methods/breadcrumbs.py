"""Model Breadcrumbs: deltas without their outliers and without their small entries.

Source: https://arxiv.org/abs/2312.06795; `gamma` and `density` as in mergekit (`breadcrumbs`, `breadcrumbs_ties`), but right
where the outliers are less than one entry: mergekit then removes everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from adapterops.errors import UsageError
from adapterops.linalg.trimming import Cut, find_cut, trim_
from adapterops.merging.methods.linear import weighted_sum
from adapterops.merging.methods.ties import elect_and_merge
from adapterops.merging.parameters import DENSITY, MAJORITY_SIGN, SIGN_ELECTION
from adapterops.merging.registry import Kind, Parameter, merge_method
from adapterops.merging.stack import Stack

if TYPE_CHECKING:
    import torch

GAMMA = Parameter(
    "gamma", "the share of entries to remove as outliers, the largest ones", default=0.01, least=0.0, most=1.0
)
_SOURCE = "https://arxiv.org/abs/2312.06795"


@merge_method(
    "breadcrumbs",
    kind=Kind.ELEMENTS,
    summary="the weighted sum of the entries that are neither outliers nor small",
    source=_SOURCE,
    parameters=(DENSITY, GAMMA),
    sums=True,
)
def breadcrumbs(stack: Stack, *, density: float, gamma: float) -> torch.Tensor:
    """Σ wₖ·(xₖ without its ⌊gamma·size⌋ largest entries, and of the others the ⌊density·size⌋ largest).

    Raises `UsageError` where density + gamma is more than 1.
    """
    cuts = _cuts(stack, density, gamma)
    out = stack.empty()
    for start, stop, values in _middles(stack, cuts):
        weighted_sum(values, stack.weights, out[start:stop])
    return out


@merge_method(
    "breadcrumbs_ties",
    kind=Kind.ELEMENTS,
    summary="election of signs among the entries that are neither outliers nor small",
    source=_SOURCE,
    parameters=(DENSITY, GAMMA, MAJORITY_SIGN, SIGN_ELECTION),
)
def breadcrumbs_ties(
    stack: Stack, *, density: float, gamma: float, majority_sign: str, sign_election: str
) -> torch.Tensor:
    """The weighted mean (as in `ties`; mergekit takes the sum) of the remaining entries that agree in sign.

    Raises `UsageError` where density + gamma is more than 1.
    """
    cuts = _cuts(stack, density, gamma)
    out = stack.empty()
    for start, stop, values in _middles(stack, cuts):
        elect_and_merge(values, stack.weights, out[start:stop], majority_sign, sign_election)
    return out


def _cuts(stack: Stack, density: float, gamma: float) -> list[tuple[Cut, Cut | None]]:
    """For each tensor what keeps its outliers and the entries below them, and what keeps the outliers (None: none)."""
    if density + gamma > 1 + 1e-9:
        raise UsageError(
            f"--density {density:g} --gamma {gamma:g}: the entries to keep and those to remove as outliers are more than "
            f"all; --gamma may be at most {max(0.0, 1 - density):g}"
        )
    rows, width = stack.shape
    size = rows * width
    kept = int(density * size)
    outliers = min(int(gamma * size), size - kept)
    # Of equal magnitudes the first in row-major order go in, so the outliers are among the entries above the lower cut.
    cuts: list[tuple[Cut, Cut | None]] = []
    for k in range(len(stack)):
        whole = stack.whole(k)
        cuts.append((find_cut(whole, kept + outliers), find_cut(whole, outliers) if outliers else None))
    return cuts


def _middles(stack: Stack, cuts: list[tuple[Cut, Cut | None]]) -> Iterator[tuple[int, int, list[torch.Tensor]]]:
    """The stack's blocks, without what is above and below each tensor's cuts."""
    width = stack.shape[1]
    for start, stop, values in stack.blocks():
        for value, (low, high) in zip(values, cuts, strict=True):
            top = trim_(value.clone(), high, start * width) if high is not None else None
            trim_(value, low, start * width)
            if top is not None:
                value.sub_(top)
        yield start, stop, values
