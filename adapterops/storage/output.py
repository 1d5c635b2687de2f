"""Output that appears whole or not at all.

Everything is written into a temporary folder beside the target (in it, where it is a folder already), flushed to
disk, checked there by the caller, and only then renamed into place.  Whatever goes wrong before that (an error, a
full disk, Ctrl-C, SIGTERM), the temporary folder is removed and the target is as it was.

A file, and a folder that was not there, appear in one rename.  Into a folder that exists, the files are renamed one
after the other; an error among those renames is undone, but a power failure there can leave some old and some
new files (the old ones then stand in its `.adapterops-*/.replaced`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType

from adapterops.errors import OutputExists, OutputFailed
from adapterops.storage import safetensors
from adapterops.storage.signals import deferred, unwinding
from adapterops.storage.source import FOLDER_WEIGHTS
from adapterops.storage.tensor import CHUNK, ByteSource, LazyTensor

Progress = Callable[[int], None]
"""Called with the number of bytes done since the last call."""


def nothing(count: int) -> None:
    """The progress of a caller who does not ask for any."""


@dataclass(slots=True)
class Timings:
    """Seconds spent, for benchmarks and `--json`: copying bytes, flushing them to disk, proving the result.

    Flushing and proving go on at the same time.
    """

    copy: float = 0.0
    flush: float = 0.0
    proof: float = 0.0


class _Flush(threading.Thread):
    """Waits for the disk while the proof reads the same bytes back from memory."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(daemon=True)
        self.descriptor = descriptor
        self.seconds = 0.0
        self.error: OSError | None = None
        self.start()

    def run(self) -> None:
        started = time.perf_counter()
        try:
            os.fsync(self.descriptor)
        except OSError as error:
            self.error = error
        finally:
            os.close(self.descriptor)
        self.seconds = time.perf_counter() - started

    def wait(self) -> float:
        """The seconds that it took.  Raises the `OSError` that it met."""
        self.join()
        if self.error is not None:
            raise self.error
        return self.seconds


@dataclass(slots=True)
class Staged:
    """Files being written beside their target.  Use as a context manager; `commit()` makes them appear."""

    target: str
    is_folder: bool
    overwrite: bool = False
    timings: Timings = field(default_factory=Timings)
    folder: str = ""
    files: list[str] = field(default_factory=list)
    _made: list[str] = field(default_factory=list)
    _flushes: list[_Flush] = field(default_factory=list)
    _scope: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> Staged:
        with self._scope:
            # Innermost last: the folder is removed while signals are still caught.
            self._scope.enter_context(unwinding())
            self._scope.callback(self._clean)
            # Inside a folder that is there already: it may be a mounted volume, and renames stay on one.
            inside = self.is_folder and os.path.isdir(self.target)
            parent = os.path.abspath(self.target) if inside else os.path.dirname(os.path.abspath(self.target))
            try:
                self._make_parents(parent)
                # Named before it is made, so that an interruption in between leaves nothing that is not removed.
                self.folder = os.path.join(parent, f".adapterops-{os.urandom(8).hex()}")
                os.mkdir(self.folder)
            except OSError as error:
                raise OutputFailed(f"{self.target}: cannot write there: {_why(error)}") from error
            self._scope = self._scope.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scope.close()
        if isinstance(error, OSError):
            raise OutputFailed(f"{self.target}: {_why(error)}; nothing was written") from error

    def _make_parents(self, parent: str) -> None:
        missing = []
        while not os.path.exists(parent):
            missing.append(parent)
            parent = os.path.dirname(parent)
        for folder in reversed(missing):
            self._made.append(folder)
            os.mkdir(folder)

    def _clean(self) -> None:
        with deferred():
            for flush in self._flushes:
                flush.join()
            if self.folder and not os.path.isdir(os.path.join(self.folder, _REPLACED)):
                shutil.rmtree(self.folder, ignore_errors=True)
            # Folders that were made for an output that did not come; one that holds something stays.
            for folder in reversed(self._made):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

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
            self._flushes.append(_Flush(os.dup(file.fileno())))

    def write_tensors(
        self,
        name: str,
        tensors: Mapping[str, LazyTensor],
        metadata: Mapping[str, str],
        progress: Progress = nothing,
        as_ordered: bool = False,
    ) -> None:
        """Stream tensors into a safetensors file, a MiB at a time; `as_ordered` keeps the order of the mapping."""
        ordered = list(tensors.items()) if as_ordered else safetensors.in_file_order(tensors)
        started = time.perf_counter()
        with open(self._path(name), "wb", buffering=0) as file:
            _write_all(file.fileno(), memoryview(safetensors.build_header(ordered, metadata)))
            _copy(ordered, file.fileno(), progress)
            self.timings.copy += time.perf_counter() - started
            self._flushes.append(_Flush(os.dup(file.fileno())))

    def write_with(self, name: str, write: Callable[[str, Progress], None], progress: Progress = nothing) -> None:
        """Let `write` make a file of another container at the path that it is given."""
        started, path = time.perf_counter(), self._path(name)
        write(path, progress)
        self.timings.copy += time.perf_counter() - started
        self._flushes.append(_Flush(os.open(path, os.O_RDONLY)))

    def commit(self) -> None:
        """Put the files in place, once all of them are on the disk.

        Raises `OutputExists` where one is there and may not be replaced.
        """
        for flush in self._flushes:
            self.timings.flush += flush.wait()
        for folder, _, _ in os.walk(self.folder, topdown=False):
            _flush_folder(folder)
        with deferred():
            check_target(self.target, self.is_folder, self.files, self.overwrite)
            if not self.is_folder:
                _place(self.staged, self.target, self.overwrite)
            elif not os.path.lexists(self.target):
                os.rename(self.folder, self.target)
            else:
                _move_into(self.folder, self.target, self.files)
            self._made.clear()
        _flush_folder(os.path.dirname(os.path.abspath(self.target)))

    def replace(self, removed: Iterable[str] = ()) -> None:
        """Put files into a folder that exists, in the place of those of their names, and take others of it away.

        All of it or nothing, as `commit` does; but whatever else stands in the folder is no obstacle.
        """
        for flush in self._flushes:
            self.timings.flush += flush.wait()
        _flush_folder(self.folder)
        removed = [name for name in removed if name not in self.files]
        with deferred():
            if len(self.files) == 1 and not removed:
                os.replace(os.path.join(self.folder, self.files[0]), os.path.join(self.target, self.files[0]))
            else:
                _move_into(self.folder, self.target, self.files, removed)
        _flush_folder(self.target)


def check_target(target: str, is_folder: bool, files: list[str], overwrite: bool) -> None:
    """Raise `OutputExists` where writing would replace something and `overwrite` is not set.

    What is no ordinary file is never replaced; nor does an output join an adapter in whose shadow, or in front of
    which, it would stand.
    """
    if not is_folder:
        _check_file(target, overwrite)
        return
    if os.path.lexists(target) and not os.path.isdir(target):
        raise OutputExists(f"{target}: is a file; a folder is to be written there")
    for name in files:
        folder = os.path.join(target, os.path.dirname(name))
        if os.path.lexists(folder) and not os.path.isdir(folder):
            raise OutputExists(f"{folder}: is a file; a folder is to be written there")
        _check_file(os.path.join(target, name), overwrite)
    other = _other_adapter(target, files)
    if other:
        raise OutputExists(
            f"{other}: is part of another adapter, and whoever reads {target} would take it for part of this one; "
            "name another folder, or remove it"
        )


def _check_file(path: str, overwrite: bool) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # Not there; or out of reach, which writing will say better.
    if stat.S_ISDIR(mode):
        raise OutputExists(f"{path}: is a folder; a file is to be written there")
    if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
        raise OutputExists(f"{path}: is a pipe, socket or device; name another output")
    if not overwrite:
        raise OutputExists(f"{path}: exists already; --overwrite replaces it")


def _other_adapter(target: str, files: list[str]) -> str | None:
    """Weights in the folder, or one level below it, that stand where none of `files` does."""
    folders = {os.path.dirname(name) for name in files}
    with contextlib.suppress(OSError):
        for folder in ["", *sorted(name for name in os.listdir(target) if not name.startswith("."))]:
            for weights in FOLDER_WEIGHTS:
                path = os.path.join(target, folder, weights)
                if folder not in folders and os.path.lexists(path):
                    return path
    return None


def _why(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason}; free some space, or name a place on another disk with -o"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{reason}; name a folder that may be written with -o"
    return reason


def _place(staged: str, target: str, overwrite: bool) -> None:
    """Rename a file to its place; without `overwrite`, never over one that has appeared there meanwhile."""
    if not overwrite:
        try:
            os.link(staged, target)
        except FileExistsError as error:
            raise OutputExists(f"{target}: exists already; --overwrite replaces it") from error
        except OSError:
            pass  # No hard links on this file system (FAT, some network ones): the check just made must do.
        else:
            return
    os.replace(staged, target)


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


_REPLACED = ".replaced"
"""Where old files stand until all new ones are in place.  Gone, it says that nothing in there is needed."""


def _move_into(folder: str, target: str, files: list[str], removed: Iterable[str] = ()) -> None:
    """Replace (and remove) files of an existing folder, putting the old ones back should one of the moves fail."""
    backup = os.path.join(folder, _REPLACED)
    undo: list[Callable[[], None]] = []
    touched = {target}

    def make(path: str, undone: bool) -> None:
        if not os.path.isdir(path):
            make(os.path.dirname(path), undone)
            os.mkdir(path)
            if undone:
                undo.append(lambda: os.rmdir(path))

    def move(one: str, two: str) -> None:
        os.rename(one, two)
        undo.append(lambda: os.replace(two, one))

    try:
        for name in files:
            old, place = os.path.join(backup, name), os.path.join(target, name)
            make(os.path.dirname(place), True)
            touched.add(os.path.dirname(place))
            if os.path.lexists(place):
                make(os.path.dirname(old), False)
                move(place, old)
            move(os.path.join(folder, name), place)
        for name in removed:
            make(backup, False)
            move(os.path.join(target, name), os.path.join(backup, name))
    except BaseException as error:
        failures = []
        for step in reversed(undo):
            try:
                step()
            except OSError as failure:
                failures.append(failure)
        if failures:
            # `backup` stays, because it is there: `Staged` then keeps the temporary folder.
            raise OutputFailed(
                f"{target}: {error}; putting the old files back failed too ({failures[0]}); they are in {backup}"
            ) from error
        shutil.rmtree(backup, ignore_errors=True)
        raise
    for path in touched:
        _flush_folder(path)
    shutil.rmtree(backup, ignore_errors=True)


def _flush_folder(path: str) -> None:
    """Make the rename itself durable; not every file system can, and then the rename stands without it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
