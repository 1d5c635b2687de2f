"""Numbers in blocks, each rounded to one of 16 values: what `bitsandbytes.functional.quantize_4bit` gives, bit for bit.

On a CPU bitsandbytes (`backends/default/ops.py`) looks each number up by `torch.bucketize`, which takes 26 ns; counting the
bounds that a number does not reach takes less than 2.  Everything else is as there, and what is packed here is unpacked
by bitsandbytes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]

_LEAST = 1e-38
"""A block's maximum is taken for no less where it divides."""


class _Levels(NamedTuple):
    bounds: Array
    """Midpoints of neighbouring values, ascending; a number on one belongs to the lower value."""
    codes: Array
    """The 4 bits of each value, by size."""


@cache
def _levels(kind: str, functional: Any) -> _Levels:
    values = functional.get_4bit_type(kind, device="cpu")
    codes = values.argsort()
    ascending = values[codes]
    return _Levels(((ascending[:-1] + ascending[1:]) / 2).numpy(), codes.numpy().astype("u1"))


def quantise(functional: Any, flat: torch.Tensor, block_size: int, kind: str) -> tuple[torch.Tensor, Any]:
    """`flat` (n,), float32, as packed 4-bit numbers (n / 2, 1), and bitsandbytes' `QuantState` of them.

    `functional` is `bitsandbytes.functional`, which does what is not on a CPU or not of whole blocks.
    """
    import numpy as np
    import torch

    if flat.device.type != "cpu" or len(flat) % block_size:
        packed, state = functional.quantize_4bit(flat, blocksize=block_size, quant_type=kind)
        return packed, state
    bounds, codes = _levels(kind, functional)
    blocks = flat.view(-1, block_size)
    maxima = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / maxima.clamp(min=_LEAST))[:, None]).clamp_(-1, 1).view(-1).numpy()
    # Counted down, so that what is no number comes last, as it does there.
    within, level = np.empty(len(scaled), dtype=bool), np.full(len(scaled), len(bounds), dtype="u1")
    for bound in bounds:
        np.less_equal(scaled, bound, out=within)
        np.subtract(level, within.view("u1"), out=level)
    if kind != "nf4":  # whose codes ascend
        level = codes[level]
    packed = torch.from_numpy(level[::2] << 4 | level[1::2])[:, None]
    return packed, functional.QuantState(
        absmax=maxima, shape=flat.shape, dtype=flat.dtype, blocksize=block_size, quant_type=kind,
        code=functional.get_4bit_type(kind, device="cpu"),
    )  # fmt: skip
