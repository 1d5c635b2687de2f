"""`adapterops validate`, `rules` and `rule`: what they print, and their exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from outcome import Outcome

import adapterops as ao
from adapterops.validation import registry

sys.path.insert(0, str(Path(__file__).parents[1] / "validation"))
from sound import diffusers_file, edit, kohya_file, peft_folder, set_config

Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder with settings of no meaning, so that none from above count."""
    monkeypatch.chdir(tmp_path)
    Path(".adapterops.toml").write_text("[validate]\n")


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A sound folder, a file with an error (half of a module is gone), a folder with a warning and one with an info."""
    place = tmp_path / "zoo"
    peft_folder(place, name="a-sound")
    edit(kohya_file(place, "b-error.safetensors"), lambda t: {k: v for k, v in t.items() if k != sorted(t)[2]})
    set_config(peft_folder(place, name="c-warning"), base_model_name_or_path="/home/me/llama")
    (peft_folder(place, name="d-info") / "README.md").unlink()
    return place


def _found(outcome: Outcome) -> list[tuple[str, str]]:
    """The adapters' names and the codes, from the text."""
    lines = re.findall(r"^(\S+?): (?:error|warning|info) ([A-Z]\d{3}) ", outcome.out, re.MULTILINE)
    return [(Path(path).parts[1], code) for path, code in lines]


@pytest.fixture
def expected(zoo: Path) -> list[tuple[str, str]]:
    """What is found in the zoo, by name and code, as the library tells it: an error, a warning, an info."""
    found = list(ao.validate("zoo"))
    assert [f"{Path(f.adapter).name} {f.severity}" for f in found] == [
        "b-error.safetensors error",
        "c-warning warning",
        "d-info info",
    ]
    return [(Path(f.adapter).name, f.code) for f in found]


def test_findings_remedies_a_table_and_a_summary(command: Command, expected: list[tuple[str, str]]) -> None:
    outcome = command("validate", "zoo")
    assert sorted(_found(outcome)) == sorted((name, code) for name, code in expected)
    lines = outcome.out.splitlines()
    assert sum(line.startswith("    help: ") for line in lines) == 3
    assert any(line.startswith("findings  adapters  code") for line in lines)
    assert lines[-1].startswith("Checked 4 adapters: 1 error, 1 warning, 1 info")
    assert (outcome.code, outcome.err) == (1, "")


@pytest.mark.parametrize(
    ("name", "options", "code"),
    [
        ("a-sound", ["--strict"], 0),
        ("b-error.safetensors", [], 1),
        ("b-error.safetensors", ["--exit-zero"], 0),
        ("b-error.safetensors", ["--format", "json"], 1),
        ("c-warning", [], 0),
        ("c-warning", ["--strict"], 1),
        ("c-warning", ["--strict", "--format", "sarif"], 1),
        ("c-warning", ["--strict", "--exit-zero"], 0),
        ("d-info", ["--strict"], 0),
    ],
)
def test_exit_status(command: Command, zoo: Path, name: str, options: list[str], code: int) -> None:
    assert command("validate", zoo / name, *options).code == code


def test_success_is_a_line(command: Command, zoo: Path) -> None:
    outcome = command("validate", "zoo/a-sound")
    assert outcome.out == f"All checks passed: 1 adapter, {len(registry.rules())} rules\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        ([], "Missing argument 'SRC...'"),
        (["zoo", "--select", "Q"], "no rule is called 'Q'"),
        (["zoo", "--ignore", "not-finit"], "no rule is called 'not-finit'"),
        (["zoo", "--select", ","], "names nothing"),
        (["zoo", "--targets", "pefft"], "'pefft' is none of peft, diffusers"),
        (["zoo", "--arch", "sd1", "--base", "config.json"], "--arch and --base both name the base model"),
        (["zoo", "--format", "xml"], "'xml' is not one of 'text', 'json', 'sarif', 'junit', 'github'"),
        (["zoo", "--jobs", "0"], "0 is not in the range"),
        (["zoo", "--config", "none.toml"], "none.toml: cannot be read"),
        (["zoo", "--config", "none.toml", "--isolated"], "give one of them"),
        (["zoo", "--baseline", "none.json"], "none.json: No such file"),
        (["zoo", "--fix", "--diff"], "give one of them"),
        (["zoo", "--diff", "--format", "sarif"], "it takes no --format"),
        (["zoo", "--fix", "--write-baseline", "b.json"], "do one after the other"),
        (["zoo", "-o", "none/x.txt"], "none/x.txt: cannot be written"),
        (["zoo", "--statistics", "--format", "github"], "--statistics is a table of text"),
        (["zoo", "--statistics", "--diff"], "give one of them"),
        (["zoo", "--select", "t1"], "did you mean T1?"),
        (["zoo", "--select", "Dead-Target"], "did you mean dead-target?"),
    ],
)
def test_wrong_usage_is_2(command: Command, zoo: Path, arguments: list[str], said: str) -> None:
    outcome = command("validate", *arguments)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.out == ""


def test_wrong_usage_is_json_where_json_is_asked_for(command: Command) -> None:
    outcome = command("validate", "nowhere", "--format", "json")
    assert outcome.code == 2
    assert "no such file" in json.loads(outcome.out)["error"]["message"]
    outcome = command("validate", "zoo", "--json", "--format", "text")
    assert outcome.code == 2
    assert "give one of them" in json.loads(outcome.out)["error"]["message"]


def test_json_is_short_for_its_format(command: Command, zoo: Path) -> None:
    short = command("validate", "zoo", "--json")
    assert (short.out, short.code, short.err) == (command("validate", "zoo", "--format", "json").out, 1, "")


def test_no_rule_at_all_is_no_success(command: Command, zoo: Path) -> None:
    for options in (["--select", "T", "--ignore", "T1"], ["--select", "T110", "--header-only"]):
        outcome = command("validate", "zoo", *options)
        assert outcome.out == "Nothing was checked: no rule is left to ask (4 adapters)\n"


def test_what_is_wrong_inside_a_file_is_a_finding(command: Command, tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "folder").mkdir()
    for name in ("empty.safetensors", "text.safetensors", "folder"):
        outcome = command("validate", name, "--format=json")
        found = json.loads(outcome.out)["adapters"][0]["findings"]
        assert [f["severity"] for f in found] == ["error"], name
        assert (outcome.code, outcome.err) == (1, "")


def test_json_and_nothing_else(command: Command, zoo: Path, expected: list[tuple[str, str]]) -> None:
    outcome = command("validate", "zoo", "--format", "json")
    document = json.loads(outcome.out)
    assert [(Path(a["path"]).name, f["code"]) for a in document["adapters"] for f in a["findings"]] == expected
    assert document["summary"]["adapters"] == 4
    assert (outcome.code, outcome.err) == (1, "")


def test_a_report_in_a_file(command: Command, zoo: Path) -> None:
    outcome = command("validate", "zoo", "--format", "junit", "-o", "report.xml")
    assert outcome.out == ""
    assert outcome.err.startswith("Checked 4 adapters: 1 error")
    assert len(ElementTree.parse("report.xml").getroot()) == 4
    command("validate", "zoo", "--format", "sarif", "-o", "report.sarif")
    assert len(json.loads(Path("report.sarif").read_text())["runs"][0]["results"]) == 3


def test_select_and_ignore(command: Command, zoo: Path, expected: list[tuple[str, str]]) -> None:
    def codes(*options: str) -> list[str]:
        document = json.loads(command("validate", "zoo", "--format", "json", *options).out)
        return [f["code"] for a in document["adapters"] for f in a["findings"]]

    error, warning, info = (code for _, code in expected)
    assert codes("--select", error) == [error]
    assert codes("--select", f"{error},{info[0]}") == [error, info]
    assert codes("--select", error, "--select", registry.find(warning).name) == [error, warning]
    assert codes("--ignore", f"{error[0]}, {warning[0]}") == [info]
    assert codes("--ignore", "ALL", "--select", warning) == [warning]


def test_settings_hold_and_the_command_line_wins(command: Command, zoo: Path, expected: list[tuple[str, str]]) -> None:
    error, warning, info = (code for _, code in expected)
    Path(".adapterops.toml").write_text(
        f"""[validate]
ignore = ["{error}"]
extend-ignore = ["{info}"]
strict = true
format = "json"
exclude = ["a-*"]
"""
    )

    def run(*options: str) -> tuple[list[str], Outcome]:
        outcome = command("validate", "zoo", *options)
        return [f["code"] for a in json.loads(outcome.out)["adapters"] for f in a["findings"]], outcome

    codes, outcome = run()
    assert (codes, outcome.code) == ([warning], 1)
    assert outcome.err == "note: 1 adapter left out (.adapterops.toml: exclude)\n"
    codes, outcome = run("--ignore", warning, "--no-strict")
    assert (codes, outcome.code) == ([error], 1)
    codes, _ = run("--isolated", "--format", "json")
    assert codes == [error, warning, info]
    Path("other.toml").write_text('[validate.per-file-ignores]\n"zoo/c-*" = ["ALL"]')
    codes, _ = run("--config", "other.toml", "--format", "json")
    assert codes == [error, info]
    Path(".adapterops.toml").write_text("[validate]\nselekt = []")
    outcome = command("validate", "zoo")
    assert outcome.code == 2
    assert ".adapterops.toml: there is no setting 'selekt'; did you mean select?" in outcome.err


def test_settings_may_stand_above(command: Command, zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("baseline.json").write_text('{"version": 1, "findings": []}')
    Path(".adapterops.toml").write_text('[validate]\nbaseline = "baseline.json"\nselect = ["D"]')
    monkeypatch.chdir(zoo)
    outcome = command("validate", ".")
    assert (outcome.code, outcome.err) == (0, "")
    assert "Checked 4 adapters: 1 info" in outcome.out


def test_a_baseline_accepts_today(command: Command, zoo: Path) -> None:
    outcome = command("validate", "zoo", "--write-baseline", "baseline.json")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == "accepted 3 findings of 4 adapters in baseline.json\n"
    outcome = command("validate", "zoo", "--baseline", "baseline.json", "--strict")
    assert outcome.code == 0
    assert "(3 findings accepted by the baseline)" in outcome.out
    kohya_file(zoo, "b-error.safetensors")
    (zoo / "e-new").mkdir()
    (zoo / "e-new" / "adapter_model.safetensors").touch()
    outcome = command("validate", "zoo", "--baseline", "baseline.json")
    assert outcome.code == 1
    assert {name for name, _ in _found(outcome)} == {"e-new"}
    assert "note: baseline.json: 1 entry matches nothing any more" in outcome.err


def test_statistics_are_counts(command: Command, zoo: Path) -> None:
    outcome = command("validate", "zoo", "--statistics")
    assert _found(outcome) == []
    assert len([line for line in outcome.out.splitlines() if re.match(r"1 +1 +[A-Z]\d{3} ", line)]) == 3
    Path(".adapterops.toml").write_text('[validate]\nformat = "github"\n')
    assert command("validate", "zoo", "--statistics").out == outcome.out


def test_the_fixable_is_mended_and_looked_at_again(command: Command, tmp_path: Path) -> None:
    folder = set_config(peft_folder(tmp_path), target_modules=["query", "value"])
    before = (folder / "adapter_config.json").read_bytes()
    outcome = command("validate", folder)
    assert outcome.code == 1
    assert ": error C241 [*] " in outcome.out
    assert outcome.out.splitlines()[-1].endswith("1 fixable with --fix")

    outcome = command("validate", folder, "--diff")
    assert outcome.code == 1
    assert '-    "query",' in outcome.out
    assert re.search(r'^\+  "target_modules": .*q_proj', outcome.out, re.MULTILINE)
    assert outcome.err.startswith("--fix would change 1 thing; 1 finding in 1 adapter")
    assert (folder / "adapter_config.json").read_bytes() == before

    outcome = command("validate", folder, "--fix")
    assert outcome.code == 0
    assert re.match(rf"Fixed {re.escape(str(folder))}: .+\nAll checks passed: 1 adapter", outcome.out)
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] != ["query", "value"]

    outcome = command("validate", folder, "--fix", "--format", "json")
    assert (outcome.code, json.loads(outcome.out)["fixed"]) == (0, [])
    assert command("validate", folder, "--diff").out == ""


def test_what_cannot_be_mended_is_said(command: Command, tmp_path: Path) -> None:
    real = set_config(peft_folder(tmp_path / "real"), target_modules=["query", "value"])
    folder = shutil.copytree(real, tmp_path / "linked")
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(real / "adapter_config.json")
    outcome = command("validate", folder, "--fix")
    assert outcome.code == 1
    assert "error C241 [*]" in outcome.out
    assert f"note: {folder}: C241 is not mended: " in outcome.err


def test_a_named_file_that_gets_another_name_is_looked_at_again(command: Command, tmp_path: Path) -> None:
    path = diffusers_file(tmp_path).rename(tmp_path / "pytorch_lora_weights.bin")
    outcome = command("validate", path, "--fix")
    assert outcome.code == 0, outcome
    assert "All checks passed: 1 adapter" in outcome.out
    assert (tmp_path / "pytorch_lora_weights.safetensors").exists()


def test_many_adapters_on_several_processes(command: Command, zoo: Path) -> None:
    for number in range(20):
        shutil.copy(zoo / "b-error.safetensors", zoo / f"e{number:02}.safetensors")
    one, two, many = (command("validate", "zoo", *jobs) for jobs in (["--jobs", 1], ["-j", 2], []))
    assert one == two == many
    assert "Checked 24 adapters: 21 errors" in one.out


def test_hostile_names_do_not_reach_the_terminal(command: Command, tmp_path: Path) -> None:
    (tmp_path / "x\x1b[2Jy\udcff.safetensors").write_bytes(b"nothing")
    for name in ("text", "github", "junit", "sarif", "json"):
        outcome = command("validate", tmp_path, "--format", name)
        assert outcome.code == 1
        assert "\x1b" not in outcome.out + outcome.err, name


def _on_a_terminal(*arguments: str, **environment: str) -> str:
    """What the command shows on a terminal, its stderr included."""
    ours, theirs = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "adapterops", *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # as a terminal ends on Linux
        pass
    finally:
        os.close(ours)
        done.wait(timeout=60)
    return shown.decode()


def test_colour_and_a_bar_on_a_terminal_only(command: Command, zoo: Path) -> None:
    shown = _on_a_terminal("validate", "zoo", NO_COLOR="")
    assert "\x1b[31merror " in shown
    assert "\x1b[31m" not in _on_a_terminal("validate", "zoo", NO_COLOR="1")
    assert "validating" not in shown
    for number in range(20):
        shutil.copy(zoo / "b-error.safetensors", zoo / f"e{number:02}.safetensors")
    shown = _on_a_terminal("validate", "zoo", "--format", "json")
    assert "validating" in shown
    outcome = command("validate", "zoo")
    assert "\x1b" not in outcome.out + outcome.err


def test_rules_are_listed(command: Command) -> None:
    outcome = command("rules")
    rows = [line.split()[0] for line in outcome.out.splitlines()[2:-2]]
    assert rows == [rule.code for rule in registry.rules()]
    assert json.loads(command("rules", "--json").out) == [rule.to_dict() for rule in registry.rules()]
    some = json.loads(command("rules", "--json", "--select", "X, F001").out)
    assert [rule["code"] for rule in some] == ["F001", "X001"]
    assert command("rules", "--select", "Q").code == 2


def test_a_rule_has_a_page(command: Command) -> None:
    rule = registry.find("F001")
    outcome = command("rule", "f001")
    for text in (
        f"# F001: {rule.name}",
        "error",
        rule.why,
        rule.remedy,
        *rule.fires.split("\n"),
        *rule.passes.split("\n"),
    ):
        assert text in outcome.out
    assert command("rule", rule.name).out == outcome.out
    assert json.loads(command("rule", "F001", "--json").out) == rule.to_dict()
    unknown = command("rule", "F9999")
    assert unknown.code == 2
    assert "no rule is called 'F9999'" in unknown.err
    assert "adapterops rules --select C2 lists them" in command("rule", "c2").err


def test_the_help_names_the_commands(command: Command) -> None:
    assert {"validate", "rules", "rule"} <= set(re.findall(r"^  (\w+)", command("--help").out, re.MULTILINE))
    page = command("validate", "--help").out
    assert "--write-baseline" in page
    assert "hf://owner/repo" in page.split("--base BASE")[1][:200]
