"""Many adapters, examined in several processes; the results stand in the order of the adapters.

Each worker is a Python of its own that gets adapters by the handful over a socket.  They are not forks, so what the calling
program has loaded or started (threads, torch, CUDA) does not matter, and not `multiprocessing`'s spawned processes, which
would import the caller's main module again.  Workers have nothing to lose: they are killed when the work is done, when it is
interrupted, and when one of them dies, its adapters are looked at again, one by one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait

from adapterops.errors import AdapterOpsError, UsageError
from adapterops.storage.folder import LocalFolder
from adapterops.storage.signals import unwinding
from adapterops.threads import cores
from adapterops.validation.options import Options
from adapterops.validation.report import Checked
from adapterops.validation.rule import Rule
from adapterops.validation.rules.internal import INTERNAL_FAILURE
from adapterops.validation.subject import Place

Examine = Callable[[Place, Options, Sequence[Rule]], Checked]
Progress = Callable[[int, int], None]

MANY = 16
"""Adapters; fewer are done before other processes have started."""
_CHUNK = 8
"""The most adapters that a worker gets at a time."""
_BOOT = (
    "import sys; from multiprocessing.connection import Connection as C; c = C(int(sys.argv[1])); sys.path[:] = c.recv(); "
    "from adapterops.validation.workers import serve; serve(c)"
)


def run_all(
    examine: Examine,
    places: Sequence[Place],
    options: Options,
    rules: Sequence[Rule],
    jobs: int = 1,
    progress: Progress | None = None,
) -> Iterator[Checked]:
    """`examine` of every place, in order, in `jobs` processes (0: one a core where there are many adapters).

    Cores for which there is no adapter are left to the threads that look at one adapter's bytes.
    An adapter over which `examine` fails unexpectedly, or dies, has a finding that says so (X001); the others are not lost.
    Raises `UsageError` where `examine` does, and `AdapterOpsError` where no worker can be started.
    """
    told = progress or _silent
    # What stands elsewhere is waited for, not worked on, and connections stay where they are.
    local = [at for at, place in enumerate(places) if isinstance(place.folder, LocalFolder)]
    processes = min(jobs or _usual(len(local)), len(local)) if os.name == "posix" else 1
    options = replace(options, threads=max(1, (jobs or cores()) // max(1, processes)))
    ahead: Iterator[tuple[int, Checked]] = iter(())
    if processes > 1:
        ahead = _Pool(examine, places, options, rules, processes).run(local)
    yield from _in_order(ahead, examine, places, options, rules, told)


def _in_order(
    ahead: Iterator[tuple[int, Checked]],
    examine: Examine,
    places: Sequence[Place],
    options: Options,
    rules: Sequence[Rule],
    told: Progress,
) -> Iterator[Checked]:
    """The results in order: those of the pool as they come, the others examined here, each when its turn has come."""
    early: dict[int, Checked] = {}
    done, next_one = 0, 0
    told(0, len(places))
    for at, checked in ahead:
        early[at] = checked
        done += 1
        told(done, len(places))
        while next_one in early:
            yield early.pop(next_one)
            next_one += 1
    for at in range(next_one, len(places)):
        if at not in early:
            early[at] = careful(examine, places[at], options, rules)
            done += 1
            told(done, len(places))
        yield early.pop(at)


def careful(examine: Examine, place: Place, options: Options, rules: Sequence[Rule]) -> Checked:
    """`examine`, whose unexpected failure becomes a finding.  Raises `UsageError`."""
    try:
        return examine(place, options, rules)
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 (one adapter must not lose the results of the others)
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.join(*last.filename.split(os.sep)[-2:])}:{last.lineno}"
        text = " ".join(str(AdapterOpsError(str(error))).split())
        return _failed(place, f"adapterops failed here: {type(error).__name__}: {text[:300]} (at {where})")


def _failed(place: Place, message: str) -> Checked:
    return Checked(place.path, findings=(replace(INTERNAL_FAILURE.found(place.path, message), adapter=place.path),))


def _usual(count: int) -> int:
    return cores() if count > MANY else 1


def _silent(done: int, total: int) -> None:
    pass


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    chunk: list[int] = field(default_factory=list)
    ready: bool = False

    def send(self, value: object) -> None:
        """Send; that a worker is gone is noticed where its answer is read."""
        with contextlib.suppress(OSError):
            self.connection.send(value)

    def end(self) -> str:
        """Kill it; how it had ended, if it had."""
        self.connection.close()
        ended = self.process.poll()
        if ended is None:
            try:
                ended = self.process.wait(timeout=1)  # its socket is closed before its status is known
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                return "it did not answer"
        if ended < 0:
            name = signal.Signals(-ended).name
            return f"killed by {name}" + (", as Linux does where memory runs out" if name == "SIGKILL" else "")
        return f"exit status {ended}"


class _Pool:
    def __init__(
        self, examine: Examine, places: Sequence[Place], options: Options, rules: Sequence[Rule], processes: int
    ) -> None:
        self.places = places
        self.processes = processes
        self.task = pickle.dumps((examine, options, tuple(rules)))
        self.workers: list[_Worker] = []

    def run(self, todo: Sequence[int]) -> Iterator[tuple[int, Checked]]:
        """The numbers of the places and their results, as they come."""
        chunks = _handfuls(todo, self.processes)
        left = len(todo)
        with unwinding():
            try:
                for _ in range(self.processes):
                    self._start()
                while left:
                    for worker in self._answered():
                        for at, checked in self._answer(worker, chunks):
                            left -= 1
                            yield at, checked
            finally:
                self._kill()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                process_group=0,  # Ctrl-C is for us, and we end them
            )
        worker = _Worker(process, Connection(ours.detach()))
        self.workers.append(worker)
        worker.send(sys.path)
        worker.send(self.task)

    def _answered(self) -> list[_Worker]:
        ready = wait([worker.connection for worker in self.workers])
        return [worker for worker in self.workers if worker.connection in ready]

    def _answer(self, worker: _Worker, chunks: deque[list[int]]) -> list[tuple[int, Checked]]:
        """Take a worker's answer, and give it the next adapters."""
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            return self._buried(worker, chunks)
        if isinstance(answer, AdapterOpsError):
            raise answer
        done = list(zip(worker.chunk, answer, strict=True)) if worker.ready else []
        worker.ready = True
        worker.chunk = chunks.popleft() if chunks else []
        if worker.chunk:
            worker.send([self.places[at] for at in worker.chunk])
        return done

    def _buried(self, worker: _Worker, chunks: deque[list[int]]) -> list[tuple[int, Checked]]:
        """A worker died: the adapter over which it did is known once it is the only one that it had."""
        self.workers.remove(worker)
        how = worker.end()
        if not worker.ready:
            raise AdapterOpsError(f"a worker process could not be started ({how}); --jobs 1 does without")
        chunks.extendleft([at] for at in reversed(worker.chunk) if len(worker.chunk) > 1)
        if chunks:
            self._start()
        if len(worker.chunk) != 1:
            return []
        message = f"the process that examined it ended in the midst of it ({how})"
        return [(worker.chunk[0], _failed(self.places[worker.chunk[0]], message))]

    def _kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.wait()
            worker.connection.close()
        self.workers.clear()


def _handfuls(todo: Sequence[int], processes: int) -> deque[list[int]]:
    """What workers get at a time: ever less, so that a large one at the end is not waited for with others behind it."""
    out: deque[list[int]] = deque()
    at = 0
    while at < len(todo):
        size = max(1, min(_CHUNK, (len(todo) - at) // (processes * 4)))
        out.append(list(todo[at : at + size]))
        at += size
    return out


def serve(connection: Connection) -> None:
    """A worker: answers handfuls of adapters with their results until nobody asks any more."""
    gc.set_threshold(50_000, 20, 50)
    examine, options, rules = pickle.loads(connection.recv())
    connection.send(None)  # ready
    while True:
        try:
            places = connection.recv()
        except EOFError:
            return
        try:
            answer: object = [careful(examine, place, options, rules) for place in places]
        except UsageError as error:
            answer = error
        connection.send(answer)
