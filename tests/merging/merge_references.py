"""Merge methods on whole weight deltas in float64 numpy, each written from its paper and not from our code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import acos, sin
from typing import Any

import numpy as np

Matrix = np.ndarray[Any, np.dtype[np.float64]]
Reference = Callable[[list[Matrix], list[float], int, Mapping[str, Any]], Matrix]
"""Deltas (m, n), weights, the output's rank, parameters: the merged delta, before it is cut to that rank."""
NOTHING = 1e-12
"""A share of the largest number, below which numbers are rounding."""


def best(matrix: Matrix, rank: int) -> Matrix:
    """The nearest matrix of this rank (Eckart-Young)."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ v[:rank])


def weighted_sum(deltas: list[Matrix], weights: list[float], rank: int, given: Mapping[str, Any]) -> Matrix:
    return np.asarray(sum(w * x for w, x in zip(weights, deltas, strict=True)))


def subtract(deltas: list[Matrix], weights: list[float], rank: int, given: Mapping[str, Any]) -> Matrix:
    return weighted_sum(deltas, [weights[0], *(-w for w in weights[1:])], rank, given)


def largest(matrix: Matrix, count: int) -> Matrix:
    """The `count` entries of largest magnitude, the rest 0."""
    out = np.zeros(matrix.size)
    chosen = np.argsort(-np.abs(matrix).ravel(), kind="stable")[:count]
    out[chosen] = matrix.ravel()[chosen]
    return out.reshape(matrix.shape)


def trimmed(deltas: list[Matrix], density: float) -> list[Matrix]:
    return [largest(x, int(density * x.size)) for x in deltas]


def magnitude_prune(deltas: list[Matrix], weights: list[float], rank: int, given: Mapping[str, Any]) -> Matrix:
    return weighted_sum(trimmed(deltas, given["density"]), weights, rank, given)


def breadcrumbs(deltas: list[Matrix], weights: list[float], rank: int, given: Mapping[str, Any]) -> Matrix:
    out = []
    for x in deltas:
        kept = int(given["density"] * x.size)
        outliers = min(int(given["gamma"] * x.size), x.size - kept)
        out.append(largest(x, kept + outliers) - largest(x, outliers))
    return weighted_sum(out, weights, rank, given)


def elected(deltas: Sequence[Matrix], weights: Sequence[float], majority: str) -> Matrix:
    """TIES' second and third step: a sign for each entry, and the mean of the values that have it."""
    values = np.stack([w * x for w, x in zip(weights, deltas, strict=True)])
    votes = values.sum(axis=0) if majority == "total" else np.sign(values).sum(axis=0)
    agreeing = np.sign(values) == np.where(votes < 0, -1, 1)
    return np.asarray((values * agreeing).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1))


def ties(deltas: list[Matrix], weights: list[float], rank: int, given: Mapping[str, Any]) -> Matrix:
    return elected(trimmed(deltas, given["density"]), weights, given["majority_sign"])


def sce(deltas: list[Matrix], weights: list[float], rank: int, given: Mapping[str, Any]) -> Matrix:
    values = np.stack([w * x for w, x in zip(weights, deltas, strict=True)])
    variance = values.var(axis=0)
    if given["density"] < 1 and variance.any():
        values = values * (largest(variance, int(given["density"] * variance.size)) != 0)
    energies = np.square(values).sum(axis=(1, 2))
    if not energies.any():
        return values[0]
    shares = (energies / energies.sum())[:, None, None]
    agreeing = np.sign(values) == np.where(values.sum(axis=0) < 0, -1, 1)
    total = (shares * agreeing).sum(axis=0)
    return np.asarray((shares * agreeing * values).sum(axis=0) / np.where(total > 0, total, 1))


def _directions(deltas: list[Matrix], weights: list[float]) -> tuple[list[Matrix], list[float], list[float]]:
    """Unit matrices, norms and shares of the weights, of the deltas that are not zero."""
    used = [(x, float(np.linalg.norm(x)), w) for x, w in zip(deltas, weights, strict=True) if x.any()]
    total = sum(w for _, _, w in used)
    return [x / norm for x, norm, _ in used], [norm for _, norm, _ in used], [w / total for _, _, w in used]


def slerp(deltas: list[Matrix], weights: list[float], rank: int, given: Mapping[str, Any]) -> Matrix:
    units, norms, shares = _directions(deltas, weights)
    if len(units) < 2:
        return np.asarray(sum(deltas))
    angle = acos(float((units[0] * units[1]).sum()))
    arc = [sin(share * angle) / sin(angle) * unit for share, unit in zip(shares, units, strict=True)]
    return np.asarray(sum(arc) * sum(share * norm for share, norm in zip(shares, norms, strict=True)))


def karcher(deltas: list[Matrix], weights: list[float], rank: int, given: Mapping[str, Any]) -> Matrix:
    units, norms, shares = _directions(deltas, weights)
    if len(units) < 2:
        return np.asarray(sum(deltas))
    here = sum(share * unit for share, unit in zip(shares, units, strict=True))
    here = np.asarray(here / np.linalg.norm(here))
    for _ in range(5000):
        step = np.zeros_like(here)
        for share, unit in zip(shares, units, strict=True):
            cosine = float(np.clip((here * unit).sum(), -1, 1))
            angle = acos(cosine)
            step += share * (angle / sin(angle) if angle else 1.0) * (unit - cosine * here)
        length = float(np.linalg.norm(step))
        if length < NOTHING:
            break
        here = np.cos(length) * here + np.sin(length) / length * step
        here /= np.linalg.norm(here)
    return np.asarray(here * sum(share * norm for share, norm in zip(shares, norms, strict=True)))


def model_stock(deltas: list[Matrix], weights: list[float], rank: int, given: Mapping[str, Any]) -> Matrix:
    units, norms, shares = _directions(deltas, weights)
    count = len(units)
    if count < 2:
        return np.asarray(sum(deltas))
    cosines = [float((units[i] * units[j]).sum()) for i in range(count) for j in range(i)]
    cosine = max(0.0, sum(cosines) / len(cosines))
    ratio = count * cosine / (1 + (count - 1) * cosine)
    return np.asarray(ratio * sum(s * n * u for s, n, u in zip(shares, norms, units, strict=True)))


def iso_c(deltas: list[Matrix], weights: list[float], rank: int, given: Mapping[str, Any]) -> Matrix:
    u, s, v = np.linalg.svd(weighted_sum(deltas, weights, rank, given), full_matrices=False)
    count = min(int((s > s[0] * 1e-9).sum()), rank)
    return np.asarray(s[:count].mean() * u[:, :count] @ v[:count])


def tsv(deltas: list[Matrix], weights: list[float], rank: int, given: Mapping[str, Any]) -> Matrix:
    found = [np.linalg.svd(x, full_matrices=False) for x in deltas]
    wanted = [int((s > s[0] * 1e-9).sum()) if s[0] else 0 for _, s, _ in found]
    counts, left = [0] * len(deltas), min(rank, *deltas[0].shape)
    while left and counts != wanted:
        for k, most in enumerate(wanted):
            if left and counts[k] < most:
                counts[k], left = counts[k] + 1, left - 1
    u = np.concatenate([u[:, :n] for (u, _, _), n in zip(found, counts, strict=True)], axis=1)
    s = np.concatenate([w * s[:n] for (_, s, _), w, n in zip(found, weights, counts, strict=True)])
    v = np.concatenate([v[:n] for (_, _, v), n in zip(found, counts, strict=True)])
    return np.asarray(_polar(u) * s @ _polar(v))


def _polar(matrix: Matrix) -> Matrix:
    u, _, v = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(u @ v)


def knots(deltas: list[Matrix], weights: list[float], rank: int, given: Mapping[str, Any]) -> Matrix:
    u, s, v = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    count = int((s > s[0] * 1e-9).sum())
    aligned = s[:count, None] * v[:count]
    # An adapter without a delta here must not vote by what rounding left of its zeros.
    aligned[np.abs(aligned) < NOTHING * s[0]] = 0
    parts = [np.asarray(part) for part in np.split(aligned, len(deltas), axis=1)]
    return np.asarray(u[:, :count] @ elected(trimmed(parts, given["density"]), weights, "total"))


REFERENCES: Mapping[str, Reference] = {
    "svd": weighted_sum,
    "cat": weighted_sum,
    "subtract": subtract,
    "magnitude_prune_svd": magnitude_prune,
    "breadcrumbs": breadcrumbs,
    "ties_svd": ties,
    "sce": sce,
    "slerp": slerp,
    "karcher": karcher,
    "model_stock": model_stock,
    "iso_c": iso_c,
    "tsv": tsv,
    "knots": knots,
}
