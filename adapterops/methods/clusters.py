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


def clusters(rows: Array, count: int) -> Array | None:
    """The cluster (0 … count − 1) of each of the rows (n, r); None where a cluster loses its last row on the way.

    What scikit-learn does then hangs on the order of equal distances, and is not done here.
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
        before, labels = labels, _nearest(points, centres)
        sizes = np.bincount(labels, minlength=count)
        if not sizes.all():
            return None
        moved = np.zeros(centres.shape, dtype=np.float64)
        np.add.at(moved, labels, points)
        moved = (moved / sizes[:, None]).astype(np.float32)
        if np.array_equal(labels, before):
            return labels
        shift = float(np.sum((moved - centres) ** 2))
        centres = moved
        if shift <= still:
            break
    return _nearest(points, centres)


def _nearest(points: Array, centres: Array) -> Array:
    """The nearest centre of each point: by ‖c‖² − 2·p·c, since ‖p‖² is the same for all."""
    import numpy as np

    found: Array = np.argmin((centres**2).sum(axis=1) - 2 * (points @ centres.T), axis=1)
    return found
