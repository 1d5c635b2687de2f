"""`scripts/fuzz`: a few hundred damaged adapters are answered cleanly, and each kind of fault would be found."""

from __future__ import annotations

import itertools
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from fuzzing import inputs, report, seeds, workers
from fuzzing.check import Outcome

import adapterops as ao
from adapterops import registry
from adapterops.storage import safetensors


def run(numbers: range, seconds: float = 10.0) -> tuple[list[Outcome], report.Tally]:
    outcomes: list[Outcome] = []
    tally = report.Tally(0)

    def tell(outcome: Outcome) -> None:
        outcomes.append(outcome)
        tally.add(outcome)

    workers.run(numbers, workers.Plan(0, seconds, cli_every=0), 2, tell)
    return outcomes, tally


def test_damaged_adapters_are_refused_cleanly_or_converted() -> None:
    numbers = range(400)
    outcomes, tally = run(numbers)
    assert sorted(o.number for o in outcomes) == list(numbers)
    assert not tally.faults, tally.text()
    # Not everything stops at the first check.
    assert tally.outcomes["converted"] > len(numbers) // 40
    assert len(tally.outcomes) > 8
    assert tally.kinds.keys() == inputs.WEIGHTS.keys()


def test_an_input_depends_on_the_seed_and_its_number_alone() -> None:
    first = [inputs.make(3, n) for n in range(40)]
    assert first[::-1] == [inputs.make(3, n) for n in reversed(range(40))]
    assert first != [inputs.make(4, n) for n in range(40)]


NOT_FROM_TABLES = {
    "clip-lora",
    "cloneofsimo",
    "cloneofsimo-0.15",
    "cloneofsimo-list",
    "gguf",
    "mlx",
    "sam-lora",
    "sd-scripts-oft",
    "sd-scripts-oft-flux",
    "tgis",
}
"""Dialects that number modules, or stand in containers of their own: what is damaged of them are fixtures."""


@pytest.mark.parametrize(
    "name", [d.name for f in registry.formats().values() for d in f.dialects if d.name not in NOT_FROM_TABLES]
)
def test_every_dialect_has_a_sound_seed(name: str, tmp_path: Path) -> None:
    every = [s for s in seeds.from_tables() if s.name.startswith(f"{name}/")]
    own = [s for s in every if "/lora of" in s.name] or every
    refused = {}
    for number, sample in enumerate(own):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file, data in inputs.in_folder(sample).items():
            (folder / file).write_bytes(data)
        try:
            ao.load(folder, format=name)
        except ao.AdapterOpsError as error:
            refused[sample.name] = str(error)
    assert len(refused) < len(own), refused


def _raise(*arguments: Any) -> Any:
    raise KeyError("planted")


def _hang(*arguments: Any) -> Any:
    while True:
        time.sleep(0.01)


def _die(*arguments: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def _leave(*arguments: Any) -> Any:
    Path(".adapterops-left").mkdir(exist_ok=True)
    raise ao.AdapterOpsError("refused")


_HELD: list[mmap.mmap] = []


def _hold(*arguments: Any) -> Any:
    # Pages of its own: a large hole in this process's heap, resident since some earlier test, could hold what malloc gives.
    room = mmap.mmap(-1, 400 << 20)
    for _ in range(400):
        room.write(b"x" * (1 << 20))
    _HELD.append(room)
    raise ao.AdapterOpsError("refused")


def _exhaust(*arguments: Any) -> Any:
    return bytearray(1 << 40)


def _change(path: str, *arguments: Any) -> Any:
    Path(path).write_bytes(b"changed")
    raise ao.AdapterOpsError("refused")


def _say_control(*arguments: Any) -> Any:
    error = ao.AdapterOpsError("refused")
    error.args = ("\x1b[2J",)  # Past the escaping that the class does itself.
    raise error


@pytest.mark.parametrize(
    ("fault", "signature"),
    [
        (_raise, "KeyError"),
        (_hang, "hang"),
        (_die, "the process died (signal 9)"),
        (_leave, "left behind"),
        (_hold, "memory"),
        (_exhaust, "MemoryError"),
        (_change, "the source was changed"),
        (_say_control, "control characters"),
    ],
)
def test_a_planted_fault_is_found(fault: Callable[..., Any], signature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds.samples()
    made = ((number, inputs.make(0, number)) for number in itertools.islice(itertools.count(), 200))
    plain = next(n for n, i in made if i.kind == "metadata" and all(name.endswith(".safetensors") for name in i.files))
    monkeypatch.setattr(safetensors, "read_header", fault)
    _, tally = run(range(plain, plain + 1), seconds=0.3 if fault is _hang else 30.0)
    assert any(signature in found for found in tally.faults), tally.text()
    assert f"--only {plain}" in tally.text()


def test_a_dead_process_costs_its_own_input_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds.samples()
    monkeypatch.setattr(safetensors, "read_header", _die)
    # One that is no safetensors file, among its neighbours.
    spared = next(n for n in itertools.count(6) if not any(f.endswith(".safetensors") for f in inputs.make(0, n).files))
    numbers = range(spared - 6, spared + 6)
    outcomes, tally = run(numbers)
    assert sorted(o.number for o in outcomes) == list(numbers)
    assert {o.result for o in outcomes} > {"fault"}
    assert set(tally.faults) == {"the process died (signal 9)"}


def test_kept_inputs_can_be_looked_at(tmp_path: Path) -> None:
    place = report.save(tmp_path, 0, Outcome(5, "bytes", ""))
    given = inputs.make(0, 5)
    assert {str(p.relative_to(place / "in")) for p in (place / "in").rglob("*") if p.is_file()} == set(given.files)
    assert (place / "finding.json").is_file()
