"""Weighted sums of the deltas whose weights follow from the angles between them: slerp, karcher, model_stock.

Only the inner products of the deltas are needed, so these cost what the weighted sum does.  A delta that is zero counts as
one that is not there: it has no direction, and whether a file holds it or not must make no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import acos, cos, sin
from typing import TYPE_CHECKING

from adapterops.errors import AdapterOpsError, UsageError
from adapterops.merging.registry import Kind, merge_method

if TYPE_CHECKING:
    import torch

_OPPOSITE = 1e-12
"""1 + cosine below this: no direction lies between the two."""
_SETTLED = 1e-8
"""Length, in radians, of the step at which the iteration of `karcher` ends."""
_STEPS = 2000


@merge_method(
    "slerp",
    kind=Kind.SPAN,
    summary="between two adapters along the arc from one direction to the other; weights 1-t,t say where",
    source="https://doi.org/10.1145/325165.325242",
    adapters=2,
)
def slerp(gram: torch.Tensor, weights: Sequence[float]) -> Sequence[float]:
    """The unit directions, interpolated along the arc at t = w₂/(w₁+w₂), times the norms, interpolated linearly.

    mergekit interpolates the deltas with their norms instead: the same where the norms are equal.  Parallel deltas are
    interpolated linearly; where only one adapter has a delta, it is kept as it is, whatever its weight.

    Raises `UsageError` for a negative weight, weights of sum 0 and more than two deltas, `AdapterOpsError` for opposite
    directions.
    """
    portions, norms = _present("slerp", gram, weights)
    used = [k for k, norm in enumerate(norms) if norm]
    if len(used) < 2:
        return portions
    if len(used) > 2:
        raise UsageError("--method slerp: more than two deltas here; karcher is its form for any number")
    one, two = used
    cosine = min(1.0, float(gram[one, two]) / (norms[one] * norms[two]))
    if 1 + cosine < _OPPOSITE:
        raise _opposite("slerp")
    angle = acos(cosine)
    length = portions[one] * norms[one] + portions[two] * norms[two]
    out = [0.0] * len(portions)
    for k in used:
        out[k] = length / norms[k] * (sin(portions[k] * angle) / sin(angle) if angle else portions[k])
    return out


@merge_method(
    "karcher",
    kind=Kind.SPAN,
    summary="the mean of the directions on the sphere (slerp for any number), with the mean of the norms",
    source="https://doi.org/10.1002/cpa.3160300502",
)
def karcher(gram: torch.Tensor, weights: Sequence[float]) -> Sequence[float]:
    """The weighted Riemannian mean of the unit directions, times the weighted mean of the norms.

    As mergekit's `karcher`, with weights (they count by their share) and run until it settles.

    Raises `UsageError` for a negative weight or weights of sum 0, `AdapterOpsError` for directions that have no unique
    mean, as opposite ones.
    """
    portions, norms = _present("karcher", gram, weights)
    used = [k for k, norm in enumerate(norms) if norm]
    if len(used) < 2:
        return portions
    length = sum(portions[k] * norms[k] for k in used)
    middle = _mean_direction(_cosines(gram, norms, used), gram.new_tensor([portions[k] for k in used]))
    out = [0.0] * len(portions)
    for k, part in zip(used, middle.tolist(), strict=True):
        out[k] = length * part / norms[k]
    return out


@merge_method(
    "model_stock",
    kind=Kind.SPAN,
    summary="the mean, shrunk towards the base model the more, the less the adapters agree",
    source="https://arxiv.org/abs/2403.19522",
)
def model_stock(gram: torch.Tensor, weights: Sequence[float]) -> Sequence[float]:
    """t times the weighted mean, t = N·cos / (1 + (N − 1)·cos), with the mean of the cosines over all pairs.

    The deltas are the differences from the pretrained weights, so no base is needed.  N counts the adapters that have a
    weight and a delta; one alone is kept as it is.  A mean cosine below 0 counts as 0, as for orthogonal deltas: t is 0,
    the base is the best guess.  Weights count by their share; the paper has equal ones.

    Raises `UsageError` for a negative weight or weights of sum 0.
    """
    portions, norms = _present("model_stock", gram, weights)
    used = [k for k, norm in enumerate(norms) if norm]
    count = len(used)
    if count < 2:
        return portions
    cosines = _cosines(gram, norms, used)
    mean = (float(cosines.sum()) - float(cosines.diagonal().sum())) / (count * (count - 1))
    cosine = min(1.0, max(0.0, mean))
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return [ratio * portion for portion in portions]


def _present(method: str, gram: torch.Tensor, weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """Each adapter's share of the weights, and its norm; both 0 where it has no weight or no delta.

    Raises `UsageError` for a negative weight and weights of sum 0.
    """
    if min(weights) < 0:
        raise UsageError(
            f"--method {method}: weight {min(weights):g} is negative; weights say where between the adapters the result "
            "lies (to subtract an adapter: --method svd or subtract)"
        )
    if not any(weights):
        raise UsageError(f"--method {method}: all weights are 0; one at least must be greater")
    norms = [norm if weight else 0.0 for norm, weight in zip(_norms(gram), weights, strict=True)]
    total = sum(weight for weight, norm in zip(weights, norms, strict=True) if norm)
    return [weight / total if norm else 0.0 for weight, norm in zip(weights, norms, strict=True)], norms


def _norms(gram: torch.Tensor) -> list[float]:
    return [max(0.0, float(square)) ** 0.5 for square in gram.diagonal()]


def _cosines(gram: torch.Tensor, norms: Sequence[float], used: Sequence[int]) -> torch.Tensor:
    lengths = gram.new_tensor([norms[k] for k in used])
    cosines: torch.Tensor = gram[used][:, used] / (lengths[:, None] * lengths)
    return cosines.clamp_(-1, 1)


def _opposite(method: str) -> AdapterOpsError:
    return AdapterOpsError(
        f"--method {method}: the deltas point in opposite directions, and none lies in the middle; their weighted sum is "
        "--method svd"
    )


def _mean_direction(cosines: torch.Tensor, pulls: torch.Tensor) -> torch.Tensor:
    """Coefficients (K,) of the Riemannian mean of K unit vectors, of which only the `cosines` (K, K) are known.

    Gradient descent on the sphere with step 1, from the normalised mean: each step goes by the mean of the vectors that
    lead to the K points.
    """
    import torch

    square = float(pulls @ cosines @ pulls)
    if square < _OPPOSITE:
        raise _opposite("karcher")
    here: torch.Tensor = pulls / square**0.5
    for _ in range(_STEPS):
        seen = (cosines @ here).clamp(-1, 1)
        if float(seen.min()) + 1 < _OPPOSITE:
            raise _opposite("karcher")
        angles = torch.arccos(seen)
        stretch = pulls * torch.where(angles > 0, angles / torch.sin(angles), 1.0)
        step = stretch - (stretch @ seen) * here
        length = float((step @ cosines @ step).clamp_min(0)) ** 0.5
        if length < _SETTLED:
            return here
        here = cos(length) * here + sin(length) / length * step
        here = here / (here @ cosines @ here).sqrt()
    raise AdapterOpsError(
        "--method karcher: the deltas point in so many directions that their mean does not settle; their weighted sum is "
        "--method svd"
    )
