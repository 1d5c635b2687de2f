"""The ways to do the work: what is started, and what its output must be."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import check, measure
from benchmarks.check import WrongOutput
from benchmarks.lora import Module
from benchmarks.measure import Usage
from benchmarks.samples import Sample


@dataclass(frozen=True, slots=True)
class Job:
    """One way to do the work, run once a round in a process of its own."""

    title: str
    command: Callable[[Path, Path], list[str]]
    """The command line for a source and an output."""
    output: str = ""
    """The name of what it writes."""
    spelling: str = ""
    """What to check the output as (`check.SPELLINGS`); empty: there is none, or it is a plain copy."""
    folded: bool = False
    """Whether the scale must be in the factors."""
    inside: bool = False
    """Whether it tells how long its parts took, as `adapterops convert --json` does."""


def adapterops() -> list[str]:
    script = Path(sys.executable).with_name("adapterops")
    return [str(script)] if script.exists() else [sys.executable, "-m", "adapterops.cli.main"]


def copying() -> Job:
    """`cp`: the least that a conversion could take."""
    return Job("`cp` of the same file", lambda source, out: ["cp", str(source), str(out)], "copy.safetensors")


def converting(to: str, *options: str, what: str = "") -> Job:
    """`adapterops convert --to` a format, which is also what it is checked as; `what` it does to the tensors."""
    called = f"convert to {to}" + (f" ({what})" if what else "")

    def command(source: Path, out: Path) -> list[str]:
        return [
            *adapterops(), "convert", str(source), "--to", to, "-o", str(out), "--overwrite", "--json", *options
        ]  # fmt: skip

    return Job(
        called + (", `--no-verify`" if "--no-verify" in options else ", with proof"),
        command,
        "out" if check.SPELLINGS[to].folder else "out.safetensors",
        to,
        folded="--fold-alpha" in options,
        inside=True,
    )


def through_diffusers(workload: str, what: str = "", folded: bool = False) -> Job:
    """The peer (`through_diffusers.py`)."""
    script = Path(__file__).with_name("through_diffusers.py")
    return Job(
        "diffusers: `lora_state_dict` + `save_lora_weights`" + (f" ({what})" if what else ""),
        lambda source, out: [sys.executable, str(script), workload, str(source), str(out.parent)],
        "peer/pytorch_lora_weights.safetensors",
        "diffusers",
        folded,
    )


def inspecting() -> Job:
    """`adapterops inspect`, which must tell the number of modules."""
    return Job("inspect", lambda source, out: [*adapterops(), "inspect", str(source)])


def run(job: Job, source: Path, folder: Path, wanted: Sequence[Module]) -> Sample:
    """Run a job once and check what it wrote.  Raises `CommandFailed` or `WrongOutput`."""
    out = folder / (job.output or "none")
    _remove(out)
    out.parent.mkdir(exist_ok=True)
    # What an earlier job wrote is not to be flushed at the cost of this one.
    os.sync()
    usage = measure.run(job.command(source, out))
    if job.spelling:
        check.check(source, out, job.spelling, wanted, folded=job.folded)
    elif job.output and out.stat().st_size != source.stat().st_size:
        raise WrongOutput(f"{out}: not a copy")
    elif not job.output and str(len(wanted)) not in usage.output.replace(",", ""):
        raise WrongOutput(f"`{job.title}` does not tell of {len(wanted)} modules")
    _remove(out)
    return _sample(job, usage)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sample(job: Job, usage: Usage) -> Sample:
    if not job.inside:
        return Sample(usage.wall, usage.cpu, usage.peak)
    seconds = json.loads(usage.output)["seconds"]
    return Sample(usage.wall, usage.cpu, usage.peak, seconds["copy"], seconds["flush"], seconds["proof"])
