"""Baselines: today's findings are accepted, new ones told, and entries that match nothing any more are told of."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adapterops.errors import OutputFailed, UsageError
from adapterops.validation import baseline
from adapterops.validation.report import Checked, Report
from adapterops.validation.rule import Finding, Rule, Severity

NAN = Rule("T101", "not-finite", Severity.ERROR, why="w", remedy="r", fires="f", passes="p")
CARD = Rule("D601", "no-licence", Severity.INFO, why="w", remedy="r", fires="f", passes="p")


def _checked(path: Path, *findings: Finding) -> Checked:
    return Checked(str(path), findings=tuple(replace(f, adapter=str(path)) for f in findings))


def _report(root: Path, *adapters: Checked, rules: tuple[Rule, ...] = (NAN, CARD)) -> Report:
    return Report(adapters, rules)


def _sample(root: Path) -> Report:
    a, b = root / "zoo" / "a.safetensors", root / "zoo" / "b"
    return _report(
        root,
        _checked(a, NAN.found(str(a), "NaN in k1", ["k1", "k2"])),
        _checked(b, CARD.found(str(b / "README.md"), "no licence", field="license")),
    )


def test_what_was_accepted_is_not_told_again(tmp_path: Path) -> None:
    path = str(tmp_path / "ci" / "baseline.json")
    (tmp_path / "ci").mkdir()
    baseline.write(path, _sample(tmp_path))
    report, stale = baseline.apply(baseline.load(path), _sample(tmp_path))
    assert (report.findings, report.accepted, stale) == ((), 2, 0)
    assert len(report.adapters) == 2


def test_paths_are_relative_to_the_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "baseline.json"
    baseline.write(str(path), _sample(tmp_path))
    assert [e["adapter"] for e in json.loads(path.read_text())["findings"]] == ["zoo/a.safetensors", "zoo/b"]
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    path.rename(elsewhere / "baseline.json")
    monkeypatch.chdir(elsewhere)
    report, stale = baseline.apply(baseline.load("baseline.json"), _sample(elsewhere))
    assert (report.accepted, stale) == (2, 0)


def test_messages_may_change_and_facts_may_not(tmp_path: Path) -> None:
    path = str(tmp_path / "baseline.json")
    baseline.write(path, _sample(tmp_path))
    a = tmp_path / "zoo" / "a.safetensors"

    def accepted(*findings: Finding) -> int:
        return baseline.apply(baseline.load(path), _report(tmp_path, _checked(a, *findings)))[0].accepted

    assert accepted(NAN.found(str(a), "worded otherwise", ["k2", "k1"])) == 1
    assert accepted(NAN.found(str(a), "NaN in k1", ["k1", "k2", "k3"])) == 0
    assert accepted(NAN.found(str(a), "NaN in k1", ["k1", "k2"], field="x")) == 0
    assert accepted(CARD.found(str(a), "NaN in k1", ["k1", "k2"])) == 0
    assert accepted(*[NAN.found(str(a), "NaN", ["k1", "k2"])] * 2) == 1, "one entry accepts one finding"


def test_the_file_is_the_same_for_the_same_findings(tmp_path: Path) -> None:
    one, two = tmp_path / "1.json", tmp_path / "2.json"
    sample = _sample(tmp_path)
    baseline.write(str(one), sample)
    baseline.write(str(two), replace(sample, adapters=sample.adapters[::-1]))
    assert one.read_bytes() == two.read_bytes()
    assert [line for line in one.read_text().splitlines() if "zoo/" in line] == [
        '    {"adapter": "zoo/a.safetensors", "code": "T101", "at": "1ad8e75923998ab2"},',
        '    {"adapter": "zoo/b", "code": "D601", "at": "67db5b2efd178ac6"}',
    ], "a line a finding, and the hashes of every version"
    baseline.write(str(two), _report(tmp_path))
    assert json.loads(two.read_text()) == {"version": 1, "findings": []}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.json", "2.json"]


def test_stale_entries_are_those_that_could_have_matched(tmp_path: Path) -> None:
    path = str(tmp_path / "baseline.json")
    baseline.write(path, _sample(tmp_path))
    known = baseline.load(path)
    b = tmp_path / "zoo" / "b"

    def stale(report: Report) -> int:
        return baseline.apply(known, report)[1]

    assert stale(_report(tmp_path, _checked(b))) == 2, "b was mended, a is gone"
    b.mkdir(parents=True)
    (tmp_path / "zoo" / "a.safetensors").touch()
    assert stale(_report(tmp_path, _checked(b))) == 1, "a is there and was not looked at"
    assert stale(_report(tmp_path, _checked(b), rules=(NAN,))) == 0, "its rule was not asked"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no baseline"),
        ("[]", "is no baseline"),
        ('{"version": 1}', "is no baseline"),
        ('{"version": 1, "findings": [3]}', "is no baseline"),
        ('{"version": 2, "findings": []}', "is a baseline of version 2"),
        ("[" * 100_000, "is no baseline"),
    ],
)
def test_what_is_no_baseline_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        baseline.load(str(path))


def test_a_missing_one_and_one_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No such file or directory; --write-baseline .* makes a baseline"):
        baseline.load(str(tmp_path / "none.json"))
    with pytest.raises(OutputFailed, match="cannot be written: No such file"):
        baseline.write(str(tmp_path / "none" / "b.json"), _sample(tmp_path))


def test_names_on_the_hub_stay_as_they_are(tmp_path: Path) -> None:
    name = "hf://owner/repo@main"
    report = Report((Checked(name, findings=(replace(NAN.found(name, "x"), adapter=name),)),), (NAN,))
    baseline.write(str(tmp_path / "b.json"), report)
    known = baseline.load(str(tmp_path / "b.json"))
    assert [entry[0] for entry in known.entries] == [name]
    assert baseline.apply(known, report)[0].accepted == 1
    assert baseline.apply(known, Report((), (NAN,)))[1] == 0
