"""Ctrl-C during an import that takes any exception for the absence of an optional part."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs timers of POSIX")

SWALLOWS = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)
    whole = True
except BaseException:
    whole = False
"""
PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.{before})
from adapterops.cli.interrupts import spare_imports
if {spared}:
    spare_imports()
try:
    import swallows
    time.sleep(0.2)
    print("went on")
except KeyboardInterrupt:
    import swallows
    print("stopped, whole" if swallows.whole else "stopped")
"""


def _run(folder: Path, spared: bool, before: str = "default_int_handler") -> str:
    (folder / "swallows.py").write_text(SWALLOWS)
    program = PROGRAM.format(spared=spared, before=before)
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_an_interrupt_waits_for_the_import(tmp_path: Path) -> None:
    assert _run(tmp_path, spared=False) == "went on"  # Python's own way loses it
    assert _run(tmp_path, spared=True) == "stopped, whole"


def test_a_program_that_ignores_interrupts_goes_on_doing_so(tmp_path: Path) -> None:
    assert _run(tmp_path, spared=True, before="SIG_IGN") == "went on"
