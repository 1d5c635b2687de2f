"""A pure rename moves bytes: no numpy, no torch, and memory that does not grow with the file."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import storage_files as files

PEAK = textwrap.dedent(
    """
    import json, sys
    from adapterops import api
    result = api.convert(sys.argv[1], sys.argv[2], sys.argv[3])
    peak = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")]
    heavy = [name for name in ("torch", "numpy", "safetensors") if name in sys.modules]
    print(json.dumps({"peak": peak, "heavy": heavy, "exact": result.proof.exact, "bytes": result.bytes}))
    """
)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_rename_imports_nothing_heavy_and_needs_little_memory(to: str, tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak is read from /proc")
    size = files.write_kohya_sd1(tmp_path / "style.safetensors", 40)
    assert size > 95_000_000
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "style.safetensors"), to, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout)
    assert said["heavy"] == []
    assert said["exact"]
    assert said["bytes"] > 95_000_000
    assert said["peak"][0] < 60 * 1024, f"{said['peak'][0]} KiB"


@pytest.mark.parametrize("command", ["inspect", "validate"])
def test_what_only_reads_imports_nothing_that_only_writing_needs(command: str, tmp_path: Path) -> None:
    files.write_kohya_sd1(tmp_path / "style.safetensors", 2)
    code = (
        "import atexit, sys; from adapterops.cli.main import run\n"
        "heavy = ('adapterops.proof', 'adapterops.dialects.write', 'torch')\n"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules], file=sys.stderr))\n"
        "run(sys.argv[1:])"
    )
    arguments = [command, str(tmp_path / "style.safetensors"), *(["--header-only"] if command == "validate" else [])]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr
