"""Output that appears whole or not at all.

Everything is written into a temporary folder beside the target, flushed to disk, checked there by the caller,
and only then renamed into place.  Whatever goes wrong before that (an error, a full disk, Ctrl-C, SIGTERM), the
temporary folder is removed and the target is as it was.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType, TracebackType

from adapterops.errors import OutputExists, OutputFailed
from adapterops.storage import safetensors
from adapterops.storage.tensor import CHUNK, ByteSource, LazyTensor

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


def nothing(count: int) -> None:
    """The progress of a caller who does not ask for any."""


@dataclass(slots=True)
class Timings:
    """Seconds spent, for benchmarks and `--json`: copying bytes, flushing them to disk, proving the result."""

    copy: float = 0.0
    flush: float = 0.0
    proof: float = 0.0


@dataclass(slots=True)
class Staged:
    """Files being written beside their target.  Use as a context manager; `commit()` makes them appear."""

    target: str
    is_folder: bool
    overwrite: bool = False
    timings: Timings = field(default_factory=Timings)
    folder: str = ""
    files: list[str] = field(default_factory=list)
    _handlers: dict[int, object] = field(default_factory=dict)

    def __enter__(self) -> Staged:
        parent = os.path.dirname(os.path.abspath(self.target))
        try:
            os.makedirs(parent, exist_ok=True)
            self.folder = tempfile.mkdtemp(prefix=".adapterops-", dir=parent)
        except OSError as error:
            raise OutputFailed(f"{self.target}: cannot write there: {error.strerror}") from error
        # SIGTERM's default ends the process without unwinding, which would leave the temporary folder behind.
        with contextlib.suppress(ValueError):  # not in the main thread: its owner handles signals
            self._handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, _interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if isinstance(error, OSError):
            raise OutputFailed(f"{self.target}: {error.strerror or error}; nothing was written") from error

    @property
    def staged(self) -> str:
        """Where the output stands until it is committed: the file, or the folder."""
        return self.folder if self.is_folder else os.path.join(self.folder, os.path.basename(self.target))

    def _path(self, name: str) -> str:
        path = os.path.join(self.folder, name) if name else self.staged
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.files.append(os.path.relpath(path, self.folder))
        return path

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file."""
        with open(self._path(name), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def write_tensors(
        self, name: str, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], progress: Progress = nothing
    ) -> None:
        """Stream tensors into a safetensors file, a MiB at a time."""
        ordered = safetensors.in_file_order(tensors)
        started = time.perf_counter()
        with open(self._path(name), "wb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(safetensors.build_header(ordered, metadata)))
            _copy(ordered, file.fileno(), progress)
            copied = time.perf_counter()
            os.fsync(file.fileno())
        self.timings.copy += copied - started
        self.timings.flush += time.perf_counter() - copied

    def commit(self) -> None:
        """Put the files in place.  Raises `OutputExists` where one is there and may not be replaced."""
        check_target(self.target, self.is_folder, self.files, self.overwrite)
        if not self.is_folder:
            os.replace(self.staged, self.target)
        elif not os.path.exists(self.target):
            os.chmod(self.folder, 0o777 & ~_umask())
            os.rename(self.folder, self.target)
        else:
            _move_into(self.folder, self.target, self.files)
        _flush_folder(os.path.dirname(os.path.abspath(self.target)))


def check_target(target: str, is_folder: bool, files: list[str], overwrite: bool) -> None:
    """Raise `OutputExists` where writing would replace something and `overwrite` is not set."""
    if is_folder:
        if os.path.exists(target) and not os.path.isdir(target):
            raise OutputExists(f"{target}: is a file; a folder is to be written there")
        there = [name for name in files if os.path.exists(os.path.join(target, name))]
        if there and not overwrite:
            raise OutputExists(f"{os.path.join(target, there[0])}: exists already; --overwrite replaces it")
        return
    if os.path.isdir(target):
        raise OutputExists(f"{target}: is a folder; a file is to be written there")
    if os.path.exists(target) and not overwrite:
        raise OutputExists(f"{target}: exists already; --overwrite replaces it")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _copy(ordered: list[tuple[str, LazyTensor]], descriptor: int, progress: Progress) -> None:
    """Copy tensors through one buffer, so that many small ones cost few writes."""
    buffer = memoryview(bytearray(CHUNK))
    filled = 0
    for source, start, length in _runs(ordered):
        done = 0
        while done < length:
            take = min(CHUNK - filled, length - done)
            source.readinto(start + done, buffer[filled : filled + take])
            filled += take
            done += take
            if filled == CHUNK:
                _write_all(descriptor, buffer)
                progress(filled)
                filled = 0
    _write_all(descriptor, buffer[:filled])
    progress(filled)


def _runs(ordered: list[tuple[str, LazyTensor]]) -> Iterator[tuple[ByteSource, int, int]]:
    """(source, start, length) of the tensors in order, neighbours in the source joined into one read."""
    source: ByteSource | None = None
    start, length = 0, 0
    for _, tensor in ordered:
        if tensor.source is source and tensor.start == start + length:
            length += tensor.nbytes
            continue
        if source is not None:
            yield source, start, length
        source, start, length = tensor.source, tensor.start, tensor.nbytes
    if source is not None:
        yield source, start, length


def _move_into(folder: str, target: str, files: list[str]) -> None:
    """Replace files of an existing folder, putting the old ones back should one of the moves fail."""
    backup = os.path.join(folder, ".replaced")
    moved: list[str] = []
    try:
        for name in files:
            old, place = os.path.join(backup, name), os.path.join(target, name)
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.makedirs(os.path.dirname(old), exist_ok=True)
            if os.path.exists(place):
                os.rename(place, old)
            moved.append(name)
            os.rename(os.path.join(folder, name), place)
    except BaseException:
        for name in moved:
            if os.path.exists(os.path.join(backup, name)):
                os.replace(os.path.join(backup, name), os.path.join(target, name))
        raise


def _flush_folder(path: str) -> None:
    """Make the rename itself durable; not every file system can, and then the rename stands without it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
