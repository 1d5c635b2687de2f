"""The tables of a benchmark, as Markdown or for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import measure
from benchmarks.samples import spread
from benchmarks.workload import Measured

PACKAGES = ("adapterops", "torch", "numpy", "safetensors", "click", "diffusers", "transformers", "peft")

Rows = list[list[str]]


def report(measured: Sequence[Measured], markdown: bool = True) -> str:
    """What it was measured on, and three tables a workload."""
    parts = [f"Machine: {measure.machine()}; {measure.load()}.", f"Versions: {measure.versions(*PACKAGES)}."]
    for one in measured:
        lora, rounds = one.workload.lora, len(one.samples["cp"])
        parts += [
            ("### " if markdown else "") + one.workload.title,
            f"{len(one.modules)} modules, rank {lora.rank}, alpha {lora.alpha:g}, {str(lora.dtype).split('.')[-1]}, "
            f"{one.size / 1e6:.0f} MB; {rounds} rounds; median (least-most); warm page cache.",
            *(table(rows, markdown) for rows in (_processes(one), _inside(one), _promises(one))),
        ]
    return "\n\n".join(parts)


def _processes(one: Measured) -> Rows:
    """Each job as a whole process."""
    rows = [["", "wall s", "MB/s", "× `cp`", "× faster than diffusers", "CPU s", "peak MiB"]]
    for name, job in one.workload.jobs.items():
        wall, cpu, peak = (spread(one.samples, (name, field)) for field in ("wall", "cpu", "peak"))
        rate = f"{one.size / 1e6 / wall.median:,.0f}" if job.output else ""
        times = f"{spread(one.samples, (name, 'wall'), ('cp', 'wall')).median:.1f}" if job.output else ""
        faster = f"{spread(one.samples, ('peer', 'wall'), (name, 'wall')).median:.1f}" if job.inside else ""
        rows.append([job.title, wall.text(3), rate, times, faster, cpu.text(3), f"{peak.median:.0f}"])
    return rows


def _inside(one: Measured) -> Rows:
    """What `adapterops convert` tells of itself."""
    rows = [["inside `convert`", "copying s", "MB/s", "of `cp`'s throughput", "fsync s", "proof s"]]
    for name, job in one.workload.jobs.items():
        if job.inside:
            copy, flush, proof = (spread(one.samples, (name, field)) for field in ("copy", "flush", "proof"))
            share = spread(one.samples, ("cp", "wall"), (name, "copy"))
            rate = f"{one.size / 1e6 / copy.median:,.0f}"
            rows.append([job.title, copy.text(3), rate, share.text(2), flush.text(3), proof.text(3)])
    return rows


def _promises(one: Measured) -> Rows:
    """What the project promises of which job."""
    rows = [["promised of", "promise", "measured", ""]]
    for target in one.targets:
        met = "met" if target.met else "**not met**"
        rows.append([one.workload.jobs[target.job].title, target.promise, target.measured, met])
    return rows


def table(rows: Rows, markdown: bool) -> str:
    if not markdown:
        rows = [[cell.replace("`", "").replace("**", "") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    rule = "| " + " | ".join("-" * max(3, w) for w in widths) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])
