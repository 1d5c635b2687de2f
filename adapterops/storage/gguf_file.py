"""The GGUF container: read and written by the `gguf` package, behind a check of the header.

The package maps the file and believes its counts and lengths, and makes Python objects of every value: a model's vocabulary
takes seconds and gigabytes, a stranger's header as much as it claims.  So the header is walked first, within bounds, and what
no adapter has is refused before anything is allocated.

Strings of the header are given as they are; every other value as its JSON, with its type in `Values.types`.  Shapes are
numpy's: GGUF states the axes the other way round.  Quantised tensors are given as the numbers that they stand for.

Sources: https://github.com/ggml-org/ggml `docs/gguf.md`; `src/gguf.cpp` (that tensors follow each other in the order of the
header, padded to the alignment); gguf 0.19 `gguf_reader.py`, `gguf_writer.py`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from importlib import import_module
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any, Final, NamedTuple

from adapterops.errors import CannotRepresent, InvalidHeader, NotAnAdapter, UnreadableFile, UnsupportedFormat
from adapterops.storage import dtypes
from adapterops.storage.regular import open_regular
from adapterops.storage.tensor import FileSource, LazyTensor

MAGIC: Final = b"GGUF"
MAX_HEADER: Final = 16_000_000
"""Bytes.  A tensor takes about a hundred."""
MAX_COUNT: Final = 100_000
"""Tensors, entries, and elements of an array: of each the most that is read."""
MAX_DIMS: Final = 4
MAX_NAME: Final = 63
"""Characters of a tensor's name (`GGML_MAX_NAME` less the zero behind it)."""
_ALIGNMENT: Final = 32
_STRING, _ARRAY = 8, 9
_SIZES: Final = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by the number of its type."""
_AGAIN = "download it again"

Value = tuple[str, Any]
"""A header's value with its type, as `gguf.GGUFValueType` calls it; `ARRAY:UINT32` for an array of these."""


class Values(dict[str, str]):
    """A header's entries as strings; `types` has the types of those that are no strings."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, str] = {}


class _Info(NamedTuple):
    """What the header says of a tensor."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass
class _Cursor:
    """The header, read a piece at a time; no byte before it is needed, and none beyond `MAX_HEADER`."""

    path: str
    file: RawIOBase
    size: int
    at: int = 0
    _data: bytearray = field(default_factory=bytearray)

    def take(self, length: int) -> bytes:
        """The next bytes.  Raises `InvalidHeader` where the file or the bound ends before them."""
        stop = self.at + length
        if stop > self.size:
            raise InvalidHeader(
                f"{self.path}: cut short: its header claims {length} bytes at {self.at}, and the file has {self.size}; {_AGAIN}",
                fault="cut-short",
            )
        if stop > MAX_HEADER:
            raise InvalidHeader(
                f"{self.path}: its header takes more than {MAX_HEADER} bytes; no adapter has so many",
                fault="header-size",
            )
        while len(self._data) < stop:
            more = self.file.read(min(max(stop - len(self._data), 1 << 16), self.size - len(self._data)))
            if not more:
                raise UnreadableFile(f"{self.path}: was cut short while being read", fault="cut-short")
            self._data += more
        taken = bytes(self._data[self.at : stop])
        self.at = stop
        return taken

    def number(self, form: str) -> int:
        """The next integer, little-endian."""
        return int(struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0])

    def text(self) -> str:
        """The next string."""
        data = self.take(self.number("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidHeader(
                f"{self.path}: {data[:80]!r} in the header is not valid Unicode", fault="not-unicode"
            ) from error

    def value(self) -> str | int | None:
        """The next value: a string's text, an unsigned 32-bit integer, None for any other, which is passed over."""
        kind = self.number("I")
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            self._array()
            return None
        data = self.take(self._width(kind))
        return int.from_bytes(data, "little") if kind == 4 else None

    def _array(self) -> None:
        kind, count = self.number("I"), self.number("Q")
        if count > MAX_COUNT:
            raise NotAnAdapter(
                f"{self.path}: its header holds an array of {count} values, as a model's vocabulary; no adapter has one"
            )
        if kind == _STRING:
            for _ in range(count):
                self.text()
        else:
            self.take(count * self._width(kind))

    def _width(self, kind: int) -> int:
        if kind not in _SIZES:
            raise InvalidHeader(f"{self.path}: the header has a value of the unknown type {kind}", fault="header")
        return _SIZES[kind]


def package() -> Any:
    """The `gguf` package.  Raises `UnsupportedFormat` where it is not installed."""
    try:
        return import_module("gguf")
    except ImportError as error:
        raise UnsupportedFormat(
            f"GGUF files are read and written with the gguf package, which cannot be imported ({error}); "
            "pip install adapterops[gguf]"
        ) from error


def check(file: RawIOBase, size: int, path: str) -> None:
    """Walk the header of an open file of `size` bytes, at its start.

    Raises `InvalidHeader` for what breaks the format's rules or claims more than the file or an adapter has, `NotAnAdapter`
    for a model, `UnsupportedFormat` for another version or byte order and for unknown types of tensors.
    """
    cursor = _Cursor(path, file, size)
    if cursor.take(4) != MAGIC:
        raise InvalidHeader(f"{path}: does not begin as a GGUF file")
    version = cursor.number("I")
    if version not in (2, 3):
        big = " (its numbers stand with the highest byte first)" if version & 0xFFFF == 0 else ""
        raise UnsupportedFormat(f"{path}: is GGUF of version {version}{big}; 2 and 3, little-endian, are read")
    tensors, entries = cursor.number("Q"), cursor.number("Q")
    for count, what, least in ((entries, "entries", 13), (tensors, "tensors", 32)):
        if count > MAX_COUNT or count * least > size:
            raise InvalidHeader(
                f"{path}: its header announces {count} {what}; the file has {size} bytes, and no adapter more than "
                f"{MAX_COUNT}",
                fault="header-size",
            )
    alignment, seen = _ALIGNMENT, set()
    for _ in range(entries):
        key = cursor.text()
        value = cursor.value()
        if key in seen:
            raise InvalidHeader(f"{path}: the header names {key[:200]!r} twice", fault="duplicate")
        seen.add(key)
        if key == "general.type" and value != "adapter":
            raise NotAnAdapter(f"{path}: is a GGUF file of a {str(value)[:40]}, not of an adapter (general.type)")
        if key == "general.alignment":
            alignment = _power(path, value)
    _lay_out(path, size, alignment, cursor.at, tensors, lambda: _info(cursor))


def _power(path: str, value: str | int | None) -> int:
    if not isinstance(value, int) or not 0 < value <= 1 << 20 or value & (value - 1):
        raise InvalidHeader(f"{path}: general.alignment is {str(value)[:40]}, not a power of two", fault="offsets")
    return value


def _info(cursor: _Cursor) -> tuple[_Info, int]:
    """The next tensor's entry, and where it ends."""
    name = cursor.text()
    dims = cursor.number("I")
    if not 1 <= dims <= MAX_DIMS:
        raise InvalidHeader(
            f"{cursor.path}: tensor {name[:200]!r}: has {dims} dimensions; GGUF has 1 to {MAX_DIMS}",
            fault="shape",
            keys=(name,),
        )
    shape = tuple(cursor.number("Q") for _ in range(dims))
    return _Info(name, shape[::-1], cursor.number("I"), cursor.number("Q")), cursor.at


def _lay_out(path: str, size: int, alignment: int, end: int, count: int, read: Callable[[], tuple[_Info, int]]) -> None:
    """Read the tensors' entries; raise where they do not follow each other, or end beyond the file."""
    position, names, infos = 0, set[str](), list[tuple[_Info, int]]()
    for _ in range(count):
        info, end = read()

        def wrong(what: str, fault: str, name: str = info.name) -> InvalidHeader:
            return InvalidHeader(f"{path}: tensor {name[:200]!r}: {what}", fault=fault, keys=(name,))

        if info.name in names:
            raise wrong("stands in the header twice", "duplicate")
        names.add(info.name)
        if prod(info.shape) >= 2**53:
            raise wrong(f"shape {str(list(info.shape))[:80]} has more elements than any file", "shape")
        block, width = _block(path, info)
        if info.shape[-1] % block:
            raise wrong(f"its rows of {info.shape[-1]} elements are no whole blocks of {block}", "shape")
        if info.offset != position:
            over = "overlap" if info.offset < position else "gap"
            raise wrong(f"its bytes begin at {info.offset}, and those before it end at {position}", over)
        length = prod(info.shape) // block * width
        infos.append((info, position + length))
        position += -(-length // alignment) * alignment
    held = size - -(-end // alignment) * alignment
    lost = [info.name for info, stop in infos if stop > held]
    if lost:
        raise InvalidHeader(
            f"{path}: cut short: the header accounts for {position} bytes of tensors, but {max(held, 0)} follow it; "
            f"{len(lost)} of {len(infos)} tensors, {lost[0][:200]!r} among them, are not whole; {_AGAIN}",
            fault="cut-short",
            keys=lost,
        )
    if held > position:
        raise InvalidHeader(
            f"{path}: the header accounts for {position} bytes of tensors, but {held} follow it", fault="trailing"
        )


def _block(path: str, info: _Info) -> tuple[int, int]:
    """Elements and bytes of a block of the tensor's type."""
    gguf = package()
    try:
        elements, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(info.kind)]
    except (ValueError, KeyError) as error:
        raise UnsupportedFormat(
            f"{path}: tensor {info.name[:200]!r}: is of the unknown type {info.kind}; a newer gguf package may know it",
            fault="dtype",
            keys=(info.name,),
        ) from error
    return int(elements), int(width)


def read(path: str) -> tuple[dict[str, LazyTensor], Values, tuple[str, ...]]:
    """The tensors of a file, its header's entries, and notes.

    Raises what `check` raises.
    """
    descriptor, identity = open_regular(path)
    with open(descriptor, "rb", buffering=0) as file:
        check(file, identity[2], path)
    gguf = package()
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
        raise UnreadableFile(f"{path}: the gguf package cannot read it ({error})", fault="header") from error
    metadata = Values()
    for key, entry in reader.fields.items():
        if key.startswith("GGUF."):
            continue  # the header's own counts
        value = entry.contents()
        metadata[key] = value if isinstance(value, str) else json.dumps(value)
        if not isinstance(value, str):
            metadata.types[key] = ":".join(kind.name for kind in entry.types[:2])
    source = FileSource(path, identity)
    tensors: dict[str, LazyTensor] = {}
    quantised: dict[str, int] = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in tensor.shape[::-1])
        kind, start = tensor.tensor_type.name, int(tensor.data_offset)
        if kind in dtypes.BITS:
            tensors[tensor.name] = LazyTensor(tensor.name, kind, shape, source, start)
            continue
        block, width = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        quant = QuantSource(source, start, prod(shape) // block * width, kind, int(block), int(width))
        tensors[tensor.name] = LazyTensor(tensor.name, "F32", shape, quant, 0)
        quantised[kind] = quantised.get(kind, 0) + 1
    notes = tuple(
        f"tensors of type {kind} ({n}) are read as the float32 numbers that they stand for"
        for kind, n in quantised.items()
    )
    return tensors, metadata, notes


class QuantSource(NamedTuple):
    """Quantised numbers as float32, a block at a time; nothing is held between reads."""

    source: FileSource
    begin: int
    length: int
    kind: str
    block: int
    width: int

    @property
    def path(self) -> str:
        """The file."""
        return self.source.path

    def readinto(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer`.  Raises `CannotRepresent` for a type that the package cannot decode."""
        import numpy as np

        gguf = package()
        first = start // 4 // self.block
        last = -(-(start + len(buffer)) // (4 * self.block))
        data = bytearray((last - first) * self.width)
        self.source.readinto(self.begin + first * self.width, memoryview(data))
        try:
            values = gguf.dequantize(np.frombuffer(data, dtype=np.uint8), gguf.GGMLQuantizationType[self.kind])
        except NotImplementedError as error:
            raise CannotRepresent(f"{self.path}: the gguf package cannot decode {self.kind} ({error})") from error
        raw = memoryview(np.ascontiguousarray(values, dtype="<f4").reshape(-1).view(np.uint8).data)
        buffer[:] = raw[start - first * self.block * 4 :][: len(buffer)]


def write(
    path: str,
    architecture: str,
    entries: Mapping[str, Value],
    tensors: Mapping[str, LazyTensor],
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Write a file, one tensor at a time, in the order of the mappings.

    Raises `CannotRepresent` for types that GGUF has not, and for names that are too long for its readers.
    """
    import numpy as np

    gguf = package()
    writer = gguf.GGUFWriter(None, architecture)
    for key, (kind, value) in entries.items():
        main, _, inner = kind.partition(":")
        types = gguf.GGUFValueType
        writer.add_key_value(key, value, types[main], types[inner] if inner else None)
    for name, tensor in tensors.items():
        if tensor.dtype not in ("F32", "F16", "BF16"):
            raise CannotRepresent(
                f"{tensor.where}: readers of GGUF compute with no {tensor.dtype}; give --dtype (float32, float16, bfloat16)"
            )
        if len(name.encode()) > MAX_NAME or not 1 <= len(tensor.shape) <= MAX_DIMS:
            raise CannotRepresent(
                f"{tensor.where}: {name!r} {list(tensor.shape)} is more than GGUF's {MAX_NAME} characters and {MAX_DIMS} axes"
            )
        # The element type is told apart; uint16 is what numpy has in the place of bfloat16.
        held = np.dtype({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[tensor.dtype])
        raw = gguf.GGMLQuantizationType[tensor.dtype]
        writer.add_tensor_info(name, list(tensor.shape), held, tensor.nbytes, raw)
    writer.write_header_to_file(Path(path))
    with closing(writer):
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors.values():
            writer.write_tensor_data(np.frombuffer(tensor.read(), dtype=np.uint8))
            progress(tensor.nbytes)
