"""What `scripts/bench merge` measured, its promises, and its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import measure
from benchmarks.merge_check import DENSITY
from benchmarks.merge_jobs import INSIDE, PEER, PEER_INSIDE, Merge, Peaks, Taken
from benchmarks.merge_modules import Accuracy, Case
from benchmarks.merge_workloads import LLAMA
from benchmarks.promises import Promise, Target
from benchmarks.report import table
from benchmarks.samples import spread
from benchmarks.sdxl import SDXL

PACKAGES = ("adapterops", "torch", "numpy", "safetensors", "peft", "transformers")
FLAT = 0.2
"""By how much the peak may change with the number of layers."""
Rows = list[list[str]]


@dataclass(slots=True)
class Outcome:
    """Everything that one run of the benchmark measured."""

    runs: int
    layers: int
    merges: dict[str, Sequence[Merge]] = field(default_factory=dict)
    """By workload."""
    samples: Taken = field(default_factory=dict)
    cases: list[Case] = field(default_factory=list)
    accuracies: list[Accuracy] = field(default_factory=list)
    entries: int = 0
    """That were trimmed."""
    wrong: int = 0
    """Of those, which are not peft's."""
    peaks: list[Peaks] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "machine": measure.machine(),
            "load": measure.load(),
            "versions": measure.versions(*PACKAGES),
            "runs": self.runs,
            "layers": self.layers,
            "samples": {name: [asdict(sample) for sample in taken] for name, taken in self.samples.items()},
            "accuracies": [asdict(one) for one in self.accuracies],
            "trimming": {"entries": self.entries, "wrong": self.wrong},
            "peaks": [asdict(one) for one in self.peaks],
            "targets": [asdict(target) for target in self.targets],
        }

    @property
    def targets(self) -> list[Target]:
        """What is promised, beside what was measured."""
        out = [promise.target(self.samples) for promise in self._promises()]
        out += [
            _estimated(self, merge) for merge in self.merges.get("llama", ()) if merge.method == "svd" and self._svd
        ]
        out += [_accurate(one) for one in self.accuracies]
        if self.entries:
            out.append(Target("trimming", "no entry differs from peft's", f"{self.wrong:,}", self.wrong == 0))
        out += [_flat(one) for one in self.peaks if len(one.by_layers) > 1]
        return out

    @property
    def _svd(self) -> list[Case]:
        return [c for c in self.cases if c.method == "svd" and c.full_matrices and c.shape in LLAMA.values()]

    def _promises(self) -> list[Promise]:
        out = [
            Promise(
                "10 × faster than PEFT, the imports of both aside",
                of=(merge.name + PEER_INSIDE, "wall"), over=(merge.name + INSIDE, "wall"), least=10, job=merge.name,
            )
            for merge in self.merges.get("llama", ())
            if merge.method in ("linear", "cat")
        ]  # fmt: skip
        for case in (case for case in self.cases if case.least):
            against = "PEFT" if case.full_matrices else "PEFT with `svd_full_matrices=False`"
            out.append(
                Promise(
                    f"a module {case.least:g} × faster than {against}",
                    of=(case.name + PEER, "wall"), over=(case.name, "wall"), least=case.least, job=case.name,
                )
            )  # fmt: skip
        if self.entries:
            over = ("trimming", "wall")
            out.append(
                Promise("10 × faster than PEFT", of=("trimming" + PEER, "wall"), over=over, least=10, job="trimming")
            )
        return out


def _work(shape: tuple[int, int]) -> int:
    """What decomposing a matrix takes, but for a factor."""
    return shape[0] * shape[1] * min(shape)


def estimate(outcome: Outcome, shapes: Mapping[tuple[int, int], int], cases: Sequence[Case]) -> float:
    """Seconds that PEFT would need for so many modules of each shape by svd: measured where a shape was, and else in
    proportion to the work of the largest that was.
    """
    seconds = {case.shape: spread(outcome.samples, (case.name + PEER, "wall")).median for case in cases}
    largest = max(seconds, key=_work)
    return sum(
        count * seconds.get(shape, seconds[largest] * _work(shape) / _work(largest)) for shape, count in shapes.items()
    )


def _llama_shapes(layers: int) -> dict[tuple[int, int], int]:
    shapes = list(LLAMA.values())
    return {shape: layers * shapes.count(shape) for shape in shapes}


def _sdxl_shapes() -> dict[tuple[int, int], int]:
    shapes = [(module.shape[0], module.shape[1]) for module in SDXL.modules()]
    return {shape: shapes.count(shape) for shape in shapes}


def _estimated(outcome: Outcome, merge: Merge) -> Target:
    theirs = estimate(outcome, _llama_shapes(outcome.layers), outcome._svd)
    ours = spread(outcome.samples, (merge.name, "wall"))
    ratio = theirs / ours.median
    said = f"{ratio:,.0f} × of an estimated {theirs:,.0f} s"
    return Target(merge.name, "the whole command 100 × faster than PEFT would be (estimate)", said, ratio >= 100)


def _accurate(one: Accuracy) -> Target:
    said = f"{one.excess:.1e}" + ("" if one.differing is None else f", {one.differing:,} entries")
    promise = f"error at most {one.most:.0e} over the optimum's" + (
        "" if one.differing is None else ", delta as peft's"
    )
    return Target(f"{one.method} {one.shape[0]}×{one.shape[1]} to rank {one.rank}", promise, said, one.met)


def _flat(one: Peaks) -> Target:
    counts = f"{min(one.by_layers)} to {max(one.by_layers)} layers"
    job = f"{one.method}, {one.workers or 'usual'} worker{'' if one.workers == 1 else 's'}"
    return Target(job, f"peak memory within {FLAT:.0%} from {counts}", f"{one.off:.0%} off", one.off <= FLAT)


def report(outcome: Outcome, markdown: bool = True) -> str:
    """What it was measured on, and the tables."""
    parts = [f"Machine: {measure.machine()}; {measure.load()}.", f"Versions: {measure.versions(*PACKAGES)}."]
    titles = {
        "llama": f"Llama-3-8B, {_plural(outcome.layers)} ({7 * outcome.layers} modules), rank 16, bfloat16",
        "sdxl": "SDXL, 986 modules, rank 32, float16",
    }
    sections: list[tuple[str, Rows]] = []
    for name, merges in outcome.merges.items():
        rounds = f"{outcome.runs} round{'s'[: outcome.runs - 1]}; median (least-most)"
        sections.append((f"{titles[name]}: whole processes; {rounds}", _processes(outcome, merges)))
        sections.append((f"{titles[name]}: inside the process, imports aside; {rounds}", _inside(outcome, merges)))
    if outcome.cases:
        sections.append((f"One module: seconds; density {DENSITY:g}", _modules(outcome)))
    if outcome.accuracies:
        sections.append(("Errors against the best of the rank (three adapters, written as float32)", _errors(outcome)))
    if outcome.entries:
        sections.append((f"Trimming {outcome.entries / 1e6:.1f} million entries to {DENSITY:.0%}", _trimming(outcome)))
    if outcome.peaks:
        sections.append(("Peak memory, MiB, three adapters", _peaks(outcome)))
    sections.append(("Promises", _promises(outcome)))
    for title, rows in sections:
        parts += [("### " if markdown else "") + title, table(rows, markdown)]
    estimates = _estimates(outcome)
    return "\n\n".join([*parts, *estimates])


def _plural(layers: int) -> str:
    return f"{layers} layer{'s'[: layers - 1]}"


def _cell(outcome: Outcome, name: str, of: str, digits: int = 3) -> str:
    """Median and ends of a field; empty where it was not measured."""
    taken = outcome.samples.get(name)
    if not taken:
        return ""
    values = [getattr(sample, of) for sample in taken]
    return _text(measure.Spread.of([value for value in values if value is not None]), len(values), digits)


def _ratio(outcome: Outcome, peer: str, own: str) -> str:
    if peer not in outcome.samples or own not in outcome.samples:
        return ""
    return _text(spread(outcome.samples, (peer, "wall"), (own, "wall")), len(outcome.samples[own]), 1)


def _text(found: measure.Spread, count: int, digits: int) -> str:
    """Of one measurement there are no ends."""
    return found.text(digits) if count > 1 else f"{found.median:,.{digits}f}"


def _processes(outcome: Outcome, merges: Sequence[Merge]) -> Rows:
    rows = [["", "wall s", "CPU s", "peak MiB", "computing s", "PEFT wall s", "PEFT peak MiB", "× faster"]]
    for merge in (merge for merge in merges if merge.whole):
        own, peer = merge.name, merge.name + PEER
        rows.append(
            [
                merge.name, _cell(outcome, own, "wall"), _cell(outcome, own, "cpu"), _cell(outcome, own, "peak", 0),
                _cell(outcome, own, "compute"), _cell(outcome, peer, "wall"), _cell(outcome, peer, "peak", 0),
                _ratio(outcome, peer, own),
            ]
        )  # fmt: skip
    return rows


def _inside(outcome: Outcome, merges: Sequence[Merge]) -> Rows:
    parts = ("read", "compute", "write", "wall")
    rows = [
        ["", "read s", "merge s", "write s", "all s", *(f"PEFT {n} s" for n in ("load", "merge", "save", "all")), "×"]
    ]
    for merge in merges:
        own, peer = merge.name + INSIDE, merge.name + PEER_INSIDE
        if own in outcome.samples:
            cells = [_cell(outcome, name, part) for name in (own, peer) for part in parts]
            rows.append([merge.name, *cells, _ratio(outcome, peer, own)])
    return rows


def _modules(outcome: Outcome) -> Rows:
    rows = [["", "adapters", "rank", "PEFT's `svd_full_matrices`", "s", "PEFT s", "× faster"]]
    for case in outcome.cases:
        rows.append(
            [
                f"{case.method} {case.shape[0]}×{case.shape[1]}", str(case.count), str(case.rank), str(case.full_matrices),
                _cell(outcome, case.name, "wall", 4), _cell(outcome, case.name + PEER, "wall", 2),
                _ratio(outcome, case.name + PEER, case.name),
            ]
        )  # fmt: skip
    return rows


def _errors(outcome: Outcome) -> Rows:
    rows = [["", "rank", "excess error", "entries of the merged delta that are not peft's", "largest difference"]]
    for one in outcome.accuracies:
        differing = "" if one.differing is None else f"{one.differing:,}"
        largest = "" if one.largest is None else f"{one.largest:.0e}"
        rows.append(
            [f"{one.method} {one.shape[0]}×{one.shape[1]}", str(one.rank), f"{one.excess:.1e}", differing, largest]
        )
    return rows


def _trimming(outcome: Outcome) -> Rows:
    rows = [["", "s", "× faster"]]
    for title, name in (
        ("adapterops: the threshold alone", "trimming threshold"),
        ("adapterops: trimmed", "trimming"),
        ("peft: `magnitude_based_pruning`", "trimming" + PEER),
    ):
        faster = "" if name.endswith(PEER) else _ratio(outcome, "trimming" + PEER, name)
        rows.append([title, _cell(outcome, name, "wall"), faster])
    return rows


def _peaks(outcome: Outcome) -> Rows:
    layers = sorted({count for one in outcome.peaks for count in one.by_layers})
    rows = [["", "workers", *(_plural(count) for count in layers)]]
    for one in outcome.peaks:
        cells = [f"{one.by_layers[count]:.0f}" if count in one.by_layers else "" for count in layers]
        rows.append([one.method, str(one.workers or "usual"), *cells])
    return rows


def _promises(outcome: Outcome) -> Rows:
    rows = [["promised of", "promise", "measured", ""]]
    for target in outcome.targets:
        rows.append([target.job, target.promise, target.measured, "met" if target.met else "**not met**"])
    return rows


def _estimates(outcome: Outcome) -> list[str]:
    """How long PEFT would take for the whole of what it was measured on single modules of."""
    sdxl = [case for case in outcome.cases if case.shape not in LLAMA.values()]
    parts = [
        ("llama", f"the {7 * outcome.layers} modules of Llama-3-8B", outcome._svd, _llama_shapes(outcome.layers)),
        ("sdxl", "the 986 modules of SDXL", sdxl, _sdxl_shapes()),
    ]
    out = []
    for name, title, cases, shapes in parts:
        if cases:
            seconds = estimate(outcome, shapes, cases)
            line = f"PEFT's svd of {title} would take {seconds:,.0f} s (estimated from single ones)"
            for merge in (m for m in outcome.merges.get(name, ()) if m.method == "svd" and len(m.sources) > 1):
                ours = spread(outcome.samples, (merge.name, "wall")).median
                line += f"; the whole command ({merge.name}) is {seconds / ours:,.0f} × faster"
            out.append(line + ".")
    return out
