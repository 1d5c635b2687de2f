"""The GitHub Action and the pre-commit hook: they parse, name what exists, and do what they say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from sound import kohya_file, peft_folder

import adapterops as ao
from adapterops.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def action() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def hook() -> dict[str, Any]:
    (loaded,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def _options() -> set[str]:
    command = main.get_command(click.Context(main), "validate")
    assert command is not None
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def _named(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text))


def test_the_action_uses_each_input_and_no_other(action: dict[str, Any]) -> None:
    text = (ROOT / "action.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"inputs\.([a-z-]+)", text)) == set(action["inputs"])
    assert all(entry["description"] for entry in action["inputs"].values())
    assert action["runs"]["using"] == "composite"


def test_the_action_puts_no_input_into_a_script(action: dict[str, Any]) -> None:
    for step in action["runs"]["steps"]:
        assert "${{" not in step.get("run", "")
        assert "run" not in step or step["shell"] == "bash"
        assert not re.search(r"\b(mapfile|readarray) -", step.get("run", ""))  # macOS has bash 3.2


def test_the_action_names_options_that_exist(action: dict[str, Any]) -> None:
    called = action["runs"]["steps"][-1]["run"].split("options+=")[-1]
    assert _named(called) - {"--"} <= _options()
    assert _named(action["inputs"]["args"]["description"]) <= _options()


def test_the_action_calls_what_its_inputs_say(action: dict[str, Any], tmp_path: Path) -> None:
    program = tmp_path / "bin" / "adapterops"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nprintf '[%s]' \"$@\"\nexit 1\n")
    program.chmod(0o755)
    values = {
        "ADAPTEROPS_PATHS": "zoo/a b\n\n$(touch evil)\n",
        "ADAPTEROPS_ARGS": "--strict --ignore 'D, T' --select=C",
        "ADAPTEROPS_FORMAT": "sarif",
        "ADAPTEROPS_OUTPUT": "out file.sarif",
        "ADAPTEROPS_VENV": str(tmp_path),
    }
    step = action["runs"]["steps"][-1]
    assert set(values) == set(step["env"])

    def called(**changed: str) -> str:
        environment = {**os.environ, **values, **changed}
        script = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]  # as the runner calls it
        done = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, "")
        return done.stdout

    assert called() == (
        "[validate][--strict][--ignore][D, T][--select=C][--format][sarif][-o][out file.sarif]"
        "[--][zoo/a b][$(touch evil)]"
    )
    plain = called(ADAPTEROPS_ARGS="", ADAPTEROPS_OUTPUT="", ADAPTEROPS_PATHS=".")
    assert plain == "[validate][--format][sarif][--][.]"
    assert not (tmp_path / "evil").exists()


def test_the_hook_calls_options_that_exist(hook: dict[str, Any]) -> None:
    program, command, *options = shlex.split(hook["entry"])
    assert (program, command) == ("adapterops", "validate")
    assert set(options) <= _options()
    assert hook["language"] == "python"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("style.safetensors", True),
        ("zoo/face/adapter_config.json", True),
        ("zoo/face/adapter_model.safetensors", True),
        ("adapter_model.bin", True),
        ("adapter_model.safetensors.index.json", True),
        ("zoo/face/optimizer.bin", False),
        ("package.json", False),
        ("my_adapter_config.json", False),
        ("style.safetensors.md", False),
    ],
)
def test_the_hook_is_asked_about_adapters(hook: dict[str, Any], path: str, asked: bool) -> None:
    assert (re.search(hook["files"], path) is not None) is asked


def test_the_names_that_pre_commit_gives_mean_their_adapters(tmp_path: Path, hook: dict[str, Any]) -> None:
    folder, file = peft_folder(tmp_path), kohya_file(tmp_path, "style.safetensors")
    changed = [path for path in (*sorted(folder.iterdir()), file) if re.search(hook["files"], str(path))]
    assert len(changed) == 3
    report = ao.validate(*changed, header_only=True)
    assert [adapter.path for adapter in report.adapters] == [str(folder), str(file)]
    assert [f.code for f in report] == []


def test_the_document_shows_options_and_settings_that_exist(action: dict[str, Any], hook: dict[str, Any]) -> None:
    from adapterops.validation import settings

    text = (ROOT / "docs" / "validate-in-ci.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL)
    commands = [line for kind, body in blocks for line in body.splitlines() if line.startswith("adapterops validate")]
    assert commands
    for line in commands:
        assert _named(line.split(" #")[0]) <= _options(), line
    for kind, body in blocks:
        if kind == "toml":
            import tomllib

            table = tomllib.loads(body)
            own = table["tool"]["adapterops"]["validate"] if "tool" in table else table["validate"]
            assert set(own) <= set(settings._KEYS)
        if kind == "yaml":
            document = yaml.safe_load(body)
            if "repos" in document:
                assert document["repos"][0]["hooks"][0]["id"] == hook["id"]
            for job in document.get("jobs", {}).values():
                for step in job["steps"]:
                    if "adapterops" in step.get("uses", ""):
                        assert set(step.get("with", {})) <= set(action["inputs"])
