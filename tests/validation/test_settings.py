"""`.adapterops.toml` and `[tool.adapterops.validate]`: where they are found, what they say, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adapterops.errors import UsageError
from adapterops.validation import registry
from adapterops.validation.report import Checked, Report
from adapterops.validation.settings import Settings, load, matches

FULL = """
[validate]
select = ["T", "F001"]
ignore = ["B3"]
extend-ignore = ["unreadable-file"]
arch = "sdxl"
targets = ["peft", "vllm"]
strict = true
exclude = ["drafts"]
baseline = "ci/baseline.json"
format = "github"
jobs = 3

[validate.per-file-ignores]
"old/*" = ["F", "X001"]
"""


def _write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def test_every_setting_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "deep" / ".adapterops.toml", FULL)
    monkeypatch.chdir(tmp_path)
    assert load(path) == Settings(
        path=path,
        select=("T", "F001"),
        ignore=("B3",),
        extend_ignore=("unreadable-file",),
        arch="sdxl",
        targets=("peft", "vllm"),
        strict=True,
        exclude=("drafts",),
        baseline=os.path.join("deep", "ci", "baseline.json"),
        per_file_ignores={"old/*": ("F", "X001")},
        format="github",
        jobs=3,
    )
    base = _write(tmp_path / "deep" / "base.toml", '[validate]\nbase = "../model/config.json"')
    assert load(base).base == os.path.join("model", "config.json")


def test_the_nearest_counts(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    _write(tmp_path / ".adapterops.toml", "[validate]\njobs = 1")
    assert load(start=str(inner)).jobs == 1
    _write(tmp_path / "a" / "pyproject.toml", "[tool.other]\nx = 1")
    assert load(start=str(inner)).jobs == 1, "a pyproject.toml without our table is none of ours"
    _write(tmp_path / "a" / "pyproject.toml", "[tool.adapterops.validate]\njobs = 2")
    assert load(start=str(inner)).jobs == 2
    _write(tmp_path / "a" / ".adapterops.toml", "[validate]\njobs = 3")
    assert load(start=str(inner)).jobs == 3
    assert load(start=str(tmp_path)).jobs == 1


def test_without_a_file_nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        os.path, "isfile", lambda path: False
    )  # what stands above the test's folder is not ours to know
    assert load(start=str(tmp_path)) == Settings()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[validate]\nselekt = []", "there is no setting 'selekt'; did you mean select?"),
        ("[validate]\nqqqq = []", "there is no setting 'qqqq'; it knows select, ignore,"),
        ("[validate]\nselect = 'T'", "select: is 'T', and must be a list of strings"),
        ("[validate]\nselect = [1]", r"select: is \[1\], and must be a list of strings"),
        ("[validate]\nignore = ['X01']", "ignore: no rule is called 'X01'; did you mean X001?"),
        ("[validate]\nstrict = 1", "strict: is 1, and must be true or false"),
        ("[validate]\njobs = 0", "jobs: is 0, and must be a number from 1"),
        ("[validate]\njobs = true", "jobs: is True, and must be a number from 1"),
        ("[validate]\nformat = 'xml'", "format: 'xml' is none of text, json, sarif, junit, github"),
        ("[validate]\ntargets = ['pefft']", "targets: 'pefft' is none of peft, diffusers"),
        ("[validate]\narch = ''", "arch: is '', and must be a string"),
        ("[validate]\narch = 'sd1'\nbase = 'c.json'", "arch and base both name the base model"),
        ("[validate]\nper-file-ignores = ['T']", r"per-file-ignores: is \['T'\], and must be a table"),
        ("[validate.per-file-ignores]\n'x*' = ['Q']", r"per-file-ignores: x\*: no rule is called 'Q'"),
        ("validate = 3", r"validate is no table; write \[validate\]"),
        ("[validat]\njobs = 1", r"nothing is called 'validat' here; settings stand in \[validate\]"),
        ("[validate\n", "is no TOML: "),
        ("", r"has no \[validate\]"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = _write(tmp_path / ".adapterops.toml", text)
    with pytest.raises(UsageError, match=said) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_pyproject_is_refused_by_name_too(tmp_path: Path) -> None:
    path = _write(tmp_path / "pyproject.toml", "[tool.adapterops.validate]\nselectt = []")
    with pytest.raises(UsageError, match="did you mean select"):
        load(start=str(tmp_path))
    _write(tmp_path / "pyproject.toml", "[tool.adapterops.validte]\nx = 1")
    with pytest.raises(UsageError, match=r"'validte' here; settings stand in \[tool.adapterops.validate\]"):
        load(path)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("pattern", "path", "means"),
    [
        ("drafts", "drafts/a.safetensors", True),
        ("drafts/", "zoo/drafts/deep/a.safetensors", True),
        ("drafts", "zoo/my-drafts/a.safetensors", False),
        ("*.bin", "zoo/a.bin", True),
        ("*.bin", "zoo/a.safetensors", False),
        ("zoo/*", "zoo/deep/a.safetensors", True),
        ("zoo/*.safetensors", "zoo/a.safetensors", True),
        ("zoo/*.safetensors", "zoo/deep/a.safetensors", False),
        ("zoo/**/*.safetensors", "zoo/a/b/c.safetensors", True),
        ("zoo/**", "zoo/a.safetensors", True),
        ("zoo/old", "zoo/old/a.safetensors", True),
        ("zoo/old", "zoo/older/a.safetensors", False),
        ("./zoo/old", "zoo/old/a.safetensors", True),
        ("**/old/*", "old/a.safetensors", True),
        ("**/old/*", "zoo/old/a.safetensors", True),
        ("old/*", "zoo/old/a.safetensors", False),
        ("hf://owner/*", "hf://owner/repo", True),
        ("owner", "hf://owner/repo", True),
    ],
)
def test_globs(tmp_path: Path, pattern: str, path: str, means: bool) -> None:
    path = path if path.startswith("hf://") else str(tmp_path / path)
    assert matches(pattern, path, str(tmp_path)) is means


def test_per_file_ignores_are_about_the_adapter_and_its_files(tmp_path: Path) -> None:
    rule, other = registry.find("F001"), registry.find("X001")
    adapter = str(tmp_path / "old" / "a")
    card = str(tmp_path / "old" / "a" / "README.md")
    findings = tuple(r.found(card, "x") for r in (rule, other))
    report = Report((Checked(adapter, findings=findings), Checked(str(tmp_path / "b"), findings=findings[:1])), ())
    path = str(tmp_path / ".adapterops.toml")
    kept = Settings(path, per_file_ignores={"old": ("F",), "*.txt": ("ALL",)}).without_ignored(report)
    assert [[f.code for f in a.findings] for a in kept.adapters] == [["X001"], []]
    kept = Settings(path, per_file_ignores={"README.md": ("internal-failure",)}).without_ignored(report)
    assert [[f.code for f in a.findings] for a in kept.adapters] == [["F001"], ["F001"]]
    assert Settings(path).without_ignored(report) is report
