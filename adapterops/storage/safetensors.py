"""The safetensors container: a header that is checked before anything is allocated, and a writer's header.

Source: https://github.com/huggingface/safetensors (README, "Format"; `safetensors/src/tensor.rs`): eight bytes
little-endian header length, a JSON object, then the tensors' bytes without gaps.

Stricter than the reference reader (0.8) in this: it takes the last of two equal keys, ignores unknown fields of an
entry, takes an entry written as a list, white space before the JSON, and more than 64 dimensions or sizes above
2^53 (of empty tensors); each of these is refused here.  Nothing that it refuses is accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from adapterops.errors import CannotRepresent, InvalidHeader, UnreadableFile
from adapterops.storage import dtypes
from adapterops.storage.regular import open_regular
from adapterops.storage.tensor import FileSource, LazyTensor

MAX_HEADER = 100_000_000
"""Bytes; the reference implementation refuses longer headers too."""
MAX_VALUES = 4_000_000
"""Values in the header's JSON, which take many times their text in memory.  A tensor needs about ten."""
MAX_DIMENSION = 2**53


_SURROGATE = re.compile("[\\ud800-\\udfff]")


class Duplicate(ValueError):
    """A JSON object that names one key twice."""


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, as `object_pairs_hook`.  Raises `Duplicate` where two of its keys are equal."""
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise Duplicate(key)
            seen.add(key)
    return out


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _integer(digits: str) -> int | None:
    """A size or position; None, which no check takes for one, where it is negative or beyond 64 bits."""
    return int(digits) if len(digits) <= 20 and not digits.startswith("-") else None


def insist_on_unicode(path: str, texts: list[str]) -> None:
    """Raise `InvalidHeader` for half a character (a lone surrogate): JSON can spell it, no file can hold it."""
    for text in texts:
        if not text.isascii() and _SURROGATE.search(text):
            raise InvalidHeader(f"{path}: {text[:200]!r} in the header is not valid Unicode")


def read_header(path: str) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a file (in the order of their bytes) and its `__metadata__`.

    Raises `InvalidHeader` or `UnreadableFile`, each naming the file, what is wrong, and the tensor if there is one.
    """
    descriptor, identity = open_regular(path)
    size = identity[2]
    try:
        with open(descriptor, "rb", buffering=0) as file:
            raw = _read_json(path, file, size)
            data_start = file.tell()
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}") from error
    metadata = raw.pop("__metadata__", None)
    # MLX writes `"__metadata__": null`; the reference reader takes it as empty, and so do we.
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidHeader(f"{path}: `__metadata__` in the header must map strings to strings")
    insist_on_unicode(path, [*raw, *metadata, *metadata.values()])
    source = FileSource(path, identity)
    entries = [_entry(path, key, value, size - data_start) for key, value in raw.items()]
    entries.sort(key=lambda e: e[3:])
    tensors, position = {}, 0
    for key, dtype, shape, begin, end in entries:
        if begin != position:
            what = "overlap" if begin < position else "leave a gap"
            raise InvalidHeader(
                f"{path}: tensor {key[:200]!r}: bytes {begin} to {end} {what}: the one before ends at {position}"
            )
        tensors[key] = LazyTensor(key, dtype, shape, source, data_start + begin)
        position = end
    if position != size - data_start:
        raise InvalidHeader(
            f"{path}: the header accounts for {position} bytes of tensors, but {size - data_start} follow it"
        )
    return tensors, metadata


def _read_json(path: str, file: Any, size: int) -> dict[str, Any]:
    """The header as a JSON object, read from an open file of `size` bytes."""
    head = file.read(8)
    if len(head) < 8:
        raise UnreadableFile(f"{path}: {size} bytes are too few for a safetensors file; download it again")
    if head == b"version ":
        raise UnreadableFile(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`")
    length = int.from_bytes(head, "little")
    if length > size - 8:
        if head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1] in range(2, 6)):
            raise InvalidHeader(f"{path}: not a safetensors file but one that torch.save wrote; rename it to .bin")
        raise InvalidHeader(
            f"{path}: not a safetensors file, or cut short: its first 8 bytes announce a header of {length} bytes, "
            f"but only {size - 8} follow"
        )
    if length > MAX_HEADER:
        raise InvalidHeader(f"{path}: the header claims {length} bytes; more than {MAX_HEADER} is not accepted")
    text = file.read(length)
    if len(text) != length:
        raise UnreadableFile(f"{path}: was cut short while being read")
    if not text.startswith(b"{"):
        raise InvalidHeader(f"{path}: the header is not a JSON object (it must start with `{{`)")
    if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise InvalidHeader(f"{path}: the header holds more than {MAX_VALUES} values; no adapter has so many tensors")
    try:
        raw = json.loads(
            text.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=_no_constant, parse_int=_integer
        )
    except Duplicate as error:
        raise InvalidHeader(f"{path}: the header names {error.args[0][:200]!r} twice") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidHeader(f"{path}: the header is not JSON: {reason[:200]}") from error
    if not isinstance(raw, dict):
        raise InvalidHeader(f"{path}: the header is not a JSON object")
    return raw


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_DIMENSION


def _entry(path: str, key: str, value: Any, available: int) -> tuple[str, str, tuple[int, ...], int, int]:
    """One checked header entry: key, dtype, shape, begin, end."""
    here = f"{path}: tensor {key[:200]!r}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise InvalidHeader(f"{here}: the header entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.BITS:
        raise InvalidHeader(f"{here}: unknown dtype {str(dtype)[:80]!r}")
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(_is_size, shape)):
        raise InvalidHeader(f"{here}: shape {repr(shape)[:80]} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise InvalidHeader(f"{here}: data_offsets {repr(offsets)[:80]} is not a pair of positions")
    begin, end = offsets
    if begin > end or end > available:
        raise InvalidHeader(f"{here}: bytes {begin} to {end} lie outside the {available} bytes of data: cut short?")
    elements = 1
    for size in shape:
        elements *= size
        # A later 0 does not make it right: other readers multiply in 64 bits and may wrap.
        if elements >= 2**64:
            raise InvalidHeader(f"{here}: shape {str(shape)[:80]} has more elements than 64 bits can count")
    bits = elements * dtypes.BITS[dtype]
    if bits != (end - begin) * 8:
        raise InvalidHeader(
            f"{here}: {dtype} {str(shape)[:80]} takes {bits / 8:g} bytes, but data_offsets give it {end - begin}"
        )
    return key, dtype, tuple(shape), begin, end


def build_header(tensors: Iterable[tuple[str, LazyTensor]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data: length, JSON, and padding of spaces to a multiple of eight.

    Raises `CannotRepresent` for names and strings that the header cannot hold.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for key, tensor in tensors:
        if key == "__metadata__":
            raise CannotRepresent(f"{tensor.where}: safetensors reserves this name")
        end = position + tensor.nbytes
        header[key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    try:
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[max(0, error.start - 40) : error.end]
        raise CannotRepresent(f"{half!r}: a name or a metadata string is not valid Unicode") from error
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def in_file_order(tensors: Mapping[str, LazyTensor]) -> list[tuple[str, LazyTensor]]:
    """The order in which a file's tensors are written: widest elements first, then as in their source.

    Wide before narrow keeps every tensor aligned to its element size, as the reference writer does; the
    source's own order within a width lets the copy read forward.  Sources stand in the order in which they first
    appear, never by name: how the user spelled a path must not change the bytes.
    """
    sources: dict[str, int] = {}
    for tensor in tensors.values():
        sources.setdefault(tensor.source.path, len(sources))
    order = sorted(
        enumerate(tensors.items()),
        key=lambda e: (-dtypes.BITS[e[1][1].dtype], sources[e[1][1].source.path], e[1][1].start, e[0]),
    )
    return [item for _, item in order]
