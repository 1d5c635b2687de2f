"""Q(W): a weight as it is after quantisation by bitsandbytes, dequantised again.

- nf4, fp4: blocks of `block_size` numbers of the flattened weight, each divided by its absolute maximum and rounded to one of
  16 values (NF4: https://arxiv.org/abs/2305.14314); with `double`, the maxima are quantised too, to 8 bits;
- int8: each row of the weight, rounded to float16, divided by its absolute maximum / 127 and rounded
  (LLM.int8(): https://arxiv.org/abs/2208.07339).

Bit for bit what `bitsandbytes.nn.Params4bit` and `Int8Params` hold (`bitsandbytes/nn/modules.py`), whatever the size of the
parts in which it is computed here.  Those are rows of numbers and not matrices: where blocks do not end with a matrix's rows,
bitsandbytes 0.50 dequantises some numbers with another block's maximum on CPUs with AVX-512 (on CUDA it does not).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from adapterops.errors import UsageError
from adapterops.linalg import four_bit

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
KINDS = ("nf4", "fp4", "int8")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DEFAULT_BLOCK = 64
_PART = 1 << 19
"""Numbers that are quantised at a time: their copies in several types stay in a processor's cache.  A multiple of every block
size."""
_OF_MAXIMA = 256
"""Block size of the quantised maxima; bitsandbytes has no other."""


@dataclass(frozen=True, slots=True)
class Quantiser:
    """A way to quantise weights.  `block_size` is None for int8, which goes by rows."""

    kind: str
    block_size: int | None = None
    double: bool = False

    def __str__(self) -> str:
        if self.block_size is None:
            return self.kind
        return f"{self.kind}, blocks of {self.block_size}{', double' if self.double else ''}"

    def apply_(self, weight: torch.Tensor) -> torch.Tensor:
        """Q(`weight`) in its place; a contiguous float32 matrix (out_features, in_features), on the CPU or a CUDA device.

        int8 gives NaN or infinities where a number is beyond float16.
        """
        flat = weight.view(-1)
        self._parts(weight, lambda at, values: flat[at : at + len(values)].copy_(values))
        return weight

    def left_over(self, source: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> float:
        """`weight` − Q(`source`) in `out`, which may be one of them, and its squared norm; all as `apply_` takes them."""
        import torch

        flat, result = weight.view(-1), out.view(-1)

        def put(at: int, values: torch.Tensor) -> torch.Tensor:
            where = slice(at, at + len(values))
            part = torch.sub(flat[where], values, out=result[where])
            return torch.dot(part, part)

        return float(torch.stack(self._parts(source, put)).double().sum())

    def _parts(self, weight: torch.Tensor, put: Callable[[int, torch.Tensor], T]) -> list[T]:
        """What `put` makes of each part of Q(`weight`), float32, and where it begins in the flattened weight."""
        return _by_rows(weight, put) if self.kind == "int8" else self._by_blocks(weight, put)

    def _by_blocks(self, weight: torch.Tensor, put: Callable[[int, torch.Tensor], T]) -> list[T]:
        import torch

        functional = bitsandbytes().functional
        flat = weight.view(-1)
        starts = range(0, len(flat), _PART)
        quantise = partial(four_bit.quantise, functional, block_size=self.block_size or _DEFAULT_BLOCK, kind=self.kind)

        def put_back(start: int, values: torch.Tensor, state: Any) -> T:
            return put(start, functional.dequantize_4bit(values, state).reshape(-1))

        if not self.double:
            return _each(lambda start: put_back(start, *quantise(flat[start : start + _PART])), starts)
        quantised = _each(lambda start: quantise(flat[start : start + _PART]), starts)
        maxima = torch.cat([state.absmax for _, state in quantised])
        offset = maxima.mean()
        maxima = functional.dequantize_blockwise(*functional.quantize_blockwise(maxima - offset, blocksize=_OF_MAXIMA))
        maxima += offset
        counts = [len(state.absmax) for _, state in quantised]
        for (_, state), own in zip(quantised, torch.split(maxima, counts), strict=True):
            state.absmax = own.contiguous()
        return _each(lambda start: put_back(start, *quantised[start // _PART]), starts)


def _each(work: Callable[[int], T], parts: Sequence[int]) -> list[T]:
    """What `work` makes of each part, in order: on all cores, since not every step of it uses them by itself."""
    import torch

    with ThreadPoolExecutor(max(1, min(len(parts), torch.get_num_threads()))) as pool:
        return list(pool.map(work, parts))


def _by_rows(weight: torch.Tensor, put: Callable[[int, torch.Tensor], T]) -> list[T]:
    import torch

    functional = bitsandbytes().functional
    rows, columns = max(1, _PART // weight.shape[1]), weight.shape[1]
    made = []
    for start in range(0, weight.shape[0], rows):
        values, maxima, _ = functional.int8_vectorwise_quant(weight[start : start + rows].to(torch.float16))
        made.append(put(start * columns, functional.int8_vectorwise_dequant(values, maxima).reshape(-1)))
    return made


def quantiser(kind: str = "nf4", block_size: int | None = None, double: bool = False) -> Quantiser:
    """The quantiser of these options.  Raises `UsageError` for ones that bitsandbytes has not, or where it is missing."""
    if kind not in KINDS:
        raise UsageError(f"--quant {kind}: is none of {', '.join(KINDS)}")
    if kind == "int8":
        if block_size is not None or double:
            name = "--block-size" if block_size is not None else "--double-quant"
            raise UsageError(f"{name}: is for nf4 and fp4; int8 has one scale a row")
    elif block_size is not None and block_size not in BLOCK_SIZES:
        raise UsageError(
            f"--block-size {block_size}: is none of {', '.join(map(str, BLOCK_SIZES))}, which bitsandbytes has"
        )
    bitsandbytes()
    return Quantiser(kind, None if kind == "int8" else block_size or _DEFAULT_BLOCK, double)


def bitsandbytes() -> Any:
    """The library.  Raises `UsageError` where it is not there or does not work."""
    log = logging.getLogger("bitsandbytes")
    before = log.level
    log.setLevel(logging.ERROR)  # It warns of kernels for inference that it could do with, which are not for this.
    try:
        return importlib.import_module("bitsandbytes")
    except (ImportError, OSError, RuntimeError) as error:
        raise UsageError(
            f"loftq quantises with bitsandbytes, which cannot be imported ({error}): pip install 'adapterops[quant]'"
        ) from error
    finally:
        log.setLevel(before)
