"""A workload: a file, the jobs that are done with it, and what is promised of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.jobs import Job
from benchmarks.lora import SEED, Lora, Module, make
from benchmarks.promises import Promise, Target
from benchmarks.samples import Samples


@dataclass(frozen=True, slots=True)
class Workload:
    """One table a workload; the benchmark itself knows none of them.  Every one has the jobs `cp` and `peer`."""

    name: str
    title: str
    modules: Callable[[], list[Module]]
    lora: Lora
    jobs: Mapping[str, Job]
    promises: tuple[Promise, ...]

    def file(self, folder: Path) -> Path:
        """Its file in a folder, made where it is not there yet."""
        path = folder / f"{self.name}-kohya-{SEED}.safetensors"
        if not path.exists():
            part = path.with_suffix(".part")
            make(part, self.lora, self.modules())
            part.replace(path)
        return path

    def targets(self, samples: Samples) -> list[Target]:
        """What is promised, beside what was measured."""
        return [promise.target(samples) for promise in self.promises]


@dataclass(frozen=True, slots=True)
class Measured:
    """A workload and what was measured on it."""

    workload: Workload
    samples: Samples
    size: int
    """Bytes of the source."""
    modules: Sequence[Module]

    @property
    def targets(self) -> list[Target]:
        """What is promised, beside what was measured."""
        return self.workload.targets(self.samples)
