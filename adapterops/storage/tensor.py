"""Lazy tensors: a name, a dtype, a shape, and where the bytes are.  Nothing is read until it is needed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from adapterops.errors import CannotRepresent, UnreadableFile
from adapterops.storage import dtypes
from adapterops.storage.regular import Identity, open_regular

if TYPE_CHECKING:
    import numpy.typing
    import torch

CHUNK = 1 << 20
"""Bytes moved at a time.  1 MiB measured as fast as sendfile and keeps peak memory small."""
_BUFFERS = 512
"""That one call of the system fills at most; Linux and macOS take twice as many (IOV_MAX)."""


class ByteSource(Protocol):
    """Something that holds the bytes of tensors, little-endian and C-contiguous."""

    @property
    def path(self) -> str:
        """The file that a message names."""

    def readinto(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on.  Raises `UnreadableFile` where they are not there."""


@dataclass(slots=True)
class FileSource:
    """Byte ranges of a file.  The descriptor is opened at first use and closed with the object.

    `identity` is what the file was when its header was read; another file under the same name is refused.
    """

    path: str
    identity: Identity | None = None
    _descriptor: int = field(default=-1, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[FileSource], tuple[str, Identity | None]]:
        """A copy opens the file for itself: two owners of one descriptor would close it under each other."""
        return FileSource, (self.path, self.identity)

    def readinto(self, start: int, buffer: memoryview) -> None:
        if self._descriptor < 0:
            self._open()
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._descriptor, [buffer[done:]], start + done)
            except OSError as error:
                raise UnreadableFile(f"{self.path}: {error.strerror} at byte {start + done}") from error
            if not got:
                raise UnreadableFile(f"{self.path}: ends at byte {start + done}; it was cut short while being read")
            done += got

    def scatter(self, start: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, one after the other, with the bytes from `start` on, in one call of the system."""
        if self._descriptor < 0:
            self._open()
        got = 0
        with contextlib.suppress(OSError):  # `readinto` says what is wrong
            got = os.preadv(self._descriptor, buffers, start)
        for buffer in buffers:
            if got < len(buffer):
                self.readinto(start, buffer)
            got -= len(buffer)
            start += len(buffer)

    def _open(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                return
            descriptor, found = open_regular(self.path)
            if self.identity not in (None, found):
                os.close(descriptor)
                raise UnreadableFile(f"{self.path}: changed while being read; run the command again")
            self._descriptor = descriptor

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def fill(pieces: Iterable[tuple[ByteSource, int, memoryview]]) -> None:
    """Fill buffers, each with the bytes of a source from a place on.

    Neighbours in a file, with other sources' pieces between them or not, are read in one call: for a thread beside others
    every call is a wait for the interpreter.
    """
    file: FileSource | None = None
    start, length, buffers = 0, 0, list[memoryview]()
    for source, at, buffer in pieces:
        if not isinstance(source, FileSource):
            source.readinto(at, buffer)
            continue
        if file is not None and (source is not file or at != start + length or len(buffers) == _BUFFERS):
            file.scatter(start, buffers)
            file = None
        if file is None:
            file, start, length, buffers = source, at, 0, []
        buffers.append(buffer)
        length += len(buffer)
    if file is not None:
        file.scatter(start, buffers)


@dataclass(frozen=True, slots=True)
class MemorySource:
    """Bytes that exist only in memory: an alpha that a dialect writes, a tensor cast to another dtype."""

    data: bytes | bytearray | memoryview
    path: str = "<memory>"

    def readinto(self, start: int, buffer: memoryview) -> None:
        part = memoryview(self.data)[start : start + len(buffer)]
        if len(part) != len(buffer):
            raise UnreadableFile(f"{self.path}: holds {len(self.data)} bytes, not {start + len(buffer)}")
        buffer[:] = part


NAMELESS = "[]"
"""The key of a tensor that is all that its file holds, without a name."""


def numbered(position: int) -> str:
    """The key of a tensor that has a position in its file's list, and no name."""
    return f"[{position}]"


class LazyTensor(NamedTuple):
    """A tensor that has not been read.

    `key` is its name in the file it came from, `shape` its shape, `dtype` a name of `dtypes.BITS`.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    source: ByteSource
    start: int

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return prod(self.shape) * dtypes.BITS[self.dtype] // 8

    @property
    def where(self) -> str:
        """The place that an error message names: file and tensor."""
        return f"{self.source.path}: tensor {self.key[:200]!r}"

    def chunks(self, buffer: bytearray) -> Iterator[int]:
        """Read the bytes through `buffer`, which holds the next part after each step; yields that part's length."""
        view, start, end = memoryview(buffer), self.start, self.start + self.nbytes
        while start < end:
            length = min(len(buffer), end - start)
            self.source.readinto(start, view[:length])
            yield length
            start += length

    def read(self) -> bytearray:
        """All the bytes."""
        data = bytearray(self.nbytes)
        if data:
            self.source.readinto(self.start, memoryview(data))
        return data

    def item(self) -> float:
        """The number that a one-element tensor holds.  Raises `ValueError` for any other tensor."""
        if self.numel != 1:
            raise ValueError(f"{self.where} has shape {list(self.shape)}, not one element")
        return dtypes.decode_scalar(self.dtype, bytes(self.read()))

    def reshape(self, shape: tuple[int, ...]) -> LazyTensor:
        """The same bytes under another shape.  Raises `ValueError` if the numbers of elements differ."""
        if prod(shape) != self.numel:
            raise ValueError(f"{self.where}: shape {list(self.shape)} cannot become {list(shape)}")
        return self if shape == self.shape else self._replace(shape=shape)

    def rows(self, pieces: Sequence[tuple[int, int]]) -> LazyTensor:
        """The rows [start, stop) of the first axis, in order; no byte is read.

        Raises `ValueError` for rows that it has not.
        """
        count = self.shape[0] if self.shape else 0
        if any(not 0 <= start < stop <= count for start, stop in pieces):
            raise ValueError(f"{self.where}: shape {list(self.shape)} has no rows {list(pieces)}")
        width = self.nbytes // count if count else 0
        parts = [
            self._replace(shape=(stop - start, *self.shape[1:]), start=self.start + start * width)
            for start, stop in pieces
        ]
        return stack(parts)

    def transposed(self) -> LazyTensor:
        """The matrix (columns, rows), computed when it is read; the transpose of a transpose is the tensor itself.

        Raises `ValueError` for what is no matrix, and for dtypes narrower than a byte.
        """
        if len(self.shape) != 2 or dtypes.BITS[self.dtype] % 8:
            raise ValueError(f"{self.where}: {self.dtype} {list(self.shape)} is no matrix that can be transposed")
        if isinstance(self.source, TransposedSource) and _is_turned(self):
            return self.source.tensor
        return LazyTensor(self.key, self.dtype, self.shape[::-1], TransposedSource(self), 0)

    def numpy(self) -> numpy.typing.NDArray[Any]:
        """The values (BF16 and 8-bit floats as float32).  Raises `CannotRepresent` for types that numpy has not."""
        try:
            return dtypes.to_numpy(self.dtype, memoryview(self.read()), self.shape)
        except ValueError as error:
            raise CannotRepresent(f"{self.where}: {error}; nothing can be computed with it") from error

    def torch(self) -> torch.Tensor:
        """The values as a CPU tensor of the same dtype.  Raises `CannotRepresent` for types that torch has not."""
        import torch

        if self.dtype not in TORCH_NAMES:
            raise CannotRepresent(f"{self.where}: torch has no dtype {self.dtype}")
        # Not through `read`: room that is about to be filled need not be zeroed first.
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        if self.nbytes:
            room: Any = data.numpy()
            self.source.readinto(self.start, memoryview(room))
        return data.view(getattr(torch, TORCH_NAMES[self.dtype])).reshape(self.shape)

    def mapped(self, dtype: str | None = None, factor: float = 1.0) -> LazyTensor:
        """The values times `factor`, rounded once to the float type `dtype`; computed when they are read.

        Without a factor, tensors of other types than floats stay as they are; so does everything where nothing
        changes.  Raises `CannotRepresent` where a factor cannot be applied.
        """
        dtype = dtype or self.dtype
        if factor == 1.0 and (dtype == self.dtype or self.dtype not in dtypes.NUMBERS):
            return self
        if self.dtype not in dtypes.NUMBERS:
            raise CannotRepresent(f"{self.where}: a scale cannot be folded into dtype {self.dtype}; leave it unfolded")
        if dtype not in dtypes.FLOATS:
            raise CannotRepresent(f"{self.where}: {dtype} is read but not written; give --dtype (float16, bfloat16 …)")
        made = self.source
        if isinstance(made, MappedSource) and dtype == self.dtype and self.numel == made.tensor.numel:
            # A factor on what is rounded to this type already: both at once, so that it is rounded once.
            whole = MappedSource(made.tensor, dtype, made.factor * factor)
            return LazyTensor(self.key, dtype, self.shape, whole, 0)
        return LazyTensor(self.key, dtype, self.shape, MappedSource(self, dtype, factor), 0)


def stack(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors one after another along the first axis, under the first one's key; no byte is read.

    Raises `ValueError` where dtypes or other axes differ.
    """
    first = parts[0]
    if any((p.dtype, p.shape[1:]) != (first.dtype, first.shape[1:]) for p in parts):
        raise ValueError(f"{first.where}: {first.dtype} {list(first.shape)} cannot be stacked with the others")
    if len(parts) == 1:
        return first
    shape = (sum(p.shape[0] for p in parts), *first.shape[1:])
    return LazyTensor(first.key, first.dtype, shape, StackedSource(tuple(parts)), 0)


class StackedSource(NamedTuple):
    """The bytes of several tensors in a row."""

    parts: tuple[LazyTensor, ...]

    @property
    def path(self) -> str:
        """The file that the first one comes from."""
        return self.parts[0].source.path

    def readinto(self, start: int, buffer: memoryview) -> None:
        at = 0
        for part in self.parts:
            if at + part.nbytes > start and buffer:
                skipped = max(0, start - at)
                take = min(part.nbytes - skipped, len(buffer))
                part.source.readinto(part.start + skipped, buffer[:take])
                buffer, start = buffer[take:], start + take
            at += part.nbytes
        if buffer:
            raise UnreadableFile(f"{self.path}: ends {len(buffer)} bytes too early")


class ZeroSource(NamedTuple):
    """Zeros: the rows of a fused projection whose parts an adapter leaves alone."""

    path: str

    def readinto(self, start: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))


class ColumnSource(NamedTuple):
    """A matrix (rows, columns) laid into a wider or narrower one: its column 0 becomes column `shift` of `width`."""

    tensor: LazyTensor
    shift: int
    width: int

    @property
    def path(self) -> str:
        """The file that the values come from."""
        return self.tensor.source.path

    def readinto(self, start: int, buffer: memoryview) -> None:
        import numpy as np

        size = dtypes.BITS[self.tensor.dtype] // 8
        before = self.tensor.numel // self.tensor.shape[0]
        first, last = start // (self.width * size), -(-(start + len(buffer)) // (self.width * size))
        data = bytearray((last - first) * before * size)
        self.tensor.source.readinto(self.tensor.start + first * before * size, memoryview(data))
        out = np.zeros((last - first, self.width, size), dtype=np.uint8)
        low, high = max(0, self.shift), min(self.width, self.shift + before)
        values = np.frombuffer(data, dtype=np.uint8).reshape(last - first, before, size)
        out[:, low:high] = values[:, low - self.shift : high - self.shift]
        buffer[:] = memoryview(out.tobytes())[start - first * self.width * size :][: len(buffer)]


class TransposedSource(NamedTuple):
    """The bytes of a matrix's transpose.

    Every row of it has an element of each row of the matrix, so the matrix is read whole.  Each thread keeps the last
    few until their last byte has been read: what is copied in parts is turned once, and memory follows the largest factor.
    """

    tensor: LazyTensor

    @property
    def path(self) -> str:
        """The file that the values come from."""
        return self.tensor.source.path

    def readinto(self, start: int, buffer: memoryview) -> None:
        held = _turned.__dict__.setdefault("held", {})
        at = id(self.tensor)
        known = held.pop(at, None)
        data = known[1] if known is not None and known[0] is self.tensor else self._turn()
        part = data[start : start + len(buffer)]
        if len(part) != len(buffer):
            raise UnreadableFile(f"{self.path}: ends {len(buffer) - len(part)} bytes too early")
        buffer[:] = part
        if start + len(buffer) < len(data):
            while len(held) >= _MOST_TURNED:
                del held[next(iter(held))]
            held[at] = self.tensor, data

    def _turn(self) -> memoryview:
        import numpy as np

        # As whole numbers of the elements' size, whose values do not matter.
        size = dtypes.BITS[self.tensor.dtype] // 8
        words: numpy.typing.NDArray[Any] = np.frombuffer(self.tensor.read(), dtype=f"u{size}")
        return np.ascontiguousarray(words.reshape(self.tensor.shape).T).reshape(-1).view(np.uint8).data


_turned = threading.local()
_MOST_TURNED = 2
"""Matrices that a thread keeps: as many as are compared with each other."""


def zeros(like: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """Zeros of the dtype of another tensor, under its key."""
    return LazyTensor(like.key, like.dtype, shape, ZeroSource(like.source.path), 0)


def columns(tensor: LazyTensor, shift: int, width: int) -> LazyTensor:
    """The matrix (rows, columns) with its column 0 at column `shift` of `width`; zeros beside it.

    A negative `shift` leaves its first columns out; a one by one kernel behind the columns stays.
    Raises `ValueError` for dtypes narrower than a byte, and for other kernels.
    """
    if dtypes.BITS[tensor.dtype] % 8 or prod(tensor.shape[2:]) != 1:
        raise ValueError(f"{tensor.where}: columns of {tensor.dtype} {list(tensor.shape)} cannot be moved")
    if shift == 0 and width == tensor.shape[1]:
        return tensor
    shape = (tensor.shape[0], width, *tensor.shape[2:])
    return LazyTensor(tensor.key, tensor.dtype, shape, ColumnSource(tensor, shift, width), 0)


def same_bytes(one: LazyTensor, two: LazyTensor) -> bool:
    """Whether two tensors have one dtype, shape and content."""
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    if one.source is two.source and one.start == two.start:
        return True
    if _is_turned(one) and _is_turned(two):
        return same_bytes(one.transposed(), two.transposed())
    first, second = bytearray(CHUNK), bytearray(CHUNK)
    for length, _ in zip(one.chunks(first), two.chunks(second), strict=True):
        if not first.startswith(memoryview(second)[:length]):
            return False
    return True


def _is_turned(tensor: LazyTensor) -> bool:
    """Whether a tensor is the transpose of one that stands elsewhere."""
    source = tensor.source
    return isinstance(source, TransposedSource) and tensor.start == 0 and source.tensor.shape == tensor.shape[::-1]


def same_values(one: LazyTensor, two: LazyTensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their types and shapes."""
    if one.numel != two.numel:
        return False
    if same_bytes(one.reshape((one.numel,)), two.reshape((two.numel,))):
        return True
    if one.dtype == two.dtype or not {one.dtype, two.dtype} <= set(dtypes.NUMBERS):
        return False
    return bool((one.numpy().astype("f8").reshape(-1) == two.numpy().astype("f8").reshape(-1)).all())


def is_zero(tensor: LazyTensor) -> bool:
    """Whether every byte is zero."""
    buffer = bytearray(CHUNK)
    return all(buffer.count(0, 0, length) == length for length in tensor.chunks(buffer))


class MappedSource(NamedTuple):
    """The bytes of a tensor after an element-wise change; nothing is held between reads."""

    tensor: LazyTensor
    dtype: str
    factor: float

    @property
    def path(self) -> str:
        """The file that the values come from."""
        return self.tensor.source.path

    def readinto(self, start: int, buffer: memoryview) -> None:
        width, before = dtypes.BITS[self.dtype] // 8, dtypes.BITS[self.tensor.dtype] // 8
        first, last = start // width, -(-(start + len(buffer)) // width)
        data = bytearray((last - first) * before)
        self.tensor.source.readinto(self.tensor.start + first * before, memoryview(data))
        if before == 2 and self.tensor.dtype in dtypes.FLOATS:
            out = _looked_up(data, self.tensor.dtype, self.dtype, self.factor)
        else:
            out = memoryview(_mapped(data, self.tensor.dtype, self.dtype, self.factor))
        buffer[:] = out[start - first * width :][: len(buffer)]


def _mapped(data: bytes | bytearray, before: str, after: str, factor: float) -> bytes:
    """The values in another type, times a factor, rounded once."""
    import numpy as np

    # Overflow and NaN are for the proof to report, with the tensor's name.
    with np.errstate(all="ignore"):
        size = len(data) // (dtypes.BITS[before] // 8)
        return dtypes.from_numpy(after, dtypes.to_numpy(before, data, (size,)).astype(np.float64) * factor)


@lru_cache(maxsize=8)
def _every_value(before: str, after: str, factor: float) -> numpy.typing.NDArray[Any]:
    """What `_mapped` makes of each of the 65,536 elements that a 16-bit type has."""
    import numpy as np

    every = np.arange(1 << 16, dtype="<u2").tobytes()
    return np.frombuffer(_mapped(every, before, after, factor), dtype=f"<u{dtypes.BITS[after] // 8}")


def _looked_up(data: bytearray, before: str, after: str, factor: float) -> memoryview:
    """`_mapped` for a 16-bit type, by a table."""
    import numpy as np

    table = _every_value(before, after, factor)
    raw = bytearray(len(data) // 2 * table.itemsize)
    np.take(table, np.frombuffer(data, dtype="<u2"), out=np.frombuffer(raw, dtype=table.dtype), mode="clip")
    return memoryview(raw)


TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
"""The torch dtype of each safetensors dtype."""


def scalar(key: str, dtype: str, value: float, shape: tuple[int, ...] = ()) -> LazyTensor:
    """A one-element tensor in memory.  Raises `ValueError` where `dtype` cannot hold `value` exactly."""
    data = dtypes.encode_scalar(dtype, value)
    if data is None:
        raise ValueError(f"{value!r} has no exact {dtype} form")
    return LazyTensor(key, dtype, shape, MemorySource(data), 0)
