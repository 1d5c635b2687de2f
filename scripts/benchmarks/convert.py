"""`scripts/bench convert`: converting an SDXL LoRA, against `cp` of the same bytes and against diffusers."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks import measure, workload
from benchmarks.measure import Spread, Usage

MIB = 2**20
PACKAGES = ("adapterops", "torch", "numpy", "safetensors", "click", "diffusers", "transformers", "peft")


@dataclass(frozen=True, slots=True)
class Job:
    """One way to do the work, run once a round in a process of its own."""

    title: str
    command: Callable[[Path, Path], list[str]]
    """The command line for a source and an output."""
    output: str = ""
    """The name of what it writes."""
    kind: str = ""
    """What to check the output as; empty: there is none, or it is a plain copy."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One job in one round."""

    wall: float
    cpu: float
    peak: float
    copy: float | None = None
    """Seconds of moving bytes, as `--json` tells; likewise the two below."""
    flush: float | None = None
    proof: float | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A promise and what was measured."""

    promise: str
    measured: str
    met: bool


Samples = Mapping[str, list[Sample]]


def _adapterops() -> list[str]:
    script = Path(sys.executable).with_name("adapterops")
    return [str(script)] if script.exists() else [sys.executable, "-m", "adapterops.cli.main"]


def _convert(to: str, *options: str) -> Callable[[Path, Path], list[str]]:
    return lambda source, out: [
        *_adapterops(), "convert", str(source), "--to", to, "-o", str(out), "--overwrite", "--json", *options
    ]  # fmt: skip


def _through_diffusers(source: Path, out: Path) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("through_diffusers.py")), str(source), str(out.parent)]


JOBS = {
    "cp": Job("`cp` of the same file", lambda source, out: ["cp", str(source), str(out)], "copy.safetensors"),
    "diffusers-proof": Job("convert to diffusers, with proof", _convert("diffusers"), "d.safetensors", "diffusers"),
    "diffusers": Job(
        "convert to diffusers, `--no-verify`", _convert("diffusers", "--no-verify"), "n.safetensors", "diffusers"
    ),
    "peft": Job("convert to peft, with proof", _convert("peft"), "peft", "peft"),
    "kohya": Job(
        "convert to kohya-diffusers, with proof", _convert("kohya-diffusers"), "k.safetensors", "kohya-diffusers"
    ),
    "peer": Job(
        "diffusers: `lora_state_dict` + `save_lora_weights`",
        _through_diffusers,
        "peer/pytorch_lora_weights.safetensors",
        "diffusers",
    ),
    "inspect": Job("inspect", lambda source, out: [*_adapterops(), "inspect", str(source)]),
}
OURS = ("diffusers-proof", "diffusers", "peft", "kohya")


def run_job(job: Job, source: Path, folder: Path, wanted: list[workload.Module]) -> Sample:
    """Run a job once and check what it wrote.  Raises `CommandFailed` or `WrongOutput`."""
    out = folder / (job.output or "none")
    _remove(out)
    out.parent.mkdir(exist_ok=True)
    # What an earlier job wrote is not to be flushed at the cost of this one.
    os.sync()
    usage = measure.run(job.command(source, out))
    if job.kind:
        workload.check(source, out, job.kind, wanted)
    elif job.output and out.stat().st_size != source.stat().st_size:
        raise workload.WrongOutput(f"{out}: not a copy")
    elif not job.output and str(len(wanted)) not in usage.output.replace(",", ""):
        raise workload.WrongOutput(f"`{job.title}` does not tell of {len(wanted)} modules")
    _remove(out)
    return _sample(usage)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sample(usage: Usage) -> Sample:
    seconds = json.loads(usage.output)["seconds"] if usage.output.startswith("{") else {}
    return Sample(usage.wall, usage.cpu, usage.peak, seconds.get("copy"), seconds.get("flush"), seconds.get("proof"))


def _spread(samples: Samples, job: str, field: str) -> Spread:
    return Spread.of([getattr(sample, field) for sample in samples[job]])


def _ratio(samples: Samples, over: tuple[str, str], under: tuple[str, str]) -> Spread:
    """The quotient of two fields, taken within each round: drift of the machine cancels."""
    pairs = zip(samples[over[0]], samples[under[0]], strict=True)
    return Spread.of([getattr(a, over[1]) / getattr(b, under[1]) for a, b in pairs])


def targets(samples: Samples) -> list[Target]:
    """What the project promises, beside what was measured."""
    copying = _ratio(samples, ("cp", "wall"), ("diffusers-proof", "copy"))
    peak = _spread(samples, "diffusers-proof", "peak")
    whole = _ratio(samples, ("peer", "wall"), ("diffusers-proof", "wall"))
    cpu = _spread(samples, "inspect", "cpu")
    return [
        Target("the copying itself at 0.6 × `cp`'s throughput or more", copying.text(2, " ×"), copying.median >= 0.6),
        Target("a pure rename in 60 MiB or less", peak.text(0, " MiB"), peak.median <= 60),
        Target("the whole process 10 × faster than through diffusers", whole.text(1, " ×"), whole.median >= 10),
        Target("`inspect` in 0.25 s of CPU or less", cpu.text(3, " s"), cpu.median <= 0.25),
    ]


def report(samples: Samples, size: int, count: int, markdown: bool = True) -> str:
    """The tables, as Markdown or (the same without its marks) for a terminal."""
    runs = len(samples["cp"])
    rows = [["", "wall s", "MB/s", "× `cp`", "CPU s", "peak MiB"]]
    for name, job in JOBS.items():
        wall = _spread(samples, name, "wall")
        rate = f"{size / 1e6 / wall.median:,.0f}" if job.output else ""
        times = f"{_ratio(samples, (name, 'wall'), ('cp', 'wall')).median:.1f}" if job.output else ""
        cpu, peak = _spread(samples, name, "cpu"), _spread(samples, name, "peak")
        rows.append([job.title, wall.text(3), rate, times, cpu.text(3), f"{peak.median:.0f}"])
    parts = [["inside `convert`", "copying s", "MB/s", "of `cp`'s throughput", "fsync s", "proof s"]]
    for name in OURS:
        copy = _spread(samples, name, "copy")
        share = _ratio(samples, ("cp", "wall"), (name, "copy"))
        flush, proof = (_spread(samples, name, field).text(3) for field in ("flush", "proof"))
        parts.append([JOBS[name].title, copy.text(3), f"{size / 1e6 / copy.median:,.0f}", share.text(2), flush, proof])
    promises = [["promise", "measured", ""]]
    promises += [[t.promise, t.measured, "met" if t.met else "**not met**"] for t in targets(samples)]
    return "\n\n".join(
        [
            f"{count} modules, {size / 1e6:.0f} MB; {runs} rounds; median (least-most); warm page cache.",
            f"Machine: {measure.machine()}; {measure.load()}.",
            f"Versions: {measure.versions(*PACKAGES)}.",
            *(_table(table, markdown) for table in (rows, parts, promises)),
        ]
    )


def _table(rows: list[list[str]], markdown: bool) -> str:
    if not markdown:
        rows = [[cell.replace("`", "").replace("**", "") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "| " + " | ".join("-" * max(3, w) for w in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def run(source: Path, folder: Path, wanted: list[workload.Module], runs: int) -> Samples:
    """All jobs once a round, in turn; the round before the first is not counted (caches, byte code)."""
    samples: dict[str, list[Sample]] = {name: [] for name in JOBS}
    names = list(JOBS)
    for number in range(runs + 1):
        measure.warm(source)
        # Each round has an order of its own, so that none always follows the same one.
        for name in random.Random(number).sample(names, len(names)):
            sample = run_job(JOBS[name], source, folder, wanted)
            if number:
                samples[name].append(sample)
        click.echo(f"round {number} of {runs}" if number else "warmed up", err=True)
    return samples


@click.command("convert")
@click.option("--runs", default=5, show_default=True, type=click.IntRange(1), help="Counted rounds.")
@click.option(
    "--workload", "given", type=click.Path(exists=True, path_type=Path), help="Another file of the same kind."
)
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where to write; keeps the workload there.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document with every measurement.")
@click.option("--markdown", is_flag=True, help="Only the tables, as they stand in docs/benchmarks.md.")
def command(runs: int, given: Path | None, folder: Path | None, as_json: bool, markdown: bool) -> None:
    """Convert an SDXL LoRA (986 modules, rank 32, 228 MB): adapterops, `cp` and diffusers, in one run.

    The file is made here, in sd-scripts' spelling, from a fixed seed. Every job runs in a process of its own, all of
    them in turn, and every output is checked. Exit status 1: a promise was not met.
    """
    wanted = workload.modules()
    with tempfile.TemporaryDirectory(prefix="adapterops-bench-") as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        source = given or place / f"sdxl-kohya-{workload.SEED}.safetensors"
        if not source.exists():
            click.echo(f"making {source}", err=True)
            part = source.with_suffix(".part")
            workload.make(part, wanted)
            part.replace(source)
        work = Path(tempfile.mkdtemp(prefix="out-", dir=place))
        try:
            samples = run(source.resolve(), work, wanted, runs)
        finally:
            shutil.rmtree(work)
        size = source.stat().st_size
    found = targets(samples)
    if as_json:
        document: dict[str, Any] = {
            "machine": measure.machine(),
            "load": measure.load(),
            "versions": measure.versions(*PACKAGES),
            "bytes": size,
            "modules": len(wanted),
            "targets": [asdict(target) for target in found],
            "samples": {name: [asdict(sample) for sample in taken] for name, taken in samples.items()},
        }
        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        click.echo(report(samples, size, len(wanted), markdown))
    sys.exit(0 if all(target.met for target in found) else 1)
