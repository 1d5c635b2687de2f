"""`scripts/bench validate`: rules over adapters, against loading and reading the same files."""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks import measure, validate_make
from benchmarks.promises import Promise, Target
from benchmarks.report import PACKAGES, Rows, table
from benchmarks.samples import Sample, Samples, spread

_SCRIPT = Path(__file__).with_name("validate_jobs.py")
_RATE, _SHARE, _PEAK = 200.0, 0.5, 300.0
"""What is promised: files a second, of the rate of reading, MiB."""
_LARGEST = validate_make.LARGEST / (1 << 20)


@dataclass(frozen=True, slots=True)
class Part:
    """One set of files and the jobs that are done with it; of a sample, `copy` is the seconds of the work alone."""

    title: str
    jobs: dict[str, str]
    """What each is called in the table."""
    paths: Sequence[Path]
    promises: tuple[Promise, ...]

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        files = [f for p in self.paths for f in (sorted(p.iterdir()) if p.is_dir() else [p])]
        return sum(file.stat().st_size for file in files)


def small(folder: Path, count: int) -> Part:
    """Rules that need headers alone, over many small adapters."""
    return Part(
        f"{count:,} small adapters, rules that need headers alone",
        {"headers": "`validate`, two processes", "loading": "safetensors.torch.load_file, one"},
        validate_make.small(folder, count),
        (
            Promise(
                f"{_RATE:.0f} files a second or more, on two processes",
                of=("headers", "copy"), most=count / _RATE, digits=2, unit=" s",
            ),
        ),
    )  # fmt: skip


def large(folder: Path, megabytes: int) -> Part:
    """Rules about values, over a few large adapters."""
    paths = validate_make.large(folder, megabytes)
    return Part(
        f"{len(paths)} adapters of {megabytes} MB ({', '.join(p.stem for p in paths)}), rules about tensors and scale",
        {
            "tensors": "`validate --select T,S`, one process, a thread a core (the command's default)",
            "alone": "`validate --select T,S --jobs 1`, one thread",
            "reading": "reading the bytes",
            "touching": "safetensors.torch.load_file and a copy of each tensor",
        },
        paths,
        (
            Promise(
                f"{_SHARE:g} × the rate of reading the bytes, or more",
                of=("reading", "copy"), over=("tensors", "copy"), least=_SHARE, digits=2, job="tensors",
            ),
            Promise(
                f"{_PEAK:.0f} MiB plus the largest tensor, or less",
                of=("tensors", "peak"), most=_PEAK + _LARGEST, digits=0, unit=" MiB",
            ),
        ),
    )  # fmt: skip


def run(part: Part, runs: int, folder: Path) -> dict[str, list[Sample]]:
    """All jobs once a round, in turn; the round before the first is not counted."""
    listed = folder / "paths.json"
    listed.write_text(json.dumps([str(path) for path in part.paths]))
    samples: dict[str, list[Sample]] = {name: [] for name in part.jobs}
    for number in range(runs + 1):
        for name in random.Random(number).sample(list(part.jobs), len(part.jobs)):
            used = measure.run([sys.executable, str(_SCRIPT), name, f"@{listed}"])
            told = json.loads(used.output.splitlines()[-1])
            if told["adapters"] != len(part.paths):
                raise measure.CommandFailed(f"{name} saw {told['adapters']} of {len(part.paths)} adapters")
            if number:
                samples[name].append(Sample(used.wall, used.cpu, used.peak, copy=told["seconds"]))
        click.echo(f"{part.title}: {f'round {number} of {runs}' if number else 'warmed up'}", err=True)
    return samples


def rows(part: Part, samples: Samples) -> Rows:
    """A row a job."""
    out = [["", "seconds", "files/s", "MB/s", "whole process s", "peak MiB"]]
    for name, title in part.jobs.items():
        work, wall, peak = (spread(samples, (name, field)) for field in ("copy", "wall", "peak"))
        reads = f"{part.size / 1e6 / work.median:,.0f}" if name != "headers" else ""
        files = f"{len(part.paths) / work.median:,.0f}"
        out.append([title, work.text(3), files, reads, wall.text(2), f"{peak.median:.0f}"])
    return out


def promised(part: Part, samples: Samples) -> list[Target]:
    """What is promised, beside what was measured."""
    return [promise.target(samples) for promise in part.promises]


def report(found: Sequence[tuple[Part, Samples]], markdown: bool) -> str:
    """What it was measured on, and two tables a part."""
    parts = [f"Machine: {measure.machine()}; {measure.load()}.", f"Versions: {measure.versions(*PACKAGES)}."]
    for part, samples in found:
        targets: Rows = [["promised of", "promise", "measured", ""]]
        for target in promised(part, samples):
            targets.append(
                [part.jobs[target.job], target.promise, target.measured, "met" if target.met else "**not met**"]
            )
        rounds = len(next(iter(samples.values())))
        parts += [
            ("### " if markdown else "") + part.title,
            f"{part.size / 1e6:,.0f} MB; {rounds} rounds; median (least-most); warm page cache; imports not counted in seconds.",
            table(rows(part, samples), markdown),
            table(targets, markdown),
        ]
    return "\n\n".join(parts)


@click.command("validate")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1), help="Counted rounds.")
@click.option("--count", default=1000, show_default=True, type=click.IntRange(1), help="Small adapters.")
@click.option("--megabytes", default=300, show_default=True, type=click.IntRange(1), help="Of each large adapter.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where to make the files.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document with every measurement.")
@click.option("--markdown", is_flag=True, help="Only the tables, as they stand in docs/benchmarks.md.")
def command(runs: int, count: int, megabytes: int, folder: Path | None, as_json: bool, markdown: bool) -> None:
    """Validate 1,000 small adapters by their headers, and 900 MB of large ones by their values.

    The small ones beside loading them with safetensors, the large ones beside reading their bytes, in one run. The files
    are made here from a fixed seed; every job runs in a process of its own, all of them in turn. Exit status 1: a promise
    was not met.
    """
    place = Path(tempfile.mkdtemp(prefix="adapterops-bench-", dir=folder))
    try:
        found = []
        for name, part in (("small", small(place / "small", count)), ("large", large(place / "large", megabytes))):
            work = place / f"work-{name}"
            work.mkdir()
            found.append((part, run(part, runs, work)))
        if as_json:
            document = {
                "machine": measure.machine(),
                "load": measure.load(),
                "versions": measure.versions(*PACKAGES),
                "parts": [
                    {
                        "title": part.title,
                        "bytes": part.size,
                        "targets": [asdict(t) for t in promised(part, samples)],
                        "samples": {name: [asdict(sample) for sample in taken] for name, taken in samples.items()},
                    }
                    for part, samples in found
                ],
            }
            click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        else:
            click.echo(report(found, markdown))
    finally:
        shutil.rmtree(place)
    sys.exit(0 if all(target.met for part, samples in found for target in promised(part, samples)) else 1)
