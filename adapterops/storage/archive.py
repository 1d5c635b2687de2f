"""The list of entries at the end of a zip, read within bounds.

Python's `zipfile` reads the list whole and makes an object of each entry, whatever the list claims; its size stands in the
last record of the file, which is looked at first (PKWARE's APPNOTE.TXT, 4.3.14 to 4.3.16).
"""

from __future__ import annotations

import struct
import zipfile
from typing import IO, Final, NamedTuple

from adapterops.errors import UnreadableFile

MAX_LIST: Final = 8 << 20
"""Bytes of the list.  An entry takes about a hundred, and an adapter has a few thousand."""
_END: Final = 22
_LOCATOR: Final = 20
_END64: Final = 56
_LONGEST_COMMENT: Final = 1 << 16
_AGAIN = "download it again"


class Entries(NamedTuple):
    """The entries, and where their list starts."""

    entries: list[zipfile.ZipInfo]
    end: int


def entries_of(path: str, file: IO[bytes], size: int, kind: str) -> Entries:
    """The entries of a zip of `size` bytes, which is to be of a `kind`.

    Raises `UnreadableFile` where it is damaged, cut short, or claims a list that no adapter has.
    """
    try:
        if _list_size(file, size) > MAX_LIST:
            raise UnreadableFile(
                f"{path}: the zip's list of entries takes more than {MAX_LIST} bytes; no adapter has so many",
                fault="bomb",
            )
        with zipfile.ZipFile(file) as archive:
            return Entries(archive.infolist(), int(archive.start_dir))
    # All but the first two are what zipfile makes of a damaged list.
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError, struct.error) as error:
        raise UnreadableFile(
            f"{path}: not {kind}, or cut short or damaged ({error}); {_AGAIN}", fault="cut-short"
        ) from error


def begin_of(path: str, file: IO[bytes], entry: zipfile.ZipInfo, end: int) -> int:
    """Where the bytes of an entry start.  Raises `UnreadableFile` where it is not where the list says.

    APPNOTE.TXT, 4.3.7: 30 bytes, then the name and an extra field, whose lengths are the last two of them.
    """
    here = f"{path}: entry {entry.filename[:200]!r}"
    if not 0 <= entry.header_offset <= end - 30:
        raise UnreadableFile(f"{here} lies outside the file: cut short? {_AGAIN}", fault="cut-short")
    file.seek(entry.header_offset)
    head = file.read(30)
    if head[:4] != b"PK\x03\x04":
        raise UnreadableFile(f"{here} is not where the list of entries says: damaged; {_AGAIN}", fault="cut-short")
    name, extra = struct.unpack("<HH", head[26:])
    begin = int(entry.header_offset + 30 + name + extra)
    if begin + entry.compress_size > end:
        raise UnreadableFile(f"{here} is not where the list of entries says: damaged; {_AGAIN}", fault="cut-short")
    return begin


def _list_size(file: IO[bytes], size: int) -> int:
    """The bytes that the list of entries claims, by each record that `zipfile` may believe."""
    start = max(0, size - _END - _LONGEST_COMMENT)
    file.seek(start)
    tail = file.read(size - start)
    found = {len(tail) - _END, tail.rfind(b"PK\x05\x06")}
    sizes = [0]
    for at in found:
        if at < 0 or tail[at : at + 4] != b"PK\x05\x06" or len(tail) - at < _END:
            continue
        sizes.append(struct.unpack("<I", tail[at + 12 : at + 16])[0] % 0xFFFFFFFF)
        locator = start + at - _LOCATOR
        if locator >= 0:
            file.seek(locator)
            if file.read(4) == b"PK\x06\x07":
                file.seek(max(0, locator - _END64))
                record = file.read(_END64)
                sizes.append(struct.unpack("<Q", record[40:48])[0] if len(record) == _END64 else 0)
    return int(max(sizes))
