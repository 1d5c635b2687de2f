"""`scripts/bench merge`: merging adapters, against PEFT's `add_weighted_adapter` doing the same."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks import merge_jobs, merge_modules
from benchmarks.merge_jobs import PEER
from benchmarks.merge_report import Outcome, report
from benchmarks.samples import Sample

WORKLOADS = ("llama", "sdxl")
PARTS = ("whole", "modules", "errors", "trimming", "memory")
_ENTRIES = 14336 * 4096
"""Of Llama-3-8B's largest matrices."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    runs: int
    module_runs: int
    layers: int
    counts: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...]
    """On which errors are measured."""
    cases: tuple[merge_modules.Case, ...]
    entries: int
    memory: tuple[int, ...]
    memory_methods: tuple[str, ...]
    quick: bool = False


_SMALL, _SQUARE = (1024, 4096), (4096, 4096)


def planned(layers: int, runs: int, module_runs: int, full: bool, quick: bool, llama: bool, sdxl: bool) -> Plan:
    """What is measured with these options."""
    cases = merge_modules.QUICK if quick else merge_modules.FULL if full else merge_modules.USUAL
    chosen = (*(cases if llama else ()), *((merge_modules.SDXL[:1] if quick else merge_modules.SDXL) if sdxl else ()))
    return Plan(
        runs=1 if quick else runs,
        module_runs=1 if quick else module_runs,
        layers=min(layers, 1) if quick else layers,
        counts=(3,) if quick else (2, 3),
        shapes=(_SMALL,) if quick else (_SMALL, _SQUARE),
        cases=chosen,
        entries=_ENTRIES // 8 if quick else _ENTRIES,
        memory=(1, 2) if quick else (4, 8, 16, 32),
        memory_methods=("svd",) if quick else ("linear", "svd", "ties_svd") if full else ("linear", "svd"),
        quick=quick,
    )


def measured(plan: Plan, workloads: Sequence[str], parts: Sequence[str], place: Path, work: Path) -> Outcome:
    """All that is asked for, one part after the other."""

    def say(text: str) -> None:
        click.echo(text, err=True)

    outcome = Outcome(plan.runs, plan.layers)
    if "whole" in parts:
        for name in workloads:
            merges = (
                merge_jobs.llama(place, plan.layers, plan.counts, plan.quick)
                if name == "llama"
                else merge_jobs.sdxl(place)
            )
            outcome.merges[name] = merges
            outcome.samples |= merge_jobs.run(merges, work, plan.runs, say)
    if "modules" in parts:
        outcome.cases = list(plan.cases)
        outcome.samples |= merge_jobs.modules(plan.cases, place, plan.module_runs, say)
    if "errors" in parts and "llama" in workloads:
        outcome.accuracies = merge_modules.accuracies(place, plan.shapes)
        say("errors")
    if "trimming" in parts and "llama" in workloads:
        outcome.entries = plan.entries
        for _ in range(plan.runs):
            found, trimmed, theirs, wrong = merge_modules.trimming(plan.entries)
            for name, seconds in (("trimming threshold", found), ("trimming", trimmed), ("trimming" + PEER, theirs)):
                outcome.samples.setdefault(name, []).append(Sample(seconds, 0.0, 0.0))
            outcome.wrong = max(outcome.wrong, wrong)
        say("trimming")
    if "memory" in parts and "llama" in workloads:
        outcome.peaks = merge_jobs.peaks(place, work, plan.memory, plan.memory_methods, say)
    return outcome


@click.command("merge")
@click.option("--workload", "name", default="all", show_default=True, type=click.Choice([*WORKLOADS, "all"]))
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Measure only this; may be repeated.")
@click.option("--layers", default=4, show_default=True, type=click.IntRange(1), help="Of Llama-3-8B; it has 32.")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1), help="Counted rounds.")
@click.option(
    "--module-runs", default=1, show_default=True, type=click.IntRange(1), help="Of single modules: PEFT takes minutes."
)
@click.option("--full", is_flag=True, help="Also the matrices of 14336×4096, and the memory of ties_svd.")
@click.option("--quick", is_flag=True, help="One layer, one round, small matrices: to see that all works.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where to write; keeps the workloads there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document with every measurement.")
@click.option("--markdown", is_flag=True, help="Only the tables, as they stand in docs/benchmarks.md.")
def command(
    name: str,
    parts: tuple[str, ...],
    layers: int,
    runs: int,
    module_runs: int,
    full: bool,
    quick: bool,
    folder: Path | None,
    as_json: bool,
    markdown: bool,
) -> None:
    """Merge adapters of Llama-3-8B (rank 16, bfloat16, two and three) and of SDXL (rank 32, float16).

    adapterops and PEFT do it in one run, in turn, and every output is checked. The adapters are made here from a fixed
    seed. What PEFT needs hours for (svd of dense deltas) is measured on single matrices. Exit status 1: a promise was
    not met.
    """
    if os.getloadavg()[0] > 1:
        click.echo(
            f"other programs are running (load average {os.getloadavg()[0]:.1f}): PEFT's threads wait for each other and slow "
            "down many times more than adapterops, so these ratios flatter it; measure on a quiet machine",
            err=True,
        )
    workloads = WORKLOADS if name == "all" else (name,)
    plan = planned(layers, runs, module_runs, full, quick, "llama" in workloads, "sdxl" in workloads)
    with tempfile.TemporaryDirectory(prefix="adapterops-bench-") as temporary:
        place = (folder or Path(temporary)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="out-", dir=place))
        try:
            outcome = measured(plan, workloads, parts or PARTS, place, work)
        finally:
            shutil.rmtree(work)
    if as_json:
        click.echo(json.dumps(outcome.document(), indent=2, ensure_ascii=False))
    else:
        click.echo(report(outcome, markdown))
    sys.exit(0 if all(target.met for target in outcome.targets) else 1)
