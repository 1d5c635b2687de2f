"""The machinery of `scripts/bench validate`, with tiny adapters: files, jobs, tables.  No timing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from benchmarks import validate, validate_jobs, validate_make
from benchmarks.samples import Sample

import adapterops as ao


def test_small_adapters_are_of_three_kinds_and_some_size(tmp_path: Path) -> None:
    paths = validate_make.small(tmp_path, 12)
    counts = []
    for file in validate_jobs.weights([str(path) for path in paths]):
        with safe_open(file, "pt") as opened:
            counts.append(len(opened.keys()))
    assert min(counts) >= 50
    assert max(counts) <= 160
    found = ao.validate(*paths)
    assert {a.dialect for a in found.adapters} >= {"peft", "diffusers"}
    assert [finding.code for finding in found if finding.code[0] in "TS"] == []
    assert len({tuple(path.read_bytes()) for path in paths if path.is_file()}) == sum(path.is_file() for path in paths)


def test_large_adapters_are_sound(tmp_path: Path) -> None:
    paths = validate_make.large(tmp_path, 1)
    assert [path.stem for path in paths] == ["F16", "BF16", "F32"]
    assert [f.code for f in ao.validate(*paths) if f.code[0] == "T"] == []


@pytest.mark.parametrize("job", validate_jobs.JOBS)
def test_every_job_sees_every_adapter(tmp_path: Path, job: str, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in validate_make.small(tmp_path / "small", 3)]
    listed = tmp_path / "paths.json"
    listed.write_text(json.dumps(paths))
    validate_jobs.main(job, [f"@{listed}"])
    assert json.loads(capsys.readouterr().out)["adapters"] == 3


def test_promises_are_measured_within_a_round(tmp_path: Path) -> None:
    part = validate.large(tmp_path, 1)
    samples = {
        "tensors": [Sample(2.0, 2.0, 90.0, copy=1.5)],
        "alone": [Sample(2.5, 2.5, 80.0, copy=2.0)],
        "reading": [Sample(1.0, 1.0, 30.0, copy=1.0)],
        "touching": [Sample(1.0, 1.0, 500.0, copy=1.2)],
    }
    share, peak = validate.promised(part, samples)
    assert (share.met, share.measured.split()[0]) == (True, "0.67")
    assert peak.met
    slow = {**samples, "tensors": [Sample(9.0, 9.0, 9999.0, copy=2.5)]}
    assert [target.met for target in validate.promised(part, slow)] == [False, False]
    text = validate.report([(part, samples)], markdown=True)
    assert "0.5 × the rate of reading the bytes" in text
