"""One pass over the bytes of tensors: what rules about values need."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan

from adapterops.errors import UnreadableFile
from adapterops.storage import LazyTensor
from adapterops.storage.tensor import FileSource
from adapterops.threads import each
from adapterops.validation.scan_pass import Maxima, Pass

_CHUNK = 1 << 20
"""Bytes read at a time; they stay in the processor's cache while they are searched."""
_MUCH = 1 << 24
"""Bytes from which on more threads are worth their start."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What the values of one tensor are like.

    `largest` is the largest |value|: None where the type's numbers cannot be read (those narrower than a byte), infinite or
    NaN where the tensor holds such.  `rows` and `columns` are the same for each index of the first and of the second axis,
    where that axis can be the rank of a low-rank factor; None elsewhere.  `heads` are the first bytes of each of `rows`,
    one after the other, `head` those of the whole.
    """

    zero: bool
    """Whether every number is zero (also where there are none)."""
    largest: float | None
    nans: int = 0
    infinities: int = 0
    first: int = -1
    """The position of the first NaN or infinity, counted row by row."""
    rows: tuple[float, ...] | None = None
    columns: tuple[float, ...] | None = None
    heads: bytes = b""
    head: bytes = b""

    @property
    def finite(self) -> bool:
        """Whether it holds neither NaN nor infinity."""
        return self.first < 0

    @property
    def like_rows(self) -> list[list[int]]:
        """Groups of rows that begin alike and have the same largest |value|, which is not zero: perhaps equal ones."""
        if not self.rows:
            return []
        count = len(self.rows)
        heads = struct.unpack(f"{len(self.heads) // count}s" * count, self.heads)
        if len(set(heads)) == len(heads):
            return []
        groups: dict[tuple[float, bytes], list[int]] = {}
        for at, key in enumerate(zip(self.rows, heads, strict=True)):
            groups.setdefault(key, []).append(at)
        return [group for (value, _), group in groups.items() if value and len(group) > 1]

    @property
    def dead_rows(self) -> tuple[int, ...]:
        """The indices of the first axis under which there are only zeros."""
        return _zeros(self.rows)

    @property
    def dead_columns(self) -> tuple[int, ...]:
        """The indices of the second axis under which there are only zeros."""
        return _zeros(self.columns)


def _zeros(values: tuple[float, ...] | None) -> tuple[int, ...]:
    if values is None or 0.0 not in values:
        return ()
    return tuple(at for at, value in enumerate(values) if value == 0)


def scan(tensors: Mapping[str, LazyTensor], threads: int = 1) -> dict[str, Statistics]:
    """The statistics of every tensor, by key; the same whatever the number of threads.

    Each byte is read once, nearly in the order of the file, and a MiB a thread is held; tensors with NaN or infinities are
    read again to count them.  Keys of one tensor share its statistics.

    Raises `UnreadableFile` where the bytes are not there.
    """
    passes, which = _passes(tensors)
    found = _scanned(passes, _CHUNK, threads)
    return {key: found[at] for key, at in which.items()}


def statistics(tensor: LazyTensor, size: int = _CHUNK) -> Statistics:
    """The statistics of one tensor, read `size` bytes at a time.  Raises `UnreadableFile` where its bytes are not there."""
    return _scanned(_passes({"": tensor})[0], size, 1)[0]


def _passes(tensors: Mapping[str, LazyTensor]) -> tuple[list[Pass], dict[str, int]]:
    """The passes to be made, in the order of the bytes, and which of them is that of each key."""
    kinds: dict[str, Maxima] = {}
    passes: list[Pass] = []
    which = dict.fromkeys(tensors, 0)
    here: dict[tuple[int, str, tuple[int, ...]], int] = {}
    start = -1
    for key in sorted(tensors, key=lambda key: (tensors[key].source.path, tensors[key].start)):
        tensor = tensors[key]
        if tensor.start != start:
            start, here = tensor.start, {}
        same = here.setdefault((id(tensor.source), tensor.dtype, tensor.shape), len(passes))
        if same == len(passes):
            if tensor.dtype not in kinds:
                kinds[tensor.dtype] = Maxima(tensor.dtype)
            passes.append(Pass(tensor, kinds[tensor.dtype]))
        which[key] = same
    for maxima in kinds.values():
        maxima.start()
    return passes, which


def _scanned(passes: Sequence[Pass], size: int, threads: int) -> list[Statistics]:
    """The statistics of each, in order."""
    _run(passes, size, threads)
    alike: dict[Maxima, list[Pass]] = {}
    for one in passes:
        alike.setdefault(one.maxima, []).append(one)
    told = {maxima: _told(maxima, own, size) for maxima, own in alike.items()}
    return [next(told[one.maxima]) for one in passes]


def _run(passes: Sequence[Pass], size: int, threads: int) -> None:
    """Read the tensors: those that lie beside each other together, a large one in pieces."""
    groups = _groups(passes, size)
    room = min(size, max((sum(one.nbytes for one in group) for group in groups), default=0))

    def reader() -> Callable[[list[Pass]], None]:
        view = memoryview(bytearray(room))
        return lambda group: _read(group, view)

    # Neither reading nor numpy's searches hold the interpreter.
    much = sum(one.nbytes for one in passes) >= _MUCH and all(
        isinstance(one.tensor.source, FileSource) for one in passes
    )
    each(groups, reader, threads if much else 1)


def _groups(passes: Sequence[Pass], size: int) -> list[list[Pass]]:
    """Tensors that are read at once, in order: neighbours of together `size` bytes at most, or a single one."""
    groups: list[list[Pass]] = []
    source, first, end = None, 0, 0
    for one in passes:
        start = one.start
        beside = one.tensor.source is source and start == end and not (start - first) % one.width
        if beside and start + one.nbytes - first <= size:
            groups[-1].append(one)
        else:
            groups.append([one])
            source, first = one.tensor.source, start
        end = start + one.nbytes
    return groups


def _read(group: Sequence[Pass], view: memoryview) -> None:
    """Read tensors through a buffer that holds all of them, or parts of the only one."""
    first, last = group[0], group[-1]
    length = last.start + last.nbytes - first.start
    if length > len(view):
        for at, piece in _pieces(first, view):
            first.take(at, piece)
        return
    first.tensor.source.readinto(first.start, view[:length])
    for one in group:
        if one.nbytes:
            at = one.start - first.start
            one.take(0, view[at : at + one.nbytes])


def _pieces(one: Pass, view: memoryview) -> Iterator[tuple[int, memoryview]]:
    for at, length in one.pieces(len(view)):
        piece = view[:length]
        one.tensor.source.readinto(one.start + at, piece)
        yield at, piece


def _told(maxima: Maxima, passes: Sequence[Pass], size: int) -> Iterator[Statistics]:
    """What the passes over the tensors of one dtype, in the order of their places, tell."""
    magnitudes = maxima.magnitudes()
    tops = maxima.np.maximum.reduceat(magnitudes, [one.place for one in passes])
    axes = maxima.numbers(magnitudes)
    for one, top, largest in zip(passes, tops.tolist(), maxima.numbers(tops), strict=True):
        if not maxima.kind.readable:
            yield Statistics(not top, None if top else 0.0, head=one.head)
            continue
        if maxima.kind.floating and top >= maxima.kind.infinite:
            for at, piece in _pieces(one, memoryview(bytearray(min(size, one.nbytes)))):
                one.count(at, piece)
            if one.first < 0:
                raise UnreadableFile(f"{one.tensor.source.path}: changed while being read; run the command again")
        largest = nan if one.nans else inf if one.infinities else largest
        middle = one.place + one.by_row
        yield Statistics(
            largest == 0,
            largest,
            one.nans,
            one.infinities,
            one.first,
            tuple(axes[one.place : middle]) if one.by_row else None,
            tuple(axes[middle : middle + one.by_column]) if one.by_column else None,
            one.heads,
            one.head,
        )
