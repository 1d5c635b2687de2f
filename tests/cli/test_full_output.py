"""Outputs that take no more: a full disk behind the standard output, a limit on files, outputs that were closed before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

KOHYA = Path(__file__).parents[2] / "fixtures" / "kohya-sd15.safetensors"
FULL = Path("/dev/full")


def _shell(line: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """What `/bin/sh` makes of a line, in which `"$@"` is `adapterops` with the arguments."""
    # Under a limit on files Python would leave half a module in its cache.
    command = [sys.executable, "-B", "-m", "adapterops", *map(str, arguments)]
    return subprocess.run(
        ["/bin/sh", "-c", line, "sh", *command], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(not FULL.exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("arguments", [("formats",), ("inspect", KOHYA), ("inspect", KOHYA, "--json"), ("--version",)])
def test_a_full_disk_behind_the_standard_output(arguments: tuple[object, ...], tmp_path: Path) -> None:
    done = _shell('"$@" > /dev/full', *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: the standard output cannot be written: No space left on device\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_outputs_that_were_closed_before_the_start(closed: str, tmp_path: Path) -> None:
    done = _shell(f'"$@" {closed}', "convert", KOHYA, "--to", "kohya", "-o", "out.safetensors", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    wanted = load_file(KOHYA)
    got = load_file(tmp_path / "out.safetensors")
    assert wanted.keys() == got.keys()
    assert all(torch.equal(tensor, got[key]) for key, tensor in wanted.items())
    assert _shell(f'"$@" {closed}', "inspect", "nowhere", folder=tmp_path).returncode == 2


@pytest.mark.skipif(os.name == "nt", reason="needs ulimit")
@pytest.mark.parametrize("target", ["kohya", "peft"])
def test_a_merge_under_a_limit_on_files_leaves_nothing(target: str, tmp_path: Path) -> None:
    options = ["--method", "svd", "--weights", "1,1", "--to", target, "-o", "out"]
    done = _shell('ulimit -f 100; "$@"', "merge", KOHYA, KOHYA, *options, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the merged adapter: File too large: ")
    assert "fault of adapterops" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["convert", "merge", "to-lora", "loftq"])
def test_an_adapter_is_not_written_to_the_standard_output(name: str, tmp_path: Path) -> None:
    more = {"convert": ["--to", "peft"], "merge": ["--method", "cat"], "loftq": ["--base-weights", "base"]}.get(
        name, []
    )
    done = _shell('"$@"', name, KOHYA, *more, "-o", "-", folder=tmp_path)
    assert done.returncode == 2
    assert "not written to the standard output" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_report_is(tmp_path: Path) -> None:
    done = _shell('"$@"', "validate", KOHYA, "--format", "sarif", "-o", "-", folder=tmp_path)
    assert json.loads(done.stdout)["version"] == "2.1.0"
    assert not list(tmp_path.iterdir())
