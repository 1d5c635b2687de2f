"""Several processes: order, and what becomes of the others' results when one fails, dies, or is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sound import diffusers_file, kohya_file, peft_folder
from worker_stand_in import examine

import adapterops as ao
from adapterops.errors import AdapterOpsError, UsageError
from adapterops.storage.folder import LocalFolder
from adapterops.validation import registry, workers
from adapterops.validation.options import Options
from adapterops.validation.report import Checked
from adapterops.validation.subject import Place
from adapterops.validation.workers import run_all


def _places(*names: str, folder: str = "zoo") -> list[Place]:
    return [Place(LocalFolder(folder), name) for name in names]


def _run(places: list[Place], jobs: int) -> list[Checked]:
    return list(run_all(examine, places, Options(), registry.rules(), jobs))


def test_results_are_in_order_and_of_several_processes(tmp_path: Path) -> None:
    places = _places(*(f"meets{n}" for n in range(50)), folder=str(tmp_path))
    found = _run(places, 3)
    assert [checked.path for checked in found] == [place.path for place in places]
    assert 2 <= len({checked.dialect for checked in found}) <= 3
    assert str(os.getpid()) not in {checked.dialect for checked in found}
    assert {checked.bytes for checked in found} == {len(registry.rules())}


def test_one_process_is_this_one() -> None:
    assert {checked.dialect for checked in _run(_places("a", "b"), 1)} == {str(os.getpid())}


def test_few_adapters_start_no_processes() -> None:
    few, many = _places(*"ab"), _places(*map(str, range(workers.MANY + 1)))
    assert {checked.dialect for checked in _run(few, 0)} == {str(os.getpid())}
    inside = str(os.getpid()) in {checked.dialect for checked in _run(many, 0)}
    assert inside == (len(os.sched_getaffinity(0)) == 1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_unexpected_failure_is_a_finding(jobs: int) -> None:
    found = _run(_places("a", "raises", "refuses", "b"), jobs)
    assert [[f.code for f in checked.findings] for checked in found] == [[], ["X001"], ["X001"], []]
    (finding,) = found[1].findings
    assert finding.adapter == finding.file == os.path.join("zoo", "raises")
    assert "RuntimeError: a fault of ours (at validation/worker_stand_in.py:" in finding.message
    assert "AdapterOpsError: nobody took this up" in found[2].findings[0].message


@pytest.mark.parametrize(("name", "how"), [("dies", "killed by SIGKILL"), ("exits", "exit status 3")])
def test_a_worker_that_dies_takes_only_its_adapter_along(name: str, how: str) -> None:
    names = [f"{n}" for n in range(40)]
    names[11] = names[30] = name
    found = _run([Place(LocalFolder("zoo"), n) for n in names], 2)
    assert [checked.path for checked in found] == [os.path.join("zoo", n) for n in names]
    assert [n for n, checked in zip(names, found, strict=True) if checked.findings] == [name, name]
    (finding,) = found[11].findings
    assert finding.code == "X001"
    assert how in finding.message


def test_every_worker_may_die() -> None:
    found = _run(_places(*(f"dies{n}" for n in range(5))), 2)
    assert [[f.code for f in checked.findings] for checked in found] == [["X001"]] * 5


@pytest.mark.parametrize("jobs", [1, 2])
def test_wrong_usage_ends_the_work(jobs: int) -> None:
    with pytest.raises(UsageError, match="--load-test needs peft"):
        _run(_places(*"abc", "usage", *"def"), jobs)


def test_workers_that_cannot_start_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_BOOT", "raise SystemExit(7)")
    with pytest.raises(AdapterOpsError, match=r"could not be started \(exit status 7\); --jobs 1"):
        _run(_places(*"abc"), 2)


def test_progress_counts_up_to_all() -> None:
    told: list[tuple[int, int]] = []
    for jobs in (1, 2):
        told.clear()
        list(run_all(examine, _places(*"abcde"), Options(), (), jobs, lambda done, total: told.append((done, total))))
        assert told == [(n, 5) for n in range(6)]


def _children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for the processes")
def test_nothing_is_left_when_the_results_are_not_wanted() -> None:
    before = _children()
    results = run_all(examine, _places(*map(str, range(40))), Options(), (), 2)
    next(results)
    assert len(_children() - before) == 2
    results.close()  # type: ignore[attr-defined]
    assert _children() - before == set()


def _alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for the processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_workers_at_once(tmp_path: Path, number: signal.Signals) -> None:
    script = (
        "from worker_stand_in import *; from adapterops.validation.workers import *\n"
        f"list(run_all(examine, [Place(LocalFolder({str(tmp_path)!r}), f'slow{{n}}') for n in '12'], Options(), (), 2))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(pids := [path.read_text() for path in tmp_path.glob("*.pid")]) < 2 or not all(pids):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert b"KeyboardInterrupt" in said
    assert [pid for pid in map(int, pids) if _alive(pid)] == []


def test_the_same_is_found_in_any_number_of_processes(tmp_path: Path) -> None:
    peft_folder(tmp_path)
    kohya_file(tmp_path)
    diffusers_file(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    one, two = (ao.validate(tmp_path, jobs=jobs).to_dict() for jobs in (1, 2))
    assert one == two
    assert len(one["adapters"]) == 4


def test_a_checker_that_fails_does_not_lose_the_other_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kohya_file(tmp_path, "a.safetensors")
    kohya_file(tmp_path, "b.safetensors")
    broken = registry.checker(*registry.rules())(
        lambda subject: [][int(subject.path.endswith("a.safetensors")) - 1 :][0]
    )
    monkeypatch.setattr(registry, "checkers", lambda: (broken,))
    report = ao.validate(tmp_path)
    assert [f.code for f in report] == ["X001", "X001"]
    assert "IndexError" in report.findings[0].message
    assert report.exit_code() == 1


def test_a_base_goes_to_the_workers(tmp_path: Path) -> None:
    for name in "abc":
        kohya_file(tmp_path, f"{name}.safetensors")
    report = ao.validate(tmp_path, arch="sd1", jobs=2)
    assert [adapter.architecture for adapter in report.adapters] == ["sd1"] * 3
    assert [f.code for f in report] == []
