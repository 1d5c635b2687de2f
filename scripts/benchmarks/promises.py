"""What the project promises of its speed and memory: a job's measurement, perhaps over another's, and its limit."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from benchmarks.samples import Field, Samples, spread


@dataclass(frozen=True, slots=True)
class Target:
    """A promise and what was measured."""

    job: str
    promise: str
    measured: str
    met: bool


@dataclass(frozen=True, slots=True)
class Promise:
    """The median of a field (of its quotient with another within each round) is between two numbers."""

    text: str
    of: Field
    over: Field | None = None
    least: float = -inf
    most: float = inf
    digits: int = 1
    unit: str = " ×"
    job: str = ""
    """Whose promise it is, where that is not the job of `of`."""

    def target(self, samples: Samples) -> Target:
        """It beside what was measured."""
        found = spread(samples, self.of, self.over)
        met = self.least <= found.median <= self.most
        return Target(self.job or self.of[0], self.text, found.text(self.digits, self.unit), met)


def renaming(job: str, peer: str) -> tuple[Promise, ...]:
    """Of a conversion that only renames: no byte of a tensor changes.  `peer` says what diffusers does meanwhile."""
    return (
        Promise(
            "the copying itself at 0.6 × `cp`'s throughput or more",
            of=("cp", "wall"), over=(job, "copy"), least=0.6, digits=2, job=job,
        ),
        Promise("60 MiB or less", of=(job, "peak"), most=60, digits=0, unit=" MiB"),
        Promise(
            f"the whole process 10 × faster than {peer}",
            of=("peer", "wall"), over=(job, "wall"), least=10, job=job,
        ),
    )  # fmt: skip


def computing(job: str) -> Promise:
    """Of a conversion that cuts tensors up or multiplies them."""
    return Promise(
        "the copying, computing included, in 4 × `cp`'s time of the same file or less",
        of=(job, "copy"), over=("cp", "wall"), most=4,
    )  # fmt: skip
