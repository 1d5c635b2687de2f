"""One module at a time: seconds of adapterops and of PEFT on matrices of one shape, and errors against the optimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import adapterops as ao
from adapterops.linalg.trimming import find_cut, trim_
from adapterops.merging import matrices
from adapterops.merging.deltas import DeltaStack
from adapterops.merging.modules import gather
from adapterops.merging.registry import Space, find
from adapterops.merging.settings import Choice, Settings
from benchmarks import merge_check, merge_workloads
from benchmarks.merge_workloads import RANK, Shape


@dataclass(frozen=True, slots=True)
class Case:
    """A matrix, what is done with it, and whether PEFT computes full singular matrices, as it does by default."""

    method: str
    shape: Shape
    count: int = 3
    full_matrices: bool = True
    rank: int = RANK
    least: float = 15.0
    """How many times faster than PEFT it is promised to be; 0: nothing is."""

    @property
    def name(self) -> str:
        """What the samples are kept under."""
        return f"{self.method} {self.shape[0]}×{self.shape[1]} K{self.count}" + ("" if self.full_matrices else " thin")

    @property
    def copies(self) -> int:
        """Modules in the adapters that ours is timed with, which is divided by their number: a merge keeps every core busy with
        modules of their own.  For `svd` as many as Llama-3-8B has of each size."""
        return 64 if self.method == "svd" else 2

    def sources(self, folder: Path, ours: bool) -> list[Path]:
        """Adapters of that shape."""
        return merge_workloads.alike(folder, self.shape, self.copies if ours else 1, self.count, self.rank)


_SMALL, _SQUARE, _TALL = (1024, 4096), (4096, 4096), (14336, 4096)
DENSE = merge_check.DENSE
QUICK = (
    Case("svd", _SMALL, least=1000.0),
    Case("ties_svd", _SMALL),
    Case("dare_ties_svd", _SMALL),
    Case("magnitude_prune_svd", _SMALL),
)
USUAL = (
    *QUICK,
    Case("svd", _SQUARE, least=1000.0),
    Case("svd", _SQUARE, full_matrices=False, least=1000.0),
    *(Case(method, _SQUARE) for method in DENSE),
    *(Case(method, _SQUARE, full_matrices=False, least=12.0) for method in DENSE),
)
FULL = (
    *USUAL,
    Case("svd", _TALL, least=1000.0),
    *(Case(method, _TALL, full_matrices=False, least=12.0) for method in DENSE),
)
SDXL = (Case("svd", (1280, 1280), 2, rank=32, least=0.0), Case("svd", (5120, 1280), 2, rank=32, least=0.0))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How far from the best approximation the merge of a method is, and whether the merged delta is peft's."""

    method: str
    shape: Shape
    rank: int
    excess: float
    most: float
    differing: int | None = None
    """Entries of the merged dense delta that are not peft's; None: there is no dense delta."""
    largest: float | None = None
    """The largest of those differences over the largest entry."""

    @property
    def met(self) -> bool:
        """Whether the promise is kept."""
        return self.excess <= self.most and (self.differing or 0) == 0


def accuracies(folder: Path, shapes: Sequence[Shape], ranks: Sequence[int] = (16, 32, 64)) -> list[Accuracy]:
    """Of every method, on one matrix of each shape, written as float32."""
    out = []
    for shape in shapes:
        sources = merge_workloads.alike(folder, shape, 1, 3)
        adapters = [ao.load(path) for path in sources]
        (name,) = merge_check.modules(sources[0])
        terms = [merge_check.Lora.read(path).factors(name) for path in sources]
        for method in ("svd", *DENSE):
            merged = None if method == "svd" else merge_check.dense(method, terms, name)
            lost = None if merged is None else merge_check.lost_at(merged)
            own = None if merged is None else merged_delta(adapters, method)
            for rank in ranks[:2] if merged is None else ranks:
                made = ao.combine(adapters, method, rank=rank, dtype="float32", **_density(method)).adapter
                (update,) = made
                b, a = (torch.from_numpy(update.tensors[role].numpy()).clone() for role in "BA")
                if merged is None or own is None or lost is None:
                    excess = merge_check.excess_of_sum(terms, b, a, 1.0)
                    out.append(Accuracy(method, shape, rank, excess, 1e-10))
                    continue
                excess = merge_check.excess_over(lost, merged, b, a)
                top = float(merged.abs().max())
                # Sums of products are rounded by the order in which they are added: an entry differs that is more off.
                apart = (own - merged).abs() > 1e-5 * top
                out.append(
                    Accuracy(
                        method, shape, rank, excess, 1e-5 if rank <= 32 else 1e-4,
                        int(apart.sum()), float((own - merged).abs().max()) / top,
                    )
                )  # fmt: skip
    return out


def _density(method: str) -> dict[str, Any]:
    return {} if method == "svd" else {"density": merge_check.DENSITY}


def merged_delta(adapters: Sequence[ao.Adapter], method: str) -> torch.Tensor:
    """The dense delta (out, in) that adapterops makes of adapters of one module, before it is factorised."""
    found, _ = find(method)
    (module,) = gather(adapters, [lambda component, name: 1.0] * len(adapters), None)
    choice = Choice(found, Space.DELTA, found.settle(_density(method)))
    plan = matrices.plan(module, replace(choice, rank=RANK))
    cpu = torch.device("cpu")
    stack = DeltaStack(plan.terms, matrices.draws(plan, Settings(), "delta"), cpu)
    with torch.inference_mode():
        merged: torch.Tensor = found.function(stack, **choice.arguments)
    return merged.clone()


def trimming(entries: int) -> tuple[float, float, float, int]:
    """Seconds of finding the threshold, of that and trimming, of peft doing the same, and entries that are not peft's.

    Those of the threshold's own magnitude are left out: which of them stay is nobody's promise, but their number is
    compared.
    """
    import time

    from peft.utils.merge_utils import magnitude_based_pruning

    values = torch.randn(entries, generator=torch.Generator().manual_seed(1)).reshape(-1, 4096)
    own = values.clone()
    started = time.perf_counter()
    cut = find_cut(own, int(merge_check.DENSITY * entries))
    found = time.perf_counter()
    trim_(own, cut, 0)
    trimmed = time.perf_counter()
    theirs = magnitude_based_pruning(values, merge_check.DENSITY)
    ended = time.perf_counter()
    apart = (own != theirs) & (values.abs() != cut.threshold)
    wrong = int(apart.sum()) + abs(int(own.count_nonzero()) - int(theirs.count_nonzero()))
    return found - started, trimmed - started, ended - trimmed, wrong
