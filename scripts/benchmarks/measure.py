"""Running a command as a whole process: seconds, CPU and peak memory; and what they were measured on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

# Linux counts the memory of the process that a command was started from into the command's peak. So each one is
# started from a fresh interpreter without site-packages, whose own few MiB are the least that can be measured.
_LAUNCHER = """
import json, os, sys, time
report, out, *command = sys.argv[1:]
opened = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
started = time.perf_counter()
pid = os.posix_spawnp(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, out, opened, 0o600)])
_, status, used = os.wait4(pid, 0)
wall = time.perf_counter() - started
with open(report, "w") as file:
    json.dump([wall, used.ru_utime + used.ru_stime, used.ru_maxrss, os.waitstatus_to_exitcode(status)], file)
"""


class CommandFailed(RuntimeError):
    """Raised when a measured command exits with another status than 0."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What one run of a command took, from its start to its exit."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds of all threads, user and system."""
    peak: float
    """Largest resident set, MiB, pages of mapped files included."""
    output: str
    """What it printed."""


def run(command: Sequence[str]) -> Usage:
    """Run a command to its end.  Raises `CommandFailed` with what it said on standard error."""
    with tempfile.TemporaryDirectory(prefix="adapterops-bench-") as folder:
        report, out = os.path.join(folder, "report"), os.path.join(folder, "out")
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, report, out, *command]
        # Bytecode is cached, as it is for whoever installs a package: without it every start would compile anew.
        env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        done = subprocess.run(
            launcher, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env, check=False
        )
        if done.returncode:
            raise CommandFailed(f"{command[0]} could not be started: {done.stderr.strip()[-500:]}")
        wall, cpu, peak, status = json.loads(Path(report).read_text())
        if status:
            raise CommandFailed(f"{' '.join(command)} exited with {status}: {done.stderr.strip()[-500:]}")
        # ru_maxrss counts KiB on Linux, bytes on macOS.
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        return Usage(wall, cpu, peak / unit, Path(out).read_text())


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle and the ends of several measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one measurement."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int, unit: str = "") -> str:
        """`median (least-most)`."""
        middle, least, most = (f"{v:,.{digits}f}" for v in (self.median, self.least, self.most))
        return f"{middle}{unit} ({least}-{most})"


def warm(path: Path) -> None:
    """Read a file once, so that all that read it later find it in the page cache."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def machine() -> str:
    """The machine in one line: processor, cores, memory, operating system."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


def load() -> str:
    """How busy the machine is.  A benchmark alone makes for about 1; more than the cores stretches every second."""
    return f"load average {os.getloadavg()[1]:.1f} over the last five minutes"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown processor"
    entry = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = entry.get("model name", platform.machine())
    # Virtual machines hide the model's number; what it can do still tells the generation.
    kinds = [kind for kind in ("avx2", "avx512f", "amx_tile") if kind in entry.get("flags", "").split()]
    return f"{name} ({kinds[-1]})" if kinds else name


def versions(*packages: str) -> str:
    """`Python 3.11.7, torch 2.13.0, …`; packages that are not installed are left out.

    An editable installation is called so: it adds its own import hook to every start.
    """
    out = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found = distribution(package)
        except PackageNotFoundError:
            continue
        editable = '"editable": true' in (found.read_text("direct_url.json") or "")
        out.append(f"{package} {found.version}" + (" (editable)" if editable else ""))
    return ", ".join(out)
