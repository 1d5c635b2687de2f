"""The largest entries of a tensor, exactly so many of them, without sorting it.

A sample tells between which two magnitudes the threshold lies; one pass counts what is above and collects what is
between, and the threshold is selected among those few.  Magnitudes are compared as the bits of their floats, which are
in the same order.  Where the sample misleads, and on devices, the bits are bisected by counting instead.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Bits = numpy.typing.NDArray[Any]

_MAGNITUDE = 0x7FFFFFFF
"""The bits of a float32 without its sign; also more than any magnitude has."""
_SAMPLE, _SPARSE = 1 << 18, 32
"""About how many entries a sample has at most, and every how manieth it takes at least: sorting it is to cost less than the
pass."""
_SMALL = 1 << 16
"""Up to so many entries are selected among without a sample."""
_CHUNK = 1 << 17
"""Entries looked at together: their copies stay in a core's cache."""
_DEVICE_CHUNK = 1 << 24
_DEVIATIONS = 5
"""How far from its sampled rank the threshold is looked for, in standard deviations."""


class Cut(NamedTuple):
    """Which entries of a tensor are kept: |x| above `threshold`; and |x| equal to it, up to flat index `last`."""

    threshold: float
    last: int


def find_cut(values: torch.Tensor, keep: int) -> Cut:
    """The cut that keeps exactly the `keep` entries of largest magnitude, the first ones (row-major) where they tie.

    `values`: float32, contiguous, finite, any shape and device.  Needs no more memory than a chunk and the candidates,
    at most a quarter of the tensor and usually less than a hundredth.
    """
    size = values.numel()
    if keep <= 0:
        return Cut(math.inf, -1)
    if keep >= size:
        return Cut(0.0, sys.maxsize)
    flat = values.detach().reshape(-1)
    place = _sampled(flat.numpy(), keep) if flat.device.type == "cpu" else None
    bits, above, equal = place or _bisected(flat, keep)
    if bits == 0 or above + equal == keep:
        return Cut(_float(bits), sys.maxsize)
    return Cut(_float(bits), _position(flat, bits, keep - above))


def trim_(block: torch.Tensor, cut: Cut, start: int) -> torch.Tensor:
    """`block` with what the cut does not keep set to zero, in place.

    `block` is a contiguous part of the tensor that the cut was found for; its first entry has the flat index `start`
    there.
    """
    if cut.threshold == 0:  # only zeros could go
        return block
    flat = block.view(-1)
    tied = min(max(cut.last + 1 - start, 0), flat.numel())
    below = _float(_bits(cut.threshold) - 1)
    for part, limit in ((flat[:tied], below), (flat[tied:], cut.threshold)):
        if part.numel():
            _shrink_(part, limit)
    return block


def _shrink_(part: torch.Tensor, limit: float) -> None:
    """Zero where |x| ≤ `limit`."""
    import torch

    torch.ops.aten.hardshrink.out(part, limit, out=part)


def _sampled(values: Bits, keep: int) -> tuple[int, int, int] | None:
    """The threshold's bits, how many magnitudes are above and how many equal; None where the sample misleads."""
    import numpy as np

    bits = values.view(np.int32)
    size = bits.size
    low, high = _bracket(bits, keep)
    width = high - low
    limit = max(size // 4, _CHUNK)
    offsets, chosen = np.empty(min(_CHUNK, size), np.int32), np.empty(min(_CHUNK, size), bool)
    above = between = 0
    candidates: list[Bits] = []
    for start in range(0, size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        offset, mask = offsets[: chunk.size], chosen[: chunk.size]
        np.bitwise_and(chunk, _MAGNITUDE, out=offset)
        np.subtract(offset, low, out=offset)
        np.greater(offset, width, out=mask)
        above += int(np.count_nonzero(mask))
        np.less_equal(offset.view(np.uint32), np.uint32(width), out=mask)  # what is below wraps to a huge number
        if width:
            candidates.append(offset[mask])
            between += candidates[-1].size
        else:
            between += int(np.count_nonzero(mask))
        if above >= keep or (width and between > limit):
            return None
    rest = keep - above
    if rest > between:
        return None
    if not width:
        return low, above, between
    found = np.concatenate(candidates)
    edge = int(np.partition(found, between - rest)[between - rest])
    return low + edge, above + int(np.count_nonzero(found > edge)), int(np.count_nonzero(found == edge))


def _bracket(bits: Bits, keep: int) -> tuple[int, int]:
    """Two magnitudes (bits) between which the threshold very probably lies."""
    import numpy as np

    size = bits.size
    if size <= _SMALL:
        return 0, _MAGNITUDE
    sample = np.sort(bits[:: max(size // _SAMPLE, _SPARSE) | 1] & _MAGNITUDE)
    share = 1 - keep / size
    slack = _DEVIATIONS * math.sqrt(share * (1 - share) * sample.size) + 2
    low, high = math.floor(share * sample.size - slack), math.ceil(share * sample.size + slack)
    return int(sample[low]) if low >= 0 else 0, int(sample[high]) if high < sample.size else _MAGNITUDE


def _bisected(flat: torch.Tensor, keep: int) -> tuple[int, int, int]:
    """What `_sampled` gives, by 31 counting passes: exact whatever the values are, and on any device."""
    low, high = 0, _MAGNITUDE  # at least `keep` magnitudes are ≥ low, fewer are ≥ high
    reached, above = flat.numel(), 0
    while high - low > 1:
        middle = (low + high) // 2
        count = sum(int((chunk >= middle).sum()) for _, chunk in _magnitudes(flat))
        if count >= keep:
            low, reached = middle, count
        else:
            high, above = middle, count
    return low, above, reached - above


def _position(flat: torch.Tensor, bits: int, count: int) -> int:
    """The flat index of the `count`-th entry of that magnitude."""
    for start, chunk in _magnitudes(flat):
        tied = chunk == bits
        here = int(tied.sum())
        if count <= here:
            return start + int(tied.nonzero()[count - 1])
        count -= here
    raise AssertionError("fewer entries of the threshold's magnitude than were counted")


def _magnitudes(flat: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(index of the first entry, the bits of the magnitudes), chunk by chunk."""
    import torch

    size = _CHUNK if flat.device.type == "cpu" else _DEVICE_CHUNK
    for start in range(0, flat.numel(), size):
        yield start, flat[start : start + size].view(torch.int32) & _MAGNITUDE


def _float(bits: int) -> float:
    import numpy as np

    return float(np.int32(bits).view(np.float32))


def _bits(value: float) -> int:
    import numpy as np

    return int(np.float32(value).view(np.int32))
