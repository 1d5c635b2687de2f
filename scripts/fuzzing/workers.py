"""Inputs shared out among processes that may hang, run out of memory or die."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fuzzing import check, inputs, seeds
from fuzzing.check import Finding, Outcome

SECONDS = 15.0
"""How long one call may take; the slowest sound one takes less than one, on a machine that is not loaded."""
_HEADROOM = 1536 << 20
"""Bytes of address space that a worker may take for one input beyond what it has."""
_CLI_EVERY = 200


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker does with each of its numbers."""

    seed: int
    seconds: float = SECONDS
    only_validate: bool = False
    cli_every: int = _CLI_EVERY
    """One input in so many goes through the command line too; 0: none."""


@dataclass(slots=True)
class _Worker:
    """A process, the numbers that it still has to do (the first is being done), and when it last said something."""

    process: Any
    pipe: Connection
    numbers: list[int]
    heard: float


def run(numbers: Sequence[int], plan: Plan, workers: int, tell: Callable[[Outcome], None]) -> None:
    """Run every input; `tell` gets each outcome, in the order in which they come.

    A worker that dies, or does not answer, costs its current input only.
    """
    warm_up()
    with tempfile.TemporaryDirectory(prefix="adapterops-fuzz-", dir=seeds.memory()) as folder:
        busy = [_start(part, plan, folder) for n in range(workers) if (part := list(numbers[n::workers]))]
        try:
            while busy:
                busy = _turn(busy, plan, folder, tell)
        finally:
            for worker in busy:
                worker.process.kill()
                worker.process.join()


def warm_up() -> None:
    """Import and build everything once, so that workers start with it and their limits are measured above it."""
    import safetensors  # noqa: F401
    import torch

    import adapterops.proof
    import adapterops.storage.pickle  # noqa: F401

    torch.set_num_threads(1)
    seeds.samples()
    seeds.fixtures()


def _start(numbers: list[int], plan: Plan, folder: str) -> _Worker:
    # Forked: torch and the seeds are there at once, and a worker that died is replaced at no cost.
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    sys.stdout.flush()
    sys.stderr.flush()
    process = context.Process(target=_work, args=(numbers, plan, folder, theirs), daemon=False)
    process.start()
    theirs.close()
    return _Worker(process, ours, numbers, time.monotonic())


def _work(numbers: list[int], plan: Plan, folder: str, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        with check.deadline(plan.seconds):
            given = inputs.make(plan.seed, number)
        place = Path(folder, str(number))
        with_cli = plan.cli_every > 0 and number % plan.cli_every == 0
        with _bounded():
            found = check.run(given, place, plan.seconds, with_cli, plan.only_validate)
        pipe.send(found)
    pipe.close()
    # Nothing of the parent's (its temporary folder, its streams) is to be taken down here.
    os._exit(0)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Little memory above what is there now: the allocator keeps the address space of threads that have ended."""
    size, before = _address_space(), resource.getrlimit(resource.RLIMIT_AS)
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + _HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _address_space() -> int:
    """Bytes of address space in use; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _turn(busy: list[_Worker], plan: Plan, folder: str, tell: Callable[[Outcome], None]) -> list[_Worker]:
    """Take what has been said, and replace workers that died or went silent; those that are still at work."""
    patience = 4 * plan.seconds + 10 + (250 if plan.cli_every else 0)
    ready = wait([w.pipe for w in busy], timeout=1.0)
    out = []
    for worker in busy:
        if worker.pipe in ready:
            try:
                tell(worker.pipe.recv())
                worker.numbers = worker.numbers[1:]
                worker.heard = time.monotonic()
                out.append(worker)
                continue
            except (EOFError, OSError):
                why = "died"
        elif time.monotonic() - worker.heard > patience:
            why = "went silent"
        else:
            out.append(worker)
            continue
        again = _bury(worker, why, plan, folder, tell)
        if again is not None:
            out.append(again)
    return out


def _bury(worker: _Worker, why: str, plan: Plan, folder: str, tell: Callable[[Outcome], None]) -> _Worker | None:
    """Report the input at which a worker ended, and start another on the rest of its numbers."""
    if why == "went silent":
        worker.process.kill()
    worker.process.join()
    worker.pipe.close()
    if not worker.numbers:
        return None
    number, rest = worker.numbers[0], worker.numbers[1:]
    code = worker.process.exitcode
    how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
    shutil.rmtree(Path(folder, str(number)), ignore_errors=True)
    try:
        given = inputs.make(plan.seed, number)
        kind, what = given.kind, given.what
    except Exception as error:  # noqa: BLE001 (whatever it is, it is told)
        kind, what = "none", f"the input itself cannot be made: {type(error).__name__}: {error}"
    tell(Outcome(number, kind, what, "fault", findings=[Finding(f"the process {why} ({how})", f"{kind}: {what}")]))
    return _start(rest, plan, folder) if rest else None
