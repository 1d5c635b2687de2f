"""The merges that are timed as a user starts them, and inside a process, of adapterops and of PEFT."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measure, merge_check, merge_workloads
from benchmarks.jobs import adapterops
from benchmarks.measure import Usage
from benchmarks.merge_modules import Case
from benchmarks.samples import Sample

WHOLE, PEER, INSIDE, PEER_INSIDE = "", " peft", " inside", " inside peft"
"""What the names of samples end with."""
Say = Callable[[str], None]
LAYERS = 32
"""Of Llama-3-8B."""
_REPEATED = 7
"""Merges of one module that are timed one after the other; their median counts."""


@dataclass(frozen=True, slots=True)
class MergeSample(Sample):
    """With the seconds of reading, computing and writing, where they are told."""

    read: float | None = None
    compute: float | None = None
    write: float | None = None


Taken = dict[str, list[Sample]]
"""By the name of a merge and one of the endings above, one a round."""


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge of one workload."""

    method: str
    sources: tuple[Path, ...]
    names: tuple[str, ...]
    """The modules whose results are looked at."""
    rank: int | None = None
    peer: bool = False
    """Whether PEFT does it too, as a whole."""
    peer_process: bool = False
    """Whether PEFT's process is timed from its start to its exit as well."""
    whole: bool = True
    """Whether processes are timed, and not only what is done inside one."""
    label: str = ""
    """What tells it from the same merge of other adapters."""

    @property
    def name(self) -> str:
        """What it is called in tables and samples."""
        rank = f" to rank {self.rank}" if self.rank else ""
        return f"{self.label}{self.method}{rank}, {len(self.sources)} adapter{'s'[: len(self.sources) - 1]}"

    @property
    def dense(self) -> bool:
        """Whether it goes through dense deltas."""
        return self.method in merge_check.DENSE

    def output(self, name: str) -> str:
        """A name for what adapterops writes: a folder, or a file, as its sources are."""
        return name if self.sources[0].is_dir() else f"{name}.safetensors"

    @property
    def options(self) -> dict[str, Any]:
        """Those of `adapterops.merge`."""
        density = {} if self.method in ("linear", "cat", "svd") else {"density": merge_check.DENSITY}
        return density | ({"rank": self.rank} if self.rank else {})

    def command(self, out: Path, *further: str) -> list[str]:
        """`adapterops merge`."""
        options = [text for key, value in self.options.items() for text in (f"--{key}", str(value))]
        return [
            *adapterops(), "merge", *map(str, self.sources), "--method", self.method, *options,
            "-o", str(out), "--overwrite", "--json", *further,
        ]  # fmt: skip

    def task(self, out: Path, peer: bool) -> dict[str, Any]:
        """What `merge_ours.py` and `merge_peft.py` take."""
        sources = [str(path) for path in self.sources]
        own = {"density": merge_check.DENSITY} if peer else {"options": self.options}
        return {"method": self.method, "sources": sources, "output": str(out), **own}


def llama(folder: Path, layers: int, counts: Iterable[int], quick: bool) -> list[Merge]:
    """Adapters of Llama-3-8B: every type that works on factors as PEFT does it too; those on deltas of most adapters.

    The two that only move factors are done on all of its layers as well, inside the process.
    """
    out = []
    largest = max(counts)
    for count in counts:
        sources = tuple(merge_workloads.llama(folder, layers, count))
        names = [n for n in merge_check.modules(sources[0]) if f".layers.{layers - 1}." in n]
        whole = not quick
        out += [
            Merge(m, sources, tuple(names), peer=True, peer_process=whole or m == "linear")
            for m in ("linear", "cat", "ties", "dare_ties")
        ]
        out.append(Merge("svd", sources, tuple(names)))
        if count == largest:
            small = tuple(name for name in names if name.endswith("k_proj"))
            out += [Merge(method, sources, small) for method in merge_check.DENSE[: 1 if quick else None]]
    for count in counts if layers < LAYERS and not quick else ():
        sources = tuple(merge_workloads.llama(folder, LAYERS, count))
        names = tuple(n for n in merge_check.modules(sources[0]) if f".layers.{LAYERS - 1}." in n)
        label = f"all {LAYERS} layers: "
        out += [Merge(m, sources, names, peer=True, whole=False, label=label) for m in ("linear", "cat")]
    return out


def sdxl(folder: Path) -> list[Merge]:
    """Two files merged at their rank, and one brought to rank 8."""
    sources = tuple(merge_workloads.sdxl(folder, 2))
    names = tuple(merge_check.modules(sources[0])[::100])
    return [Merge("svd", sources, names, rank=32), Merge("svd", sources[:1], names, rank=8)]


def run(merges: Sequence[Merge], folder: Path, runs: int, say: Say) -> Taken:
    """All of them once a round, adapterops and PEFT in turn; one merge by each before the first is not counted."""
    taken: Taken = {}
    for path in {file for merge in merges for file in merge.sources}:
        measure.warm(path / "adapter_model.safetensors" if path.is_dir() else path)
    _whole(merges[0], folder)
    if merges[0].peer:
        _peer(merges[0], folder)
    for number in range(runs):
        processes = [merge for merge in merges if merge.whole]
        for merge in random.Random(number).sample(processes, len(processes)):
            _keep(taken, merge.name + WHOLE, _whole(merge, folder))
            if merge.peer_process:
                _keep(taken, merge.name + PEER, _peer(merge, folder))
            say(f"round {number + 1} of {runs}: {merge.name}")
        sides = [
            (INSIDE, [merge for merge in merges if not merge.dense]),
            (PEER_INSIDE, [merge for merge in merges if merge.peer]),
        ]
        # Neither is always the first.
        for ending, own in sides[:: -1 if number % 2 else 1]:
            for name, sample in _inside(own, folder, peer=ending == PEER_INSIDE):
                _keep(taken, name + ending, sample)
    return taken


def _keep(taken: Taken, name: str, sample: Sample) -> None:
    taken.setdefault(name, []).append(sample)


def _whole(merge: Merge, folder: Path) -> MergeSample:
    """A process of adapterops, its output checked."""
    out = _room(folder / merge.output("out"))
    usage = measure.run(merge.command(out))
    merge_check.check(merge.sources, out, merge.method, merge.names)
    return _sample(usage, json.loads(usage.output)["seconds"])


def _peer(merge: Merge, folder: Path) -> MergeSample:
    """A process of PEFT, its output checked."""
    out = _room(folder / "peer")
    usage, (seconds,) = _tasks("merge_peft.py", [merge.task(out, peer=True)])
    merge_check.check(merge.sources, out / "merged", merge.method, merge.names, ours=False)
    return _sample(usage, seconds)


def _inside(merges: Sequence[Merge], folder: Path, peer: bool) -> list[tuple[str, MergeSample]]:
    """All merges in one process, after a tiny one that has everything imported; the outputs checked."""
    if not merges:
        return []
    room = _room(folder / "inside")
    room.mkdir()
    tiny = Merge("linear", tuple(merge_workloads.alike(folder.parent, (64, 64), 2, 2)), ())
    outs = [room / merge.output(str(number)) for number, merge in enumerate(merges)]
    first = tiny.task(room / "tiny", peer)
    _, (_, *found) = _tasks(
        "merge_peft.py" if peer else "merge_ours.py",
        [first, *(merge.task(out, peer) for merge, out in zip(merges, outs, strict=True))],
    )
    for merge, out in zip(merges, outs, strict=True):
        merge_check.check(merge.sources, out / "merged" if peer else out, merge.method, merge.names, ours=not peer)
    shutil.rmtree(room)
    seconds = [_sample(Usage(sum(parts.values()), 0.0, 0.0, ""), parts) for parts in found]
    return [(merge.name, sample) for merge, sample in zip(merges, seconds, strict=True)]


def _sample(usage: Usage, seconds: Mapping[str, float]) -> MergeSample:
    return MergeSample(
        usage.wall, usage.cpu, usage.peak,
        read=seconds["read"], compute=seconds["compute"], write=seconds["write"],
    )  # fmt: skip


def _tasks(script: str, tasks: Sequence[Mapping[str, Any]]) -> tuple[Usage, list[dict[str, Any]]]:
    """Run one of the two scripts on a list of tasks."""
    with tempfile.TemporaryDirectory(prefix="adapterops-bench-") as place:
        path = Path(place, "tasks.json")
        path.write_text(json.dumps(tasks))
        usage = measure.run([sys.executable, str(Path(__file__).with_name(script)), str(path)])
    return usage, json.loads(usage.output)


def _room(path: Path) -> Path:
    """Nothing there, and the disk's queue empty."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    os.sync()
    return path


def modules(cases: Sequence[Case], folder: Path, runs: int, say: Say) -> Taken:
    """Seconds a module: of adapterops before and after PEFT, which does each once a round."""
    taken: Taken = {}
    for number in range(runs):
        before = _ours(cases, folder)
        theirs = _tasks("merge_peft.py", [_warm(folder), *(_case(case, folder, peer=True) for case in cases)])[1][1:]
        after = _ours(cases, folder)
        for case, one, other, found in zip(cases, before, after, theirs, strict=True):
            _keep(taken, case.name, Sample((one + other) / 2, 0.0, 0.0))
            _keep(taken, case.name + PEER, Sample(statistics.median(found["each"]), 0.0, 0.0))
        say(f"single modules: round {number + 1} of {runs}")
    return taken


def _ours(cases: Sequence[Case], folder: Path) -> list[float]:
    found = _tasks("merge_ours.py", [_warm(folder), *(_case(case, folder, peer=False) for case in cases)])[1][1:]
    return [statistics.median(one["each"]) / case.copies for one, case in zip(found, cases, strict=True)]


def _case(case: Case, folder: Path, peer: bool) -> dict[str, Any]:
    task = Merge(case.method, tuple(case.sources(folder, ours=not peer)), ()).task(folder / "none", peer)
    further = {"repeat": 1, "full_matrices": case.full_matrices} if peer else {"repeat": _REPEATED}
    return {**{key: value for key, value in task.items() if key != "output"}, **further}


def _warm(folder: Path) -> dict[str, Any]:
    """A task that has everything imported."""
    sources = [str(path) for path in merge_workloads.alike(folder, (64, 64), 2, 2)]
    return {"method": "svd", "sources": sources, "repeat": 1}


@dataclass(frozen=True, slots=True)
class Peaks:
    """Peak memory of one method, MiB, by the number of layers."""

    method: str
    workers: int
    """0: as many as the machine allows."""
    by_layers: Mapping[int, float]

    @property
    def off(self) -> float:
        """How far the one that is most off is from that of the fewest layers, relative to it."""
        first = self.by_layers[min(self.by_layers)]
        return max(abs(peak - first) for peak in self.by_layers.values()) / first


def peaks(folder: Path, work: Path, layers: Sequence[int], methods: Sequence[str], say: Say) -> list[Peaks]:
    """Of merging three adapters, one module at a time and with the default of workers."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for count in layers:
        sources = tuple(merge_workloads.llama(folder, count, 3))
        names = tuple(n for n in merge_check.modules(sources[0]) if n.endswith(f".{count - 1}.self_attn.k_proj"))
        for method in methods:
            for workers in (1, 0):
                merge, out = Merge(method, sources, names), _room(work / "out")
                usage = measure.run(merge.command(out, "--workers", str(workers)))
                merge_check.check(sources, out, method, names)
                found.setdefault((method, workers), {})[count] = usage.peak
        say(f"memory: {count} layers")
    return [Peaks(method, workers, by_layers) for (method, workers), by_layers in found.items()]
