"""OFT as OneTrainer has it: peft's rotation of the inputs, and another one for convolutions.

W is (out, n), n = in · kernel; S (b, b) is skew-symmetric, Q = I + 2S + 2S² + 2S³ + S⁴; the bias stays.

- a linear module: W' = W · diag(Q)ᵀ, which is peft's OFT with the first five terms of Cayley's series
- a convolution: W' = W · diag(Q), on its flattened kernels: peft's with every entry negated
- `R` (k, b·(b−1)/2), k·b = n, or k = 1 for all blocks alike: the entries above the diagonal of S, row by row
- `options["scaled"]` ("Scaled OFT", a marker `oft_R.scaled_oft` in the file): they are divided by 2·√(b−1)

The marker's presence is what counts.  The first draft of Scaled OFT, which no version of OneTrainer has, divided by the root of
the number of entries, and a node for ComfyUI made then still does.  Until May 2026 OneTrainer could bound the blocks while it
trained (COFT); what it saved are the bounded ones, but for its last step.

Sources: https://arxiv.org/abs/2506.19847; Nerogar/OneTrainer `modules/module/LoRAModule.py` (`OFTModule`),
`modules/module/oft_utils.py` (`OFTRotationModule`), pull requests #1073, #1135, #1315, #1447.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Own, need
from adapterops.methods.orthogonal import (
    TERMS,
    OfTheWeight,
    blocks_error,
    columns,
    minus_eye,
    neumann,
    side,
    skew,
    turned,
    values,
)
from adapterops.storage import dtypes
from adapterops.storage.tensor import LazyTensor, MemorySource

if TYPE_CHECKING:
    import torch


class OneTrainerOft(OfTheWeight):
    """OneTrainer's OFT.  It has it for Linear and Conv2d."""

    name = "onetrainer_oft"
    title = "OFT of OneTrainer (rotation of the inputs)"
    formula = "W' = W · diag(Q)ᵀ, for convolutions W · diag(Q)"
    source = "Nerogar/OneTrainer modules/module/oft_utils.py"
    flags = ("scaled",)
    compared = frozenset({"scaled"})

    def check(self, update: Update) -> None:
        if not update.tensors:
            raise BrokenAdapter(
                f"{update.name}: the marker of Scaled OFT stands in the file without its rotations (oft_R.weight)",
                fault="missing-half",
            )
        need(update, "R")
        r = update.tensors["R"]
        stray = next((t for role, t in update.tensors.items() if role != "R"), None)
        if stray is not None:
            raise BrokenAdapter(f"{stray.where}: is no part of OneTrainer's OFT ({update.name})")
        if len(r.shape) != 2 or not r.shape[0] or side(r.shape[1]) in (None, 1):
            raise BrokenAdapter(
                f"{r.where}: shape {list(r.shape)}; OFT has the upper entries of square blocks [blocks, size·(size − 1)/2], and "
                "no size has so many"
            )
        if update.options.get("scaled") is False:
            raise BrokenAdapter(
                f"{r.where}: the marker of Scaled OFT beside it says no, and whoever reads it goes by its presence "
                f"({update.name}): take it out, or train again"
            )

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        r = update.tensors.get("R")
        b = side(r.shape[1]) if r is not None and len(r.shape) == 2 else None
        if r is None or not b:
            return True  # `check` says it better than a shape could
        if len(shape) < 2:
            return False
        inputs = columns(shape)
        return r.shape[0] * b == inputs or (r.shape[0] == 1 and inputs % b == 0)

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        return dict(update.tensors)  # the inputs of every row are turned alike

    def is_nothing(self, update: Update) -> bool:
        return bool((update.tensors["R"].numpy() == 0).all())

    def rotations(self, update: Update) -> torch.Tensor:
        """Q (k, b, b) in float64."""
        return neumann(skew(entries(update)), TERMS)

    def change(self, update: Update, own: Own | None = None) -> Change:
        own = self.own(update, own)
        shape = tuple(own.weight.shape)
        blocks = minus_eye(self.rotations(update))
        blocks = blocks.mT if len(shape) > 2 else blocks
        return Change(turned(own.weight.float().reshape(shape[0], -1), blocks).reshape(shape))

    def error(self, update: Update, other: Update) -> float:
        """How far the rotations are from each other."""
        if update.tensors.keys() != other.tensors.keys():
            return float("inf")
        return blocks_error(self.rotations(update), self.rotations(other))


def entries(update: Update) -> torch.Tensor:
    """The entries of S above its diagonal, (k, b·(b−1)/2) in float64."""
    r = values(update.tensors["R"])
    return r / (2 * sqrt((side(r.shape[1]) or 1) - 1)) if update.options.get("scaled") else r


def as_peft(update: Update, shape: Sequence[int] | None) -> Update:
    """The same as peft's OFT, for a module whose weight has `shape`: the same bytes where it is linear and not scaled.

    Raises `CannotRepresent` where the shape is unknown, and for kernels above one, whose inputs peft turns otherwise.
    """
    if shape is None:
        raise CannotRepresent(
            f"{update.name}: OneTrainer's OFT turns a convolution the other way round than a linear module, and nothing says "
            "which this is; --arch NAME, --base CONFIG or --base-weights BASE does"
        )
    if len(shape) > 2 and columns(tuple(shape)) != shape[1]:
        raise CannotRepresent(
            f"{update.name}: peft's OFT of a convolution with kernels {list(shape[2:])} sums up overlapping patches of its "
            "input, and OneTrainer's turns the weight: to-lora --base-weights BASE makes a LoRA of it"
        )
    r = update.tensors["R"]
    if len(shape) > 2 or update.options.get("scaled"):
        numbers = entries(update).numpy() * (-1 if len(shape) > 2 else 1)
        dtype = r.dtype if r.dtype in dtypes.FLOATS and not update.options.get("scaled") else "F32"
        r = LazyTensor(r.key, dtype, r.shape, MemorySource(dtypes.from_numpy(dtype, numbers)), 0)
    said = {"use_cayley_neumann": True, "num_cayley_neumann_terms": TERMS, "coft": False}
    return replace(update, method="oft", tensors={"R": r}, options=said)
