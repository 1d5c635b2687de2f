"""LoRA whose stored factors stand for wider ones: BD-LoRA's block diagonals, QA-LoRA's pooled inputs.

ΔW = s · B·A with s = alpha / r, or alpha / √r (rsLoRA), on linear modules.  What is stored, r being the rank:

- BD-LoRA (https://arxiv.org/abs/2510.23346; peft `tuners/lora/variants.py`, `BlockDiagonalLinear`), n = `nblocks`, one
  factor a block diagonal whose blocks stand one below another:
  A (r, in / n) beside B (out, r): rows of block j of A act on the inputs j·in/n … (j+1)·in/n;
  B (out, r / n) beside A (r, in): rows of block j of B are made of the j-th r/n rows of A.
  n follows from the shapes where B has blocks; where A has, from the config or the module's inputs.
- QA-LoRA (https://arxiv.org/abs/2309.14717; `QALoraLinearVariant`), g = `qalora_group_size`: A (r, in / g), B (out, r).
  It acts on the means of g inputs each, which peft multiplies by their number in / g, so the wide factor is
  A ⊗ (1 … 1)₁ₓ_g · in / g².  peft has it on GPTQ layers alone and cannot merge it; a plain layer takes no notice of
  `use_qalora`, and its A has all inputs.

peft allows neither beside DoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import need, setting
from adapterops.methods.lora import Lora
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class _Widened(Lora):
    """LoRA whose wide factors `unscaled` makes of the stored ones."""

    pairs = ()

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        b, a = self.unscaled(update)
        return torch.from_numpy(b), torch.from_numpy(a)

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        if not update.tensors.keys() >= {"A", "B"}:
            return True  # half an update: `check` says so better than a shape could
        out, stored = update.tensors["B"].shape[0], update.tensors["A"].shape[-1]
        if len(shape) != 2 or out != shape[0]:
            return False
        try:
            return stored * self._times(update) == shape[1]
        except CannotRepresent:
            return shape[1] % stored == 0

    def weight_shape(self, update: Update) -> tuple[int, ...]:
        return update.tensors["B"].shape[0], update.tensors["A"].shape[1] * self._times(update)

    def _times(self, update: Update) -> int:
        """How many inputs one column of the stored A stands for."""
        raise NotImplementedError

    def _flat(self, update: Update) -> tuple[LazyTensor, LazyTensor]:
        """A and B.  Raises `BrokenAdapter` unless both are matrices."""
        need(update, "A", "B")
        for role in "AB":
            factor = update.tensors[role]
            if len(factor.shape) != 2 or 0 in factor.shape:
                raise BrokenAdapter(
                    f"{factor.where}: shape {list(factor.shape)} is no matrix; {self.title} acts on linear modules alone"
                )
        return update.tensors["A"], update.tensors["B"]

    def _times_of_option(self, update: Update, name: str) -> int:
        """The number that the config states, else the one that the module's inputs leave."""
        stored, shape = update.tensors["A"].shape[1], update.options.get("shape")
        if update.options.get(name) is None and shape is not None and prod(shape[1:]) % stored == 0:
            return int(prod(shape[1:]) // stored)
        return int(setting(update, name))


class BlockDiagonal(_Widened):
    """BD-LoRA."""

    name = "bdlora"
    title = "BD-LoRA (block-diagonal factors)"
    formula = "ΔW = s·B·A, one of the two a block diagonal stored as its blocks"
    form = "the block diagonal written out, rank r"
    source = "https://arxiv.org/abs/2510.23346"
    needs_shape = True
    compared = frozenset({"shape", "nblocks", "use_bdlora"})

    def check(self, update: Update) -> None:
        a, b = self._flat(update)
        rank, width = a.shape[0], b.shape[1]
        if rank % width:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} has {width} columns, and the rank {rank} of {a.key!r} {list(a.shape)} is no "
                "multiple of it; they are not halves of one update",
                fault="ranks",
            )
        stated = update.options.get("nblocks")
        if stated is not None and rank != width and stated != rank // width:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} beside rank {rank} has {rank // width} blocks, and nblocks says {stated}"
            )
        if stated is not None and (stated < 1 or rank % stated or (rank != width and b.shape[0] % stated)):
            raise BrokenAdapter(
                f"{a.where}: shape {list(a.shape)} beside {b.key!r} {list(b.shape)}; {stated} blocks do not divide them"
            )

    def rank(self, update: Update) -> int:
        return update.tensors["A"].shape[0]

    def block_count(self, update: Update) -> int:
        """The number of blocks.  Raises `CannotRepresent` where A has them and nothing says how many."""
        rank, width = update.tensors["A"].shape[0], update.tensors["B"].shape[1]
        return rank // width if rank != width else self._times_of_option(update, "nblocks")

    def _times(self, update: Update) -> int:
        return 1 if update.tensors["A"].shape[0] != update.tensors["B"].shape[1] else self.block_count(update)

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        if update.tensors["A"].shape[0] != update.tensors["B"].shape[1]:
            raise CannotRepresent(
                f"{update.name}: the blocks of its second factor (tensor {update.tensors['B'].key!r}) do not end with the "
                "parts of a fused projection; adapterops to-lora makes plain LoRA of it, which can be split"
            )
        return super().take_rows(update, pieces)

    def unscaled(self, update: Update) -> tuple[Array, Array]:
        import numpy as np

        a, b = (update.tensors[role].numpy().astype(np.float64) for role in "AB")
        count = self.block_count(update)
        if len(a) != b.shape[1]:
            return block_diagonal(b, count), a
        return b, block_diagonal(a, count)


def block_diagonal(stacked: Array, count: int) -> Array:
    """The block-diagonal matrix whose `count` blocks stand one below another in `stacked`."""
    import numpy as np

    rows, width = len(stacked) // count, stacked.shape[1]
    out = np.zeros((len(stacked), width * count), dtype=stacked.dtype)
    for block in range(count):
        at = slice(block * rows, (block + 1) * rows)
        out[at, block * width : (block + 1) * width] = stacked[at]
    return out


class Pooled(_Widened):
    """QA-LoRA."""

    name = "qalora"
    title = "QA-LoRA (pooled inputs)"
    formula = "ΔW = s·B·A·P, P the means over groups of inputs"
    form = "A with each column repeated over its group, rank r"
    source = "https://arxiv.org/abs/2309.14717"
    needs_shape = True
    compared = frozenset({"shape", "qalora_group_size"})

    def check(self, update: Update) -> None:
        a, b = self._flat(update)
        if a.shape[0] != b.shape[1]:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} has rank {b.shape[1]}, but {a.key!r} {list(a.shape)} has rank "
                f"{a.shape[0]}; they are not halves of one update",
                fault="ranks",
            )
        size, shape = update.options.get("qalora_group_size"), update.options.get("shape")
        if size is not None and (size < 1 or (shape is not None and a.shape[1] * size != prod(shape[1:]))):
            inputs = f", and the module has {prod(shape[1:])}" if shape is not None else ""
            raise BrokenAdapter(
                f"{a.where}: shape {list(a.shape)} with groups of {size} is for {a.shape[1] * size} inputs{inputs} "
                "(qalora_group_size)"
            )

    def group_size(self, update: Update) -> int:
        """How many inputs are pooled into one.  Raises `CannotRepresent` where nothing says it."""
        return self._times_of_option(update, "qalora_group_size")

    def _times(self, update: Update) -> int:
        return self.group_size(update)

    def unscaled(self, update: Update) -> tuple[Array, Array]:
        import numpy as np

        a, b = (update.tensors[role].numpy().astype(np.float64) for role in "AB")
        size = self.group_size(update)
        return b, np.repeat(a, size, axis=1) * (a.shape[1] / size)
