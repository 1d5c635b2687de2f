"""A nameless file for tensors that are computed before it is known where they will stand.

Its name is gone as soon as it is open: whatever ends the process, nothing is left behind.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO

from adapterops.errors import OutputFailed, UnreadableFile
from adapterops.storage.tensor import LazyTensor


@dataclass(slots=True)
class Spool:
    """Bytes on disk under no name; a `ByteSource`.  Freed with the object."""

    path: str
    """What a message names."""
    folder: str = ""
    """Where the disk has room; "" for the system's temporary folder."""
    size: int = 0
    _file: IO[bytes] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            # Open as long as the tensors are.
            self._file = tempfile.TemporaryFile(dir=self.folder or None, prefix=".adapterops-", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise OutputFailed(
                f"{self.folder or tempfile.gettempdir()}: cannot write there: {error.strerror}"
            ) from error

    def reserve(self, key: str, dtype: str, shape: Sequence[int]) -> LazyTensor:
        """Room for a tensor behind those that have one already, to be filled by `write`."""
        tensor = LazyTensor(key, dtype, tuple(shape), self, self.size)
        self.size += tensor.nbytes
        return tensor

    def fill(self) -> None:
        """Zeros wherever nothing has been written: what is planned can be looked at.  Raises `OutputFailed`."""
        try:
            os.ftruncate(self._file.fileno(), self.size)
        except OSError as error:
            raise OutputFailed(f"{self.path}: {error.strerror}: {self.size} bytes are needed for it") from error

    def write(self, tensor: LazyTensor, data: memoryview) -> None:
        """Fill a tensor's room.  Safe in several threads at a time.  Raises `OutputFailed`."""
        if len(data) != tensor.nbytes:
            raise ValueError(f"{tensor.where}: {len(data)} bytes, and room for {tensor.nbytes}")
        self.write_part(tensor, 0, data)

    def write_part(self, tensor: LazyTensor, at: int, data: memoryview) -> None:
        """Fill a part of a tensor's room, from its byte `at` on; as `write` else."""
        if at + len(data) > tensor.nbytes:
            raise ValueError(f"{tensor.where}: {at} and {len(data)} bytes, and room for {tensor.nbytes}")
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], tensor.start + at + done)
        except OSError as error:
            raise OutputFailed(f"{self.path}: {error.strerror} while computing it; free some space") from error

    def readinto(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on."""
        done = 0
        while done < len(buffer):
            got = os.preadv(self._file.fileno(), [buffer[done:]], start + done)
            if not got:
                raise UnreadableFile(f"{self.path}: byte {start + done} was never computed")
            done += got
