"""k-means as AdaMSS runs it: rows of a matrix put into clusters, always the same for the same rows.

The steps are those of scikit-learn's `KMeans(init="random", n_init=1, max_iter=10, random_state=123456789)` (Lloyd's
algorithm), so that the clusters are found again without it.

Sources: peft `tuners/adamss/utils.py` (`clustering_Z`); scikit-learn `cluster/_kmeans.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]

SEED = 123456789
"""The seed that peft's code has."""
ITERATIONS = 10
TOLERANCE = 1e-4
"""Of the mean variance of the columns: where the centres move less (squared, in all), the search ends."""


SAME = 2**-21
"""Distances that differ less, relative to what they are sums of, are equal as far as float32 tells (four of its roundings)."""
EQUAL_ROWS = 0.01
"""The share of rows that may be equally near to two centres on the way: more, and the clusters are the processor's choice."""


class Undecided(Exception):
    """Which cluster some rows belong to hangs on the order in which a processor adds up."""


def clusters(rows: Array, count: int) -> Array:
    """The cluster (0 … count − 1) of each of the rows (n, r).

    Raises `Undecided` where a cluster loses its last row on the way, since what scikit-learn does then hangs on the order of
    equal distances, and where many rows are equally near to two clusters (those of a square orthogonal matrix always are).
    """
    import numpy as np

    points = np.ascontiguousarray(rows, dtype=np.float32)
    weights = np.ones(len(points), dtype=np.float32)
    still = np.mean(np.var(points, axis=0)) * TOLERANCE
    points = points - points.mean(axis=0)
    random = np.random.RandomState(SEED)
    centres = points[random.choice(len(points), size=count, replace=False, p=weights / weights.sum())]
    labels = np.full(len(points), -1)
    for _ in range(ITERATIONS):
        before, labels = labels, _nearest(points, centres, EQUAL_ROWS)
        sizes = np.bincount(labels, minlength=count)
        if not sizes.all():
            raise Undecided(f"no row is left in group {int(sizes.argmin())} on the way")
        moved = np.zeros(centres.shape, dtype=np.float64)
        np.add.at(moved, labels, points)
        moved = (moved / sizes[:, None]).astype(np.float32)
        if np.array_equal(labels, before):
            return labels
        shift = float(np.sum((moved - centres) ** 2))
        centres = moved
        if shift <= still:
            break
    return _nearest(points, centres, 0)


def _nearest(points: Array, centres: Array, most: float) -> Array:
    """The nearest centre of each point: by ‖c‖² − 2·p·c, since ‖p‖² is the same for all.

    Raises `Undecided` where more than this share of the points has two that are equally near.
    """
    import numpy as np

    squares = (centres**2).sum(axis=1)
    distances = squares - 2 * (points @ centres.T)
    found: Array = np.argmin(distances, axis=1)
    if len(centres) > 1:
        nearest = np.partition(distances, 1, axis=1)
        sizes = squares.max() + 2 * np.linalg.norm(points, axis=1) * np.sqrt(squares.max())
        equal = int(np.count_nonzero(nearest[:, 1] - nearest[:, 0] <= SAME * sizes))
        if equal > most * len(points):
            raise Undecided(f"{equal} of {len(points)} rows are equally near to two of them")
    return found
