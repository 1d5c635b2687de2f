"""Uni-LoRA: every number of every LoRA factor is one of the numbers of a single vector, scaled.

ΔW = B·A, exactly of rank r, with A = scales_A ∘ theta_d[indices_A] and B alike.  Roles:

- `theta_d` (d,): of the whole model, the same tensor for every update, and often all that a file holds
- with `save_indices`: `indices_A` (r, in_features) and `indices_B` (out_features, r), integers; `scales_A`, `scales_B` of
  the same shapes

Without the latter, the indices of the whole model are one shuffled sequence of D numbers, in which each of 0 … d − 1
comes ⌊D / d⌋ or ⌈D / d⌉ times; module after module takes r·in of it for A, then out·r for B.  The scale is
1 / √(how often the index comes).  So a module's part depends on all others, and options must say, besides
`options["shape"]`:

- `options["r"]`, `options["proj_seed"]`: fields of the config
- `options["offset"]`: where the module's part begins; `options["total"]`: D.  Both follow from the shapes of all modules
  that the adapter changes, in the order in which the model has them (`layout`): without the base, and without the
  config's `target_modules`, they cannot be known, and neither can which modules there are.  Whoever reads such a
  file without these keeps one update whose module is "", with `theta_d` alone

Indices are drawn by numpy's generator (its streams are stable in practice, not by promise).  peft rounds the scales to
the dtype of the base's weights (they are not rounded here), and then computes in float32.

Sources: https://arxiv.org/abs/2506.00799; peft `tuners/unilora/layer.py`, `tuners/unilora/model.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import need, need_shape, setting
from adapterops.methods.shared import Factored, check_dimensions, check_integers, check_vector, numbers, seed_of
from adapterops.storage.tensor import is_zero

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]

OWN = ("indices_A", "indices_B", "scales_A", "scales_B")
"""The roles of a module's own tensors."""


def layout(shapes: Sequence[tuple[int, ...]], rank: int) -> tuple[list[int], int]:
    """Where the part of each module begins, and the length of all: for weights (out, in) in the model's order."""
    starts, total = [], 0
    for out, inputs in shapes:
        starts.append(total)
        total += rank * (out + inputs)
    return starts, total


class Unilora(Factored):
    """Uni-LoRA on linear modules."""

    name = "unilora"
    title = "Uni-LoRA (one vector for all modules)"
    formula = "ΔW = B·A, every number a scaled one of one vector"
    form = "rank r"
    source = "https://arxiv.org/abs/2506.00799"
    needs_shape = True
    compared = frozenset({"shape", "offset", "total"})

    def check(self, update: Update) -> None:
        need(update, "theta_d")
        check_vector(update.tensors["theta_d"])
        if not update.tensors.keys() & set(OWN):
            return
        need(update, *OWN)
        a, b = update.tensors["indices_A"], update.tensors["indices_B"]
        for indices, role in ((a, "scales_A"), (b, "scales_B")):
            check_dimensions(indices, 2)
            check_integers(indices)
            scales = update.tensors[role]
            if scales.shape != indices.shape:
                raise BrokenAdapter(
                    f"{scales.where}: shape {list(scales.shape)}, but {indices.key!r} has {list(indices.shape)}; every "
                    "index has a scale"
                )
        if a.shape[0] != b.shape[1]:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} has rank {b.shape[1]}, but {a.key!r} {list(a.shape)} has rank "
                f"{a.shape[0]}; they are not halves of one update",
                fault="ranks",
            )

    def rank(self, update: Update) -> int | None:
        indices = update.tensors.get("indices_A")
        rank = update.options.get("r")
        return indices.shape[0] if indices is not None else None if rank is None else int(rank)

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        a, b = update.tensors.get("indices_A"), update.tensors.get("indices_B")
        if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
            return len(shape) == 2
        return shape == (b.shape[0], a.shape[1])

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["theta_d"])

    def weight_shape(self, update: Update) -> tuple[int, ...] | None:
        a, b = update.tensors.get("indices_A"), update.tensors.get("indices_B")
        if a is not None and b is not None:
            return b.shape[0], a.shape[1]
        shape = update.options.get("shape")
        return None if shape is None else tuple(shape)

    def factors(self, update: Update) -> tuple[Array, Array]:
        theta = numbers(update.tensors["theta_d"])
        if "indices_A" in update.tensors:
            import numpy as np

            a, b = (update.tensors[role].numpy().astype(np.int64) for role in ("indices_A", "indices_B"))
            for indices, role in ((a, "indices_A"), (b, "indices_B")):
                if indices.min() < 0 or indices.max() >= len(theta):
                    raise BrokenAdapter(
                        f"{update.tensors[role].where}: positions outside of the {len(theta)} numbers of "
                        f"{update.tensors['theta_d'].key!r}"
                    )
            scale_a, scale_b = numbers(update.tensors["scales_A"]), numbers(update.tensors["scales_B"])
        else:
            a, b, scales = self._drawn(update, len(theta))
            scale_a, scale_b = scales[a], scales[b]
        return theta[b] * scale_b, theta[a] * scale_a

    def _drawn(self, update: Update, length: int) -> tuple[Array, Array, Array]:
        """The indices of A and of B, and the scale of every index."""
        if not update.module:
            raise CannotRepresent(
                f"{update.name}: only theta_d was saved ({update.tensors['theta_d'].where}), and nothing said which modules it "
                "stands for; --base CONFIG with the adapter's config says it, or a file saved with save_indices"
            )
        out, inputs = need_shape(update)[:2]
        rank, seed = int(setting(update, "r")), seed_of(update, "proj_seed")
        if not 0 < rank <= max(out, inputs):
            raise CannotRepresent(f"{update.name}: r is {rank}, which no module {[out, inputs]} has; --set r=VALUE")
        offset, total = update.options.get("offset"), update.options.get("total")
        if offset is None or total is None:
            raise CannotRepresent(
                f"{update.name}: which numbers of theta_d its factors take depends on all modules before it; --base CONFIG "
                "says their order"
            )
        positions, scales = drawn(seed, length, int(total))
        half, end = offset + rank * inputs, offset + rank * (inputs + out)
        if end > total:
            raise CannotRepresent(
                f"{update.name}: its {rank * (inputs + out)} indices end after the {total} of the whole adapter; the base has "
                "other modules than the adapter was made for"
            )
        return positions[offset:half].reshape(rank, inputs), positions[half:end].reshape(out, rank), scales


@lru_cache(maxsize=1)
def drawn(seed: int, length: int, total: int) -> tuple[Array, Array]:
    """The indices (total,) that peft draws from its seed, and the scale of every index (length,), in float64."""
    import numpy as np

    generator = np.random.default_rng(seed)
    indices = np.repeat(np.arange(length), total // length)
    if total % length:
        indices = np.concatenate([indices, generator.choice(length, size=total % length, replace=False)])
    generator.shuffle(indices)
    counts = np.bincount(indices, minlength=length)
    scales = np.zeros(length)
    scales[counts > 0] = 1 / np.sqrt(counts[counts > 0])
    return indices, scales
