"""One input through the library: what came of it, and what must never come of any."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import adapterops as ao
from adapterops.errors import AdapterOpsError, ProofFailed
from adapterops.validation.fix import mend
from adapterops.validation.options import TARGETS
from adapterops.validation.rule import Severity
from fuzzing.inputs import FOLDER, Input
from fuzzing.pickle_damage import EXECUTED

CONVERTED = "converted"
CLEAN = "clean"
VALIDATING = 5.0
"""Seconds that a validation may take."""
_LONGEST_MESSAGE = 3000
_MOST_MEMORY = 200
"""MiB that one input may add to the process; the largest has 1 MiB, and a bomb in it claims more."""
_MOST_DESCRIPTORS = 40


class Hang(BaseException):
    """An input that took longer than it may; no `except Exception` of the library holds it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What should not have happened: `signature` is the same for inputs that show the same fault."""

    signature: str
    detail: str


@dataclass(slots=True)
class Outcome:
    """What came of an input: `result` is "converted" or the class of the refusal."""

    number: int
    kind: str
    what: str
    result: str = ""
    message: str = ""
    seconds: float = 0.0
    memory: float = 0.0
    """MiB above what the process had before."""
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Refused:
    """A clean error."""

    error: AdapterOpsError


def run(given: Input, place: Path, seconds: float, with_cli: bool = False, only_validate: bool = False) -> Outcome:
    """Write the input's files into the new folder `place`, validate and convert them, and look at what is left.

    Changes the current folder to `place`, so that paths and messages are the same on every machine; the folder is
    removed at the end.
    """
    outcome = Outcome(given.number, given.kind, given.what)
    place.mkdir()
    before = os.getcwd()
    os.chdir(place)
    try:
        _write(given)
        memory, resident, started = _reset_peak(), _resident(), time.perf_counter()
        descriptors = _open_descriptors()
        found = _guard(lambda: _validated(given, outcome), min(seconds, VALIDATING), "validate", outcome)
        report = result = None
        if not only_validate:
            report = _guard(lambda: _inspected(given), seconds, "inspect", outcome)
            result = _guard(lambda: _converted(given), seconds, "convert", outcome)
        outcome.seconds = time.perf_counter() - started
        # Where the peak cannot be set back, what is still held shows all the same.
        outcome.memory = max(_peak() - memory, _resident() - resident)
        if isinstance(found, Refused) and os.path.lexists(given.path):  # else there is nothing to validate
            outcome.findings.append(Finding(f"validate refuses: {_where(found.error)}", str(found.error)))
        if only_validate:
            outcome.result = found if isinstance(found, str) else "fault"
        else:
            _judge(given, result, outcome)
            _insist_on_findings(given, found, report, outcome)
        _check_files(given, result, outcome)
        if with_cli and not outcome.findings and not only_validate:
            _check_cli(given, report, result, outcome)
        del report, result
        if outcome.memory > _MOST_MEMORY:
            outcome.findings.append(Finding("memory", f"{outcome.memory:.0f} MiB for one small input"))
        if _open_descriptors() > descriptors + _MOST_DESCRIPTORS:
            gc.collect()
            if _open_descriptors() > descriptors + _MOST_DESCRIPTORS:
                outcome.findings.append(Finding("open files", f"{_open_descriptors() - descriptors} were left open"))
    finally:
        os.chdir(before)
        shutil.rmtree(place, ignore_errors=True)
    return outcome


def _write(given: Input) -> None:
    for name, data in given.files.items():
        path = Path(FOLDER, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _inspected(given: Input) -> str:
    return json.dumps(ao.inspect(given.path, norms=given.norms, hashes=given.norms, **given.reading).to_dict())


def _converted(given: Input) -> Any:
    return ao.convert(given.path, given.to, given.output, **given.reading, **given.writing)


def _validated(given: Input, outcome: Outcome) -> str:
    """What validation says of the input: the worst of its findings, or that it is clean."""
    found = ao.validate(given.path, targets=TARGETS if given.number % 2 else ())
    json.dumps(found.to_dict())
    for finding in found:
        if finding.code == "X001":
            outcome.findings.append(Finding(f"validate: {finding.message[:120]}", finding.message))
    for checked in found.adapters:
        if any(finding.change is not None for finding in checked.findings):
            mend(checked, dry_run=True)
    worst = [str(severity) for severity in Severity if found.count(severity)]
    return worst[0] if worst else CLEAN


def _insist_on_findings(given: Input, found: str | None, report: Any, outcome: Outcome) -> None:
    """What cannot be read must not be called clean."""
    if found == CLEAN and not given.reading and isinstance(report, Refused):
        said = f"{type(report.error).__name__}: {report.error}"
        outcome.findings.append(Finding(f"validate finds nothing where reading fails in {_where(report.error)}", said))


def _guard(action: Callable[[], Any], seconds: float, name: str, outcome: Outcome) -> Any:
    """What the action returns, or `Refused`; None where it did anything else, which becomes a finding."""
    try:
        with deadline(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return action()
    except AdapterOpsError as error:
        _check_message(name, error, outcome)
        return Refused(error.with_traceback(None))
    except Hang as error:
        outcome.findings.append(Finding(f"{name}: hang in {_where(error)}", _short_trace()))
    except BaseException as error:
        # Whatever it is: this is what the whole exercise looks for.
        if isinstance(error, SystemExit | KeyboardInterrupt):
            raise
        outcome.findings.append(Finding(f"{name}: {type(error).__name__} in {_where(error)}", _short_trace()))
    return None


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the block after some seconds, and again each second: one may be lost in a destructor."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _where(error: BaseException) -> str:
    """The last function of ours that an exception came through."""
    ours = [
        f for f in traceback.extract_tb(error.__traceback__) if "adapterops" in f.filename or "/formats/" in f.filename
    ]
    if not ours:
        return "?"
    parts = Path(ours[-1].filename).parts
    return f"{'/'.join(parts[-2:])}:{ours[-1].name}"


def _short_trace() -> str:
    return traceback.format_exc(limit=-14)[-6000:]


def _check_message(name: str, error: AdapterOpsError, outcome: Outcome) -> None:
    text = str(error)
    where = f"{name}: {type(error).__name__}"
    source = _where(error)
    if not text.strip():
        outcome.findings.append(Finding(f"{where} without a message from {source}", _short_trace()))
    if len(text) > _LONGEST_MESSAGE:
        outcome.findings.append(
            Finding(f"{where} with a very long message from {source}", f"{len(text)} characters: {text[:300]}")
        )
    unprintable = sorted({c for c in text if not c.isprintable() and c != "\n"})
    if unprintable:
        detail = f"{unprintable[:5]!r} in {text[:600]!r}"
        outcome.findings.append(Finding(f"{where} with control characters from {source}", detail))


def _judge(given: Input, result: Any, outcome: Outcome) -> None:
    if isinstance(result, Refused):
        error = result.error
        outcome.result, outcome.message = type(error).__name__, str(error)[:2000]
        # A dtype that was asked for may not hold the values; nothing else explains a conversion that failed its proof.
        if isinstance(error, ProofFailed) and not {"dtype", "fold_alpha"} & given.writing.keys():
            outcome.findings.append(Finding(f"proof failed, to {given.to}", str(error)))
    elif result is None:
        outcome.result = "fault"
    else:
        outcome.result = CONVERTED


def _check_files(given: Input, result: Any, outcome: Outcome) -> None:
    """What is on disk: the source as it was, the output whole or not at all, and nothing else."""
    found = {
        str(p) for p in Path().rglob("*") if not p.is_dir() or p.name.startswith(".adapterops-") or not any(p.iterdir())
    }
    expected = {f"{FOLDER}/{name}" for name in given.files}
    if EXECUTED in found or Path(EXECUTED).exists():
        outcome.findings.append(Finding("code in the file was run", f"it made {EXECUTED}"))
    changed = [n for n, data in given.files.items() if _bytes(Path(FOLDER, n)) != data]
    if changed:
        outcome.findings.append(Finding("the source was changed", ", ".join(changed)))
    written = set() if result is None or isinstance(result, Refused) else {os.path.normpath(f) for f in result.files}
    rest = found - expected
    if rest != written:
        outcome.findings.append(Finding("left behind or missing", f"found {sorted(rest)}, expected {sorted(written)}"))
    elif written:
        _check_output(given, sorted(written), outcome)


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _check_output(given: Input, written: list[str], outcome: Outcome) -> None:
    """The output is read by the reference reader and by us."""
    from safetensors import safe_open

    for path in written:
        if path.endswith(".safetensors"):
            try:
                with safe_open(path, "np") as file:
                    list(file.keys())
            except Exception as error:  # noqa: BLE001 (whatever it is, it is told)
                detail = f"{path}: {type(error).__name__}: {error}"
                outcome.findings.append(Finding(f"the reference reader refuses the output, to {given.to}", detail))
                return
    arch = given.reading.get("arch")
    try:
        with deadline(20.0):
            ao.load(given.output, format=given.to, arch=arch)
    except (Exception, Hang) as error:  # noqa: BLE001 (whatever it is, it is told)
        outcome.findings.append(
            Finding(f"the output cannot be read: {type(error).__name__}, to {given.to}", _short_trace())
        )


def _check_cli(given: Input, report: Any, result: Any, outcome: Outcome) -> None:
    """The command line on the same input: its exit status, and no traceback."""
    shutil.rmtree(given.output, ignore_errors=True)
    Path(given.output).unlink(missing_ok=True)
    commands = (
        (["convert", given.path, "--to", given.to, "-o", given.output, *flags(given), "--json"], result),
        (["inspect", given.path, *flags(given, writing=False)], report),
    )
    for arguments, expected in commands:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "adapterops.cli.main", *arguments], capture_output=True, timeout=120, check=False
            )
        except subprocess.TimeoutExpired:
            outcome.findings.append(Finding(f"command line: {arguments[0]} hangs", " ".join(arguments)))
            continue
        complaint = done.stderr.decode("utf-8", "replace")
        code = expected.error.exit_code if isinstance(expected, Refused) else 0
        said = f"{' '.join(arguments)}\nexit status {done.returncode}, expected {code}\n{complaint[-3000:]}"
        if "Traceback" in complaint or "fault of adapterops" in complaint:
            outcome.findings.append(Finding(f"command line: {arguments[0]} shows a fault", said))
        elif done.returncode != code:
            outcome.findings.append(Finding(f"command line: {arguments[0]} disagrees with the library", said))
        elif "--json" in arguments:
            try:
                json.loads(done.stdout)
            except ValueError:
                outcome.findings.append(Finding("command line: --json prints no JSON", said))


def flags(given: Input, writing: bool = True) -> list[str]:
    """The options of the command line for those of the calls."""
    names = {"format": "--from", "arch": "--arch", "alpha": "--alpha", "dtype": "--dtype"}
    switches = {"allow_drop": "--allow-drop", "fold_alpha": "--fold-alpha", "verify": "--no-verify"}
    options = {**given.reading, **(given.writing if writing else {})}
    out: list[str] = []
    for name, value in options.items():
        out += [names[name], str(value)] if name in names else [switches[name]]
    return out


def _open_descriptors() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


def _reset_peak() -> float:
    """Start a new measurement of peak memory (Linux); the MiB in use now."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return _peak()  # The peak since the start: only growth beyond it is seen.
    return _peak()


def _peak() -> float:
    """The peak of resident memory, in MiB."""
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _resident() -> float:
    """Resident memory now, in MiB; 0 where the system does not say."""
    return _status("VmRSS") or 0.0


def _status(name: str) -> float | None:
    """An entry of the process's status, in MiB (Linux)."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith(name))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration):
        return None
