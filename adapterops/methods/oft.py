"""OFT: a block-diagonal rotation of a module's inputs, in peft's three generations of tensors.

Since peft 0.16: W' = W · diag(Q)ᵀ of W (out, n), n = in · kernel; an embedding's W' = W · diag(Q); the bias stays.

- `R` (k, b·(b−1)/2), k·b = n, or k = 1 for all blocks alike (`block_share`): the entries above the diagonal of a
  skew-symmetric S, row by row.  Q = (I − S)(I + S)⁻¹, or where `options["use_cayley_neumann"]` (peft's default) the
  first `num_cayley_neumann_terms` (5) terms of I + 2S + 2S² + …, which is nearly the inverse of the former.  peft 0.18
  halved the last term: `options["peft_version"]` tells which, today's where it is missing
- `options["coft"]` (False), `options["eps"]` (6e-5): each S is first shortened to ‖S‖ ≤ eps/√k
- kernels: peft's forward turns the patches of its input and sums them up again where they overlap, so even an
  untrained adapter changes the outputs, and no change of the weight does the same.  peft's merge turns the weight, as
  the paper has it: `options["as_merged"]` asks for that.  With kernels of one element the two agree

peft 0.14 and 0.15: W' = diag(s) · W · diag(Q)ᵀ, Q = (I − S)(I + S)⁻¹ of S = (M − Mᵀ)/2

- `r` (k or 1, b, b): the blocks M, shortened to eps·⌈out/(n/b)⌉²/√k where `coft`
- `s` (out, 1): factors on the outputs

This is BOFT with one butterfly factor, bit for bit (`as_boft`).

peft 0.7 to 0.13: W' = diag(Q)ᵀ · W, cut to its rows: on the *outputs*, which no method of today's peft turns

- `r` alone (k or 1, b, b), b = ⌈out/k⌉: the blocks M as above, shortened to eps·b²/√k where `coft`

Sources: https://arxiv.org/abs/2306.07280, https://arxiv.org/abs/2506.19847; peft `tuners/oft/layer.py` of 0.11, 0.15,
0.17 and 0.21.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil, sqrt
from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Change, Own, array_error, need, worst
from adapterops.methods.orthogonal import (
    TERMS,
    OfTheWeight,
    blocks_error,
    cayley,
    columns,
    count,
    flag,
    minus_eye,
    neumann,
    number,
    side,
    skew,
    skew_part,
    turned,
    values,
    within,
)
from adapterops.storage import dtypes
from adapterops.storage.tensor import LazyTensor, MemorySource, stack

if TYPE_CHECKING:
    import torch

EPS = 6e-5
"""COFT's bound where a config says nothing."""


def block_size(update: Update) -> int:
    """The side of the update's blocks: b of the stored rows of b·(b−1)/2 numbers, or of the stored (b, b) ones."""
    if generation(update) == 16:
        return side(update.tensors["R"].shape[1]) or 0
    return update.tensors["r"].shape[-1]


class Oft(OfTheWeight):
    """OFT.  peft has it for Linear, Conv2d and Embedding."""

    name = "oft"
    title = "OFT (orthogonal finetuning)"
    formula = (
        "W' = W · diag(Q)ᵀ, the Q Cayley transforms of the skew blocks that R holds; before peft 0.16 diag(s) · W · diag(Q)ᵀ, "
        "before 0.14 diag(Q)ᵀ · W"
    )
    source = "https://arxiv.org/abs/2306.07280"
    needs_shape = True
    compared = frozenset(
        {
            "use_cayley_neumann",
            "num_cayley_neumann_terms",
            "peft_version",
            "coft",
            "eps",
            "block_share",
            "as_merged",
            "shape",
        }
    )

    def check(self, update: Update) -> None:
        if generation(update) == 16:
            need(update, "R")
            r = update.tensors["R"]
            if len(r.shape) != 2 or not r.shape[0] or side(r.shape[1]) is None:
                raise BrokenAdapter(
                    f"{r.where}: shape {list(r.shape)}; OFT has the upper entries of square blocks "
                    "[blocks, size·(size − 1)/2], and no size has so many"
                )
            return
        need(update, "r")
        r, s = update.tensors["r"], update.tensors.get("s")
        if len(r.shape) != 3 or r.shape[1] != r.shape[2] or 0 in r.shape:
            raise BrokenAdapter(
                f"{r.where}: shape {list(r.shape)}; OFT before peft 0.16 has square blocks [blocks, size, size]"
            )
        if s is not None and (not s.numel or sum(n != 1 for n in s.shape) > 1):
            raise BrokenAdapter(f"{s.where}: shape {list(s.shape)}; OFT of peft 0.14 has one factor an output [out, 1]")

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        when = generation(update)
        tensor = update.tensors.get("R" if when == 16 else "r")
        if tensor is None or len(tensor.shape) != (2 if when == 16 else 3) or not tensor.shape[0]:
            return True  # `check` says it better than a shape could
        if len(shape) < 2:
            return False
        blocks, b = tensor.shape[0], block_size(update)
        if when == 7:
            return b <= shape[0] if blocks == 1 else ceil(shape[0] / blocks) == b
        if when == 14 and update.tensors["s"].numel != shape[0]:
            return False
        inputs = columns(shape)
        return blocks * b == inputs or (blocks == 1 and bool(b) and inputs % b == 0)

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        if generation(update) == 7:
            return super().take_rows(update, pieces)
        if "s" not in update.tensors:
            return dict(update.tensors)  # the inputs of every row are turned alike
        s = update.tensors["s"]
        return {**update.tensors, "s": s.reshape((s.numel, 1)).rows(pieces)}

    def is_nothing(self, update: Update) -> bool:
        if generation(update) == 16:
            return bool((update.tensors["R"].numpy() == 0).all())
        r, s = update.tensors["r"].numpy(), update.tensors.get("s")
        return bool((r == r.swapaxes(-1, -2)).all()) and (s is None or bool((s.numpy() == 1).all()))

    def change(self, update: Update, own: Own | None = None) -> Change:
        import torch

        own = self.own(update, own)
        shape = tuple(own.weight.shape)
        weight = own.weight.float().reshape(shape[0], -1)
        when = generation(update)
        blocks = self.rotations(update, weight.shape)
        if when == 16:
            if update.options.get("kind") == "embedding":
                return Change(turned(weight, minus_eye(blocks).mT))
            if len(shape) > 2 and weight.shape[1] != shape[1] and not flag(update, "as_merged", False):
                raise CannotRepresent(
                    f"{update.name}: what peft's forward does here is no change of a weight {list(shape)}: it sums up "
                    "overlapping patches of the input, which changes the outputs even before training.  peft's own "
                    "merge_and_unload turns the weight instead, and gives another model than the one that was trained"
                )
            return Change(turned(weight, minus_eye(blocks)).reshape(shape))
        if when == 14:
            s = values(update.tensors["s"]).reshape(-1, 1)
            made = s.float() * turned(weight, minus_eye(blocks)) + (s - 1).float() * weight
            return Change(made.reshape(shape))
        # Rows are turned as the columns of the transposed weight are, and what the last block has too many is cut.
        b = blocks.shape[-1]
        wide = torch.nn.functional.pad(weight.T, (0, -shape[0] % b))
        used = blocks[: wide.shape[1] // b]
        return Change(turned(wide, minus_eye(used).mT)[:, : shape[0]].T.reshape(shape))

    def skews(self, update: Update, weight: Sequence[int]) -> torch.Tensor:
        """S (k, b, b) in float64, shortened where `coft`; `weight` is (out, n), read for peft 0.14's bound alone."""
        when = generation(update)
        given = values(update.tensors["R" if when == 16 else "r"])
        blocks = skew(given) if when == 16 else given
        if flag(update, "coft", False):
            limit = number(update, "eps", EPS) / sqrt(len(blocks))
            if when < 16:
                b = blocks.shape[-1]
                limit *= (b if when == 7 else ceil(weight[0] / (weight[1] // b))) ** 2
            blocks = within(blocks, limit)
        return blocks if when == 16 else skew_part(blocks)

    def rotations(self, update: Update, weight: Sequence[int]) -> torch.Tensor:
        """Q (k, b, b) in float64."""
        s = self.skews(update, weight)
        if generation(update) < 16 or not flag(update, "use_cayley_neumann", True):
            return cayley(s)
        return neumann(s, terms(update), halved(update))

    def error(self, update: Update, other: Update) -> float:
        """How far the rotations (and factors minus one) are from each other."""
        if update.tensors.keys() != other.tensors.keys():
            return float("inf")
        errors = []
        shape = (1, 1)
        if "s" in update.tensors:
            s, s2 = (u.tensors["s"].numpy().astype("f8").reshape(-1) - 1 for u in (update, other))
            if s.shape != s2.shape:
                return float("inf")
            errors.append(array_error(s, s2))
            r = update.tensors["r"].shape
            known = update.options.get("shape") or other.options.get("shape")
            shape = (s.size, columns(tuple(known)) if known else r[0] * r[-1])
        one, two = (self.rotations(u, shape) for u in (update, other))
        return worst([*errors, blocks_error(one, two)])


def generation(update: Update) -> int:
    """The minor version of peft 0 that began to write such tensors: 7, 14 or 16."""
    if "R" in update.tensors:
        return 16
    return 14 if "s" in update.tensors else 7 if "r" in update.tensors else 16


def terms(update: Update) -> int:
    """How many terms of the series."""
    said = update.options.get("num_cayley_neumann_terms")
    return TERMS if said is None else count(update, "num_cayley_neumann_terms", said)


def halved(update: Update) -> bool:
    """Whether the series' last term lacks the factor 2: since peft 0.18, which was the first to write its version."""
    major, _, rest = str(update.options.get("peft_version") or "").partition(".")
    minor = rest.partition(".")[0]
    return not (major.isdecimal() and minor.isdecimal()) or (int(major), int(minor)) >= (0, 18)


def as_boft(update: Update) -> Update:
    """An update of peft 0.14 or 0.15 as the BOFT that does the same: the blocks and factors are the same bytes.

    Blocks that were shared are repeated, which takes `options["shape"]`; those that COFT shortens are made anew.  BOFT has
    the factors of a convolution in a row: where no shape tells one, they are laid out for a linear module.
    Raises `CannotRepresent` where the module's shape is needed and unknown, and for other generations.
    """
    when = generation(update)
    if when != 14:
        raise CannotRepresent(f"{update.name}: {_why(update)}" if when == 7 else f"{update.name}: is no BOFT")
    r, s = update.tensors["r"], update.tensors["s"]
    count_, b = r.shape[0], r.shape[-1]
    shape = update.options.get("shape")
    coft = flag(update, "coft", False)
    if shape is None and (count_ == 1 or coft):
        why = (
            "one block stands for one or for all alike" if count_ == 1 else "COFT's bound depends on the module's size"
        )
        raise CannotRepresent(
            f"{update.name}: {why} ({r.key!r} {list(r.shape)}); --arch NAME, --base CONFIG or --base-weights BASE says what "
            "the module has"
        )
    inputs = columns(tuple(shape)) if shape is not None else count_ * b
    if coft:
        oft = Oft()
        made = oft.skews(update, (s.numel, inputs))
        r = LazyTensor(r.key, r.dtype, r.shape, MemorySource(dtypes.from_numpy(r.dtype, made.numpy())), 0)
    blocks = inputs // b
    r = (r if count_ == blocks else stack([r] * blocks)).reshape((1, blocks, b, b))
    kernel = shape is not None and len(shape) > 2
    s = s.reshape((1, s.numel) if kernel else (s.numel, 1))
    kept = {name: value for name, value in update.options.items() if name in ("shape", "fan_in_fan_out")}
    return replace(update, method="boft", tensors={"R": r, "s": s}, options=kept)


def _why(update: Update) -> str:
    """Why the oldest generation has no successor."""
    return (
        f"OFT of peft before 0.14 ({update.tensors['r'].key!r} without oft_s) turns the outputs of a module, and every method "
        "of today's peft turns its inputs; to-lora --base-weights BASE turns it into LoRA"
    )
