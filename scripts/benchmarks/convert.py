"""`scripts/bench convert`: converting LoRAs, against `cp` of the same bytes and against diffusers."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks import jobs, measure
from benchmarks.flux import FLUX
from benchmarks.report import PACKAGES, report
from benchmarks.samples import Sample
from benchmarks.sdxl import SDXL
from benchmarks.workload import Measured, Workload

WORKLOADS = {workload.name: workload for workload in (SDXL, FLUX)}
ALL = "all"


def run(workload: Workload, source: Path, folder: Path, runs: int) -> Measured:
    """All jobs once a round, in turn; the round before the first is not counted (caches, byte code)."""
    wanted = workload.modules()
    samples: dict[str, list[Sample]] = {name: [] for name in workload.jobs}
    names = list(workload.jobs)
    for number in range(runs + 1):
        measure.warm(source)
        # Each round has an order of its own, so that none always follows the same one.
        for name in random.Random(number).sample(names, len(names)):
            sample = jobs.run(workload.jobs[name], source, folder, wanted)
            if number:
                samples[name].append(sample)
        click.echo(f"{workload.name}: round {number} of {runs}" if number else f"{workload.name}: warmed up", err=True)
    return Measured(workload, samples, source.stat().st_size, wanted)


def document(measured: Sequence[Measured]) -> dict[str, Any]:
    """Every measurement, for `--json`."""
    return {
        "machine": measure.machine(),
        "load": measure.load(),
        "versions": measure.versions(*PACKAGES),
        "workloads": {
            one.workload.name: {
                "bytes": one.size,
                "modules": len(one.modules),
                "targets": [asdict(target) for target in one.targets],
                "samples": {name: [asdict(sample) for sample in taken] for name, taken in one.samples.items()},
            }
            for one in measured
        },
    }


@click.command("convert")
@click.option(
    "--workload", "name", default=ALL, show_default=True, type=click.Choice([*WORKLOADS, ALL]), help="Which to convert."
)
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1), help="Counted rounds.")
@click.option(
    "--file",
    "given",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Another file of the workload's kind.",
)
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where to write; keeps the workloads there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document with every measurement.")
@click.option("--markdown", is_flag=True, help="Only the tables, as they stand in docs/benchmarks.md.")
def command(name: str, runs: int, given: Path | None, folder: Path | None, as_json: bool, markdown: bool) -> None:
    """Convert LoRAs of SDXL (986 modules, rank 32, 228 MB) and Flux.1 (304, rank 16, 153 MB).

    adapterops, `cp` and diffusers do it in one run. The files are made here, in sd-scripts' spelling, from a fixed
    seed. Every job runs in a process of its own, all of them in turn, and every output is checked. Exit status 1: a
    promise was not met.
    """
    chosen = list(WORKLOADS.values()) if name == ALL else [WORKLOADS[name]]
    if given is not None and name == ALL:
        raise click.UsageError(f"--file is of one workload's kind; say which: --workload {'|'.join(WORKLOADS)}")
    measured = []
    with tempfile.TemporaryDirectory(prefix="adapterops-bench-") as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="out-", dir=place))
        try:
            for workload in chosen:
                click.echo(f"{workload.name}: {given or f'made in {place}'}", err=True)
                source = given or workload.file(place)
                measured.append(run(workload, source.resolve(), work, runs))
        finally:
            shutil.rmtree(work)
    if as_json:
        click.echo(json.dumps(document(measured), indent=2, ensure_ascii=False))
    else:
        click.echo(report(measured, markdown))
    sys.exit(0 if all(target.met for one in measured for target in one.targets) else 1)
