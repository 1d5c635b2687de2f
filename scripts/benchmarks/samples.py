"""What was measured of each job in each round, and how it is summed up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.measure import Spread


@dataclass(frozen=True, slots=True)
class Sample:
    """One job in one round."""

    wall: float
    cpu: float
    peak: float
    copy: float | None = None
    """Seconds of moving (and computing) the bytes, as `--json` tells; likewise the two below."""
    flush: float | None = None
    proof: float | None = None


Samples = Mapping[str, list[Sample]]
"""By the name of the job, one a round."""
Field = tuple[str, str]
"""The name of a job, and of a field of its samples."""


def spread(samples: Samples, of: Field, over: Field | None = None) -> Spread:
    """A field, or the quotient of two, taken within each round: drift of the machine cancels."""
    values = [getattr(sample, of[1]) for sample in samples[of[0]]]
    if over is not None:
        below = [getattr(sample, over[1]) for sample in samples[over[0]]]
        values = [a / b for a, b in zip(values, below, strict=True)]
    return Spread.of(values)
