"""The safetensors container: a header that is checked before anything is allocated, and a writer's header.

Source: https://github.com/huggingface/safetensors (README, "Format"; `safetensors/src/tensor.rs`): eight bytes
little-endian header length, a JSON object, then the tensors' bytes without gaps.

Stricter than the reference reader (0.8) in this: it takes the last of two equal keys, ignores unknown fields of an
entry, takes an entry written as a list, white space before the JSON, and more than 64 dimensions or sizes above
2^53 (of empty tensors); each of these is refused here.  Nothing that it refuses is accepted.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from io import RawIOBase
from math import prod
from operator import itemgetter
from typing import Any

from adapterops.errors import CannotRepresent, InvalidHeader, UnreadableFile
from adapterops.storage import dtypes
from adapterops.storage.regular import open_regular
from adapterops.storage.tensor import ByteSource, FileSource, LazyTensor

MAX_HEADER = 16_000_000
"""Bytes that any file's header may have.  100,000 tensors take 13 million, and the longest headers of published adapters
(sd-scripts' lists of tags) a few million.  The reference implementation takes up to 100 million, which need a gigabyte of
memory once parsed: more than a stranger's file of that size may ask of us.  A file of gigabytes may have more (`_allowed`)."""
MAX_VALUES = 640_000
"""Values in the header's JSON, which take many times their text in memory.  A tensor of two axes needs eight: 80,000 of them,
and more in larger files (three projections of 256 experts in 58 layers are 89,000 tensors, and gigabytes)."""
_MOST_HEADER, _MOST_VALUES = 100_000_000, 4_000_000
"""What no file may exceed."""
MAX_DIMENSION = 2**53
_FIELDS = {"dtype", "shape", "data_offsets"}
"""What a tensor's entry says."""
_INT = {int}

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


class NullMetadata(dict[str, str]):
    """The empty strings of a header that says `"__metadata__": null`, as MLX writes it."""


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _integer(digits: str) -> int | None:
    """A size or position; None, which no check takes for one, where it is negative or beyond 64 bits."""
    return int(digits) if len(digits) <= 20 and not digits.startswith("-") else None


def _allowed(size: int) -> tuple[int, int]:
    """Bytes and values that the header of a file of `size` bytes may have: memory is bounded by what its size allows."""
    return max(MAX_HEADER, min(size // 64, _MOST_HEADER)), max(MAX_VALUES, min(size // 1024, _MOST_VALUES))


def _parsed(text: str) -> Any:
    """The JSON of a header.  Raises `Duplicate`, and what `json.loads` does.

    A look at every object and every number takes most of the time; it is spent where a key may stand twice, where a
    number may be negative (0 as well as −0 would be read) or is too long, and where the JSON is not that of a header.
    """
    plain = None
    if not _is_doubtful(text):
        with contextlib.suppress(ValueError, RecursionError):
            plain = json.loads(text)
    if plain is not None and _pairs(plain) == text.count(":"):
        return plain
    del plain  # it is held once
    return json.loads(text, object_pairs_hook=no_duplicates, parse_constant=_no_constant, parse_int=_integer)


def _is_doubtful(text: str) -> bool:
    """Whether there may be a minus zero, a colon that is spelled otherwise, or a constant that is no JSON."""
    if any(word in text for word in ("NaN", "Infinity", "\\u003a", "\\u003A")):
        return True
    at = text.find("-0")
    while at >= 0:
        before = at - 1
        while before >= 0 and text[before] in " \t\r\n":
            before -= 1
        if text[before] in "[,:":
            return True
        at = text.find("-0", at + 2)
    return False


def _pairs(header: Any) -> int:
    """The colons that a header's JSON has where no object names a key twice: one a pair, and those in its strings.

    −1 where it is not of the usual form.
    """
    if type(header) is not dict:
        return -1
    metadata = header.get("__metadata__")
    count: int = len(header) + "".join(header).count(":")
    for entry in header.values():
        if entry is metadata:
            continue
        if type(entry) is not dict or entry.keys() != _FIELDS or type(entry["dtype"]) is not str:
            return -1
        count += 3
    if metadata is None:
        return count
    if type(metadata) is not dict or set(map(type, metadata.values())) - {str}:
        return -1
    texts: list[str] = [*metadata, *metadata.values()]
    return count + len(metadata) + sum(text.count(":") for text in texts)


def insist_on_unicode(path: str, texts: list[str]) -> None:
    """Raise `InvalidHeader` for half a character (a lone surrogate): JSON can spell it, no file can hold it."""
    for text in texts:
        if not text.isascii() and _SURROGATE.search(text):
            raise InvalidHeader(f"{path}: {text[:200]!r} in the header is not valid Unicode", fault="not-unicode")


def read_header(path: str) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a file (in the order of their bytes) and its `__metadata__`.

    Raises `InvalidHeader` or `UnreadableFile`, each naming the file, what is wrong, and the tensor if there is one.
    """
    descriptor, identity = open_regular(path)
    try:
        with open(descriptor, "rb", buffering=0) as file:
            return read_header_from(file, identity[2], FileSource(path, identity))
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}") from error


def read_header_from(file: RawIOBase, size: int, source: ByteSource) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """`read_header` of what an open file of `size` bytes, at its start, holds; `source` reads its tensors."""
    path = source.path
    raw = _read_json(path, file, size)
    data_start = file.tell()
    metadata = raw.pop("__metadata__", {})
    # MLX writes `"__metadata__": null`; the reference reader takes it as empty, and so do we.
    if metadata is None:
        metadata = NullMetadata()
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidHeader(f"{path}: `__metadata__` in the header must map strings to strings", fault="metadata")
    insist_on_unicode(path, [*raw, *metadata, *metadata.values()])
    entries = [_entry(key, value) or _doubtful_entry(path, key, value) for key, value in raw.items()]
    del raw
    entries.sort(key=itemgetter(3, 4))
    tensors, position = {}, 0
    for key, dtype, shape, begin, end in entries:
        if begin != position:
            overlap = begin < position
            raise InvalidHeader(
                f"{path}: tensor {key[:200]!r}: bytes {begin} to {end} {'overlap' if overlap else 'leave a gap'}: the one "
                f"before ends at {position}",
                fault="overlap" if overlap else "gap",
                keys=(key,),
            )
        tensors[key] = LazyTensor(key, dtype, shape, source, data_start + begin)
        position = end
    held = size - data_start
    if position > held:
        lost = [key for key, _, _, _, end in entries if end > held]
        raise InvalidHeader(
            f"{path}: cut short: the header accounts for {position} bytes of tensors, but {held} follow it; "
            f"{len(lost)} of {len(entries)} tensors, {lost[0][:200]!r} among them, are not whole; download it again",
            fault="cut-short",
            keys=lost,
        )
    if position < held:
        raise InvalidHeader(
            f"{path}: the header accounts for {position} bytes of tensors, but {held} follow it", fault="trailing"
        )
    return tensors, metadata


def _read_json(path: str, file: Any, size: int) -> dict[str, Any]:
    """The header as a JSON object, read from an open file of `size` bytes."""
    head = file.read(8)
    if len(head) < 8:
        raise UnreadableFile(
            f"{path}: {size} bytes are too few for a safetensors file; download it again", fault="cut-short"
        )
    length = int.from_bytes(head, "little")
    if length > size - 8:
        _refuse_other_content(path, head, length, size)
    most, most_values = _allowed(size)
    if length > most:
        raise InvalidHeader(
            f"{path}: the header claims {length} bytes; more than {most} is not accepted", fault="header-size"
        )
    text = file.read(length)
    if len(text) != length:
        raise UnreadableFile(f"{path}: was cut short while being read", fault="cut-short")
    if not text.startswith(b"{"):
        raise InvalidHeader(f"{path}: the header is not a JSON object (it must start with `{{`)")
    if sum(map(text.count, (b",", b"[", b"{"))) > most_values:
        raise InvalidHeader(
            f"{path}: the header holds more than {most_values} values; no adapter of {size} bytes has so many tensors",
            fault="header-size",
        )
    try:
        decoded = text.decode("utf-8")
        del text  # the header is held once
        raw = _parsed(decoded)
    except Duplicate as error:
        raise InvalidHeader(
            f"{path}: the header names {error.args[0][:200]!r} twice", fault="duplicate", keys=(error.args[0],)
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InvalidHeader(f"{path}: the header is not JSON: {reason[:200]}") from error
    if not isinstance(raw, dict):
        raise InvalidHeader(f"{path}: the header is not a JSON object")
    return raw


def _refuse_other_content(path: str, head: bytes, length: int, size: int) -> None:
    """Say what a file is whose first eight bytes are no length of a header in it."""
    if head == b"version ":
        raise UnreadableFile(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`", fault="lfs-pointer")
    if is_pickle(head):
        raise InvalidHeader(
            f"{path}: not a safetensors file but one that torch.save wrote; rename it to .bin", fault="wrong-suffix"
        )
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        raise InvalidHeader(
            f"{path}: not a safetensors file, or cut short: it begins with the text {head.decode()!r}, which as the length "
            f"of a header would announce {length} bytes",
            fault="text",
        )
    if length > 100_000_000:
        raise InvalidHeader(
            f"{path}: not a safetensors file, or cut short: its first 8 bytes announce a header of {length} bytes, "
            f"but only {size - 8} follow"
        )
    raise InvalidHeader(
        f"{path}: cut short: its first 8 bytes announce a header of {length} bytes, but only {size - 8} follow; download "
        "it again",
        fault="cut-short",
    )


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins so may be one of torch.save."""
    return head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1] in range(2, 6))


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_DIMENSION


_Entry = tuple[str, str, tuple[int, ...], int, int]
"""Key, dtype, shape, begin, end."""


def _entry(key: str, value: Any) -> _Entry | None:
    """One checked header entry; None for one that is wrong, or that takes more than a few looks to tell."""
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        if (
            len(value) == 3
            and type(shape) is list
            and len(shape) <= 8
            and {*map(type, shape), type(begin), type(end)} == _INT
        ):
            positive = begin >= 0 and (not shape or min(shape) > 0)
            if positive and prod(shape) * dtypes.BITS[dtype] == (end - begin) * 8 < 2**56:
                return key, dtype, tuple(shape), begin, end
    except (TypeError, ValueError, KeyError):
        pass
    return None


def _doubtful_entry(path: str, key: str, value: Any) -> _Entry:
    """One header entry, checked for everything.  Raises `InvalidHeader` for the first thing that is wrong with it."""
    here = f"{path}: tensor {key[:200]!r}"

    def wrong(what: str, fault: str) -> InvalidHeader:
        return InvalidHeader(f"{here}: {what}", fault=fault, keys=(key,))

    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise wrong("the header entry must have exactly dtype, shape and data_offsets", "header")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.BITS:
        raise wrong(f"unknown dtype {str(dtype)[:80]!r}", "dtype")
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(_is_size, shape)):
        raise wrong(f"shape {repr(shape)[:80]} is not a list of sizes", "shape")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise wrong(f"data_offsets {repr(offsets)[:80]} is not a pair of positions", "offsets")
    begin, end = offsets
    if begin > end:
        raise wrong(f"bytes {begin} to {end}: they end before they begin", "offsets")
    elements = 1
    for size in shape:
        elements *= size
        # A later 0 does not make it right: other readers multiply in 64 bits and may wrap.
        if elements >= 2**64:
            raise wrong(f"shape {str(shape)[:80]} has more elements than 64 bits can count", "shape")
    bits = elements * dtypes.BITS[dtype]
    if bits != (end - begin) * 8:
        raise wrong(
            f"{dtype} {str(shape)[:80]} takes {bits / 8:g} bytes, but data_offsets give it {end - begin}", "shape"
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
