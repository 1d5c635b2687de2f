"""`.npz`: a zip of `.npy` arrays, as numpy's `savez` and MLX's write them; read without numpy where nothing is computed.

Sources: `numpy/lib/_format_impl.py` (the `.npy` format, versions 1 to 3) and, for bfloat16, which numpy has not,
`mlx/backend/common/load.cpp` with `mlx/dtype.cpp`: MLX writes and reads it as `V2`, two bytes of no type.

An array that is stored as it is, is a range of the file; a compressed one, one in Fortran order or big-endian is
decoded when it is read.  Arrays of Python objects are pickles, and are never loaded.
"""

from __future__ import annotations

import ast
import re
import zipfile
import zlib
from dataclasses import dataclass, field
from math import prod
from typing import IO, TYPE_CHECKING, Final

from adapterops.errors import UnreadableFile, UnsafePickle, UnsupportedFormat
from adapterops.storage import pickle_scan
from adapterops.storage.archive import begin_of, entries_of
from adapterops.storage.dtypes import BITS
from adapterops.storage.regular import open_regular
from adapterops.storage.safetensors import MAX_DIMENSION, insist_on_unicode
from adapterops.storage.tensor import ByteSource, FileSource, LazyTensor

if TYPE_CHECKING:
    import numpy
    import numpy.typing

_DTYPES: Final[dict[str, str]] = {
    "f8": "F64", "f4": "F32", "f2": "F16", "V2": "BF16", "c8": "C64",
    "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8", "u8": "U64", "u4": "U32", "u2": "U16", "u1": "U8", "b1": "BOOL",
}  # fmt: skip
"""numpy's array-protocol types without their byte order."""
_MAX_HEADER = 10_000
"""Bytes; numpy refuses longer headers of files that it does not trust."""
_MAX_ENTRIES = 50_000
_LONGEST_PICKLE = 1 << 20
"""Bytes of an array of objects that are looked through for what it would do."""
_ARRAYS = re.compile(r"numpy\.(?:_?core\.multiarray\.(?:_reconstruct|scalar)|ndarray|dtype)")
"""What the pickle of any array of objects names."""
_MAX_RATIO = 64
"""Bytes of tensors to bytes of file.  Zeros compress a thousandfold, the other half of an adapter does not."""
_MAGIC = b"\x93NUMPY"
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class _Array:
    """What a `.npy` header says: dtype, shape, order of axes and bytes, and the header's own length in bytes."""

    dtype: str
    shape: tuple[int, ...]
    fortran: bool
    swapped: bool
    length: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BITS[self.dtype] // 8


@dataclass(slots=True)
class MemberSource:
    """The bytes of one array that have to be decoded first; held from the first read to that of the last byte."""

    file: FileSource
    name: str
    entry: zipfile.ZipInfo
    begin: int
    """Where the member's (compressed) bytes start in the file."""
    array: _Array
    _bytes: memoryview | None = field(default=None, repr=False)

    @property
    def path(self) -> str:
        """The archive."""
        return self.file.path

    def readinto(self, start: int, buffer: memoryview) -> None:
        data = self._bytes if self._bytes is not None else self._decode()
        buffer[:] = data[start : start + len(buffer)]
        # Not kept once read through, so that memory follows the largest tensor.
        self._bytes = data if start + len(buffer) < len(data) else None

    def _decode(self) -> memoryview:
        packed = bytearray(self.entry.compress_size)
        self.file.readinto(self.begin, memoryview(packed))
        whole: bytes | bytearray = packed
        if self.entry.compress_type != zipfile.ZIP_STORED:
            whole = _inflate(f"{self.path}: tensor {self.name!r}", packed, self.entry.file_size)
            if len(whole) != self.entry.file_size or zlib.crc32(whole) != self.entry.CRC:
                raise UnreadableFile(
                    f"{self.path}: tensor {self.name!r}: is damaged (its checksum is wrong); {_AGAIN}",
                    fault="cut-short",
                )
        data = memoryview(whole)[self.array.length :]
        if not (self.array.fortran or self.array.swapped):
            return data
        import numpy as np

        # A complex number is two floats, each with its own order of bytes.
        width = BITS[self.array.dtype] // 8
        halves = 2 if self.array.dtype == "C64" else 1
        raw: numpy.typing.NDArray[numpy.uint8] = np.frombuffer(data, dtype=np.uint8)
        if self.array.swapped:
            raw = raw.reshape(-1, width // halves)[:, ::-1].reshape(-1)
        if self.array.fortran:
            raw = raw.reshape(*self.array.shape[::-1], width)
            raw = raw.transpose(*range(len(self.array.shape))[::-1], len(self.array.shape))
        return np.ascontiguousarray(raw).reshape(-1).data


def read(path: str) -> tuple[dict[str, LazyTensor], dict[str, str], tuple[str, ...]]:
    """The arrays of an archive under their names without `.npy`, no metadata, and notes.

    Raises `UnreadableFile` where it is damaged or claims more than it can hold, `UnsafePickle` for arrays of Python
    objects, and `UnsupportedFormat` for types that are no plain numbers.
    """
    descriptor, identity = open_regular(path)
    with open(descriptor, "rb") as file:
        entries, end = _entries(path, file, identity[2])
        ranges = sorted((_member(path, file, entry, end) for entry in entries), key=lambda member: member[1])
    source = FileSource(path, identity)
    position = 0
    for entry, begin in ranges:
        if entry.header_offset < position:
            raise UnreadableFile(
                f"{path}: entry {entry.filename[:200]!r} lies inside another; refused as a bomb", fault="bomb"
            )
        position = begin + entry.compress_size
    begins = {id(entry): begin for entry, begin in ranges}
    tensors = {}
    for entry in entries:
        tensor = _tensor(source, entry, begins[id(entry)])
        if tensor.key in tensors:
            raise UnreadableFile(
                f"{path}: holds two arrays named {tensor.key[:200]!r}; keep one", fault="duplicate", keys=(tensor.key,)
            )
        tensors[tensor.key] = tensor
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > _MAX_RATIO * max(identity[2], 1 << 20):
        raise UnreadableFile(
            f"{path}: its arrays claim {total} bytes, but the file has {identity[2]}; refused as a bomb",
            fault="bomb",
        )
    untyped = [key for key, tensor in tensors.items() if tensor.dtype == "BF16"]
    notes = (f"arrays of type V2 ({len(untyped)}) are read as bfloat16, as MLX writes it",) if untyped else ()
    return tensors, {}, notes


def _entries(path: str, file: IO[bytes], size: int) -> tuple[list[zipfile.ZipInfo], int]:
    """The list of entries at the end of the zip, and where that list starts."""
    file.seek(0)
    head = file.read(16)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        raise UnreadableFile(
            f"{path}: is a safetensors file, and is called as a numpy archive; rename it to .safetensors",
            fault="wrong-suffix",
        )
    entries, end = entries_of(path, file, size, "a numpy archive")
    if len(entries) > _MAX_ENTRIES:
        raise UnreadableFile(f"{path}: holds {len(entries)} entries; no adapter has so many", fault="bomb")
    return entries, end


def _member(path: str, file: IO[bytes], entry: zipfile.ZipInfo, end: int) -> tuple[zipfile.ZipInfo, int]:
    """An entry that may be read, and where its bytes start.  `end` is where the entries' bytes must have ended."""
    here = f"{path}: entry {entry.filename[:200]!r}"
    if entry.flag_bits & 0x41:
        raise UnreadableFile(
            f"{here} is encrypted; unpack it and save it again, best as .safetensors", fault="compressed"
        )
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UnreadableFile(
            f"{here} is compressed by method {entry.compress_type}, which numpy never uses", fault="compressed"
        )
    if entry.compress_type == zipfile.ZIP_STORED and entry.file_size != entry.compress_size:
        raise UnreadableFile(
            f"{here} is stored as {entry.compress_size} bytes, but claims {entry.file_size}; {_AGAIN}", fault="bomb"
        )
    return entry, begin_of(path, file, entry, end)


def _tensor(source: FileSource, entry: zipfile.ZipInfo, begin: int) -> LazyTensor:
    path = source.path
    key = entry.filename.removesuffix(".npy")
    here = f"{path}: tensor {key[:200]!r}"
    if key == entry.filename or not key:
        raise UnreadableFile(
            f"{path}: entry {entry.filename[:200]!r} is no .npy array; is it a numpy archive?", fault="wrong-suffix"
        )
    insist_on_unicode(path, [key])
    if key == "__metadata__":
        raise UnreadableFile(
            f"{path}: an array is named {key!r}, which safetensors reserves; rename it", fault="reserved-name"
        )
    head = bytearray(min(entry.compress_size, _MAX_HEADER + 12))
    source.readinto(begin, memoryview(head))
    if entry.compress_type != zipfile.ZIP_STORED:
        head = bytearray(_inflate(here, head, min(entry.file_size, _MAX_HEADER + 12)))
    try:
        array = _parse(here, bytes(head))
    except UnsafePickle as error:
        packed = bytearray(min(entry.compress_size, _LONGEST_PICKLE))
        source.readinto(begin, memoryview(packed))
        raise UnsafePickle(f"{error}{_would_do(entry, bytes(packed))}") from error
    if entry.file_size != array.length + array.nbytes:
        raise UnreadableFile(
            f"{here}: {array.dtype} {str(list(array.shape))[:80]} takes {array.nbytes} bytes, but the entry has "
            f"{entry.file_size - array.length}; {_AGAIN}",
            fault="shape",
            keys=(key,),
        )
    if entry.compress_type == zipfile.ZIP_STORED and not (array.fortran or array.swapped):
        return LazyTensor(key, array.dtype, array.shape, source, begin + array.length)
    decoded: ByteSource = MemberSource(source, key[:200], entry, begin, array)
    return LazyTensor(key, array.dtype, array.shape, decoded, 0)


def _would_do(entry: zipfile.ZipInfo, packed: bytes) -> str:
    """What the pickle of an array of objects would do, for the message that refuses it."""
    if entry.compress_type != zipfile.ZIP_STORED:
        try:
            packed = _inflate("", packed, _LONGEST_PICKLE)
        except UnreadableFile:
            return ""
    start = 10 if packed[6:7] == b"\1" else 12
    length = start + int.from_bytes(packed[8:start], "little")
    does = pickle_scan.scan_bytes(packed[length:], reads=_ARRAYS).does
    return f": it would {does}" if does else ""


def _inflate(here: str, packed: bytes | bytearray, limit: int) -> bytes:
    """At most `limit` bytes of a deflated member."""
    if not limit:
        return b""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, limit)
    except zlib.error as error:
        raise UnreadableFile(f"{here}: cannot be decompressed ({error}); {_AGAIN}", fault="cut-short") from error


def _parse(here: str, head: bytes) -> _Array:
    """The `.npy` header at the start of a member, of which `head` holds enough."""
    if head[:6] != _MAGIC or len(head) < 10 or head[6] not in (1, 2, 3):
        raise UnreadableFile(f"{here}: is no .npy array of version 1, 2 or 3, or damaged; {_AGAIN}", fault="cut-short")
    start = 10 if head[6] == 1 else 12
    length = start + int.from_bytes(head[8:start], "little")
    if length - start > _MAX_HEADER:
        raise UnreadableFile(
            f"{here}: its header claims {length - start} bytes; more than {_MAX_HEADER} is not accepted",
            fault="header-size",
        )
    if length > len(head):
        raise UnreadableFile(f"{here}: ends inside its header: cut short; {_AGAIN}", fault="cut-short")
    try:
        said = ast.literal_eval(head[start:length].decode("utf-8" if head[6] == 3 else "latin-1").strip())
    # The last two are what nesting makes of Python's own parser.
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise UnreadableFile(
            f"{here}: its header is no Python dictionary: damaged; {_AGAIN}", fault="header"
        ) from error
    if not isinstance(said, dict) or said.keys() != {"descr", "fortran_order", "shape"}:
        raise UnreadableFile(f"{here}: its header must have exactly descr, fortran_order and shape", fault="header")
    descr, fortran, shape = said["descr"], said["fortran_order"], said["shape"]
    if not isinstance(shape, tuple) or len(shape) > 64 or not all(map(_is_size, shape)) or type(fortran) is not bool:
        raise UnreadableFile(
            f"{here}: shape {str(shape)[:80]}, fortran_order {str(fortran)[:80]} is no shape and order",
            fault="shape",
        )
    if prod(shape) >= MAX_DIMENSION:
        raise UnreadableFile(f"{here}: shape {str(shape)[:80]} has more elements than any file", fault="shape")
    order, kind = (descr[:1], descr[1:]) if isinstance(descr, str) else ("", "")
    if kind.startswith("O"):
        raise UnsafePickle(f"{here}: refused: it holds pickled Python objects, and loading them could run code")
    if order not in "<>|=" or not order or kind not in _DTYPES:
        raise UnsupportedFormat(
            f"{here}: numpy's type {str(descr)[:80]} is no plain number; save it as float32 or float16",
            fault="odd-tensor",
        )
    # MLX writes no order for bytes; "=" would be the writer's own, which the file does not tell.
    width = BITS[_DTYPES[kind]] // 8
    if order == "=" or (order == "|" and width > 1 and kind != "V2"):
        raise UnsupportedFormat(
            f"{here}: numpy's type {descr} does not say in which order its bytes are; save it again",
            fault="odd-tensor",
        )
    # In either order of axes a vector is the same.
    axes = sum(size > 1 for size in shape)
    return _Array(_DTYPES[kind], shape, fortran and axes > 1 and prod(shape) > 0, order == ">" and width > 1, length)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_DIMENSION
