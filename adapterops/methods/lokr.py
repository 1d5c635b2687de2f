"""LoKr: the Kronecker product of a small and a larger factor, on linear and convolution modules, with DoRA magnitudes.

ΔW = s · (w1 ⊗ w2).  Shapes, with out = o1 · o2 and in = i1 · i2:

- w1 (o1, i1), or w1_a (o1, r) and w1_b (r, i1), whose product it is
- w2 (o2, i2, *kernel), or w2_a (o2, r) and w2_b (r, i2 · kernel), or with a Tucker core t2 (r, r, *kernel):
  w2_a (r, o2) and w2_b (r, i2), the core's first index belonging to w2_a
- `magnitude` (n,): as in `lora`

Each factor is whole or decomposed on its own account.  s = alpha / r (alpha / √r where the update says rsLoRA), r being
the rank of whichever factor is decomposed.  Where none is, a file does not show r, and two rules exist: LyCORIS and its
readers apply scale 1 whatever alpha says; peft applies alpha / r with the r of its config, which then stands in
`options["rank"]`.

LyCORIS writes an rsLoRA scale into alpha itself (alpha · √r) and `use_scalar` into w1 or w1_a; it never writes `lokr_t1`.
Its 4.1.3 merges (`get_diff_weight`, `get_merged_weight`) apply the scale twice; the scale here is that of its forward.
It trains rsLoRA with two whole factors at scale √r and loads its own file at scale 1, as every reader does.  peft 0.21.2
multiplies a whole w2 of a 1-d convolution along the wrong axes (`make_kron` lifts w1 for four dimensions only).

Sources: https://arxiv.org/abs/2309.14859 (LyCORIS); `lycoris/modules/lokr.py`, `lycoris/functional/lokr.py`; peft
`tuners/lokr/layer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Method, array_error, worst
from adapterops.methods.products import (
    Rows,
    Shape,
    alpha_over_rank,
    check_magnitude,
    known,
    magnitude_error,
    magnitude_rows,
    pair_factors,
    pair_shape,
)
from adapterops.storage.tensor import LazyTensor, is_zero

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class Lokr(Method):
    """LoKr."""

    name = "lokr"
    formula = "ΔW = s·w1 ⊗ w2, either decomposed or whole (both whole: s is 1, but in peft)"
    form = "rank i1·r, where w2 is decomposed and that is at most half of the smaller side; else by singular values"
    compared = frozenset({"rank"})
    title = "LoKr (Kronecker product)"
    source = "https://arxiv.org/abs/2309.14859"
    scaled = True

    def check(self, update: Update) -> None:
        core = update.tensors.get("t1")
        if core is not None:
            raise BrokenAdapter(
                f"{core.where}: a Tucker core of LoKr's first factor ({update.name}), which no writer defines; what it "
                "should do is not known"
            )
        for name in ("w1", "w2"):
            whole = update.tensors.get(name)
            parts = [role for role in (f"{name}_a", f"{name}_b", f"t{name[1]}") if role in update.tensors]
            if whole is not None and parts:
                raise BrokenAdapter(
                    f"{whole.where}: the factor is there whole and again as {' and '.join(parts)} ({update.name}); "
                    "readers take one or the other"
                )
        one, two = self._shapes(update)
        found = {
            f"{role} {list(t.shape)}": t.shape[0] for role, t in update.tensors.items() if role in ("w1_b", "w2_b")
        }
        if update.options.get("rank") is not None:
            found["its config"] = update.options["rank"]
        if len(set(found.values())) > 1:
            first = next(t for role, t in update.tensors.items() if role in ("w1_b", "w2_b"))
            raise BrokenAdapter(
                f"{first.where}: the rank of this LoKr is "
                + ", ".join(f"{rank} by {source}" for source, rank in found.items())
                + f" ({update.name}): alpha / rank would have two meanings",
                fault="ranks",
            )
        check_magnitude(update, one.out * two.out, one.inputs * two.inputs)

    def rank(self, update: Update) -> int | None:
        """r of the decomposed factor, or of the config; None where neither is there."""
        for role in ("w1_b", "w2_b"):
            if role in update.tensors:
                return update.tensors[role].shape[0]
        stated: int | None = update.options.get("rank")
        return stated

    def scale(self, update: Update) -> float | None:
        rank = self.rank(update)
        return 1.0 if rank is None else alpha_over_rank(update, rank)

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        try:
            one, two = self._shapes(update)
        except BrokenAdapter:
            return True  # `check` says it better than a shape could
        return Shape(one.out * two.out, 0, one.inputs * two.inputs, two.kernel).fits(shape)

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        """The update on those rows.

        Raises `CannotRepresent` unless the pieces are whole blocks: o2 rows for each row of w1.
        """
        size = self._shapes(update)[1].out
        role = "w1" if "w1" in update.tensors else "w1_a"
        cut = [piece for piece in pieces if piece[0] % size or piece[1] % size]
        if cut:
            raise CannotRepresent(
                f"{update.name}: its LoKr has blocks of {size} rows (one for each row of {update.tensors[role].key!r}), and "
                f"a part of this fused projection takes rows {cut[0][0]} to {cut[0][1]}: a Kronecker product cannot be cut "
                "inside a block; a target that keeps the projection whole holds it (--to kohya, --to comfy)"
            )
        blocks = [(start // size, stop // size) for start, stop in pieces]
        return {**update.tensors, role: update.tensors[role].rows(blocks), **magnitude_rows(update, pieces)}

    def folded(self, update: Update, dtype: str | None) -> dict[str, LazyTensor]:
        scale = known(update, self.scale(update))
        return {role: t.mapped(dtype, scale if role in ("w1", "w1_a") else 1.0) for role, t in update.tensors.items()}

    def is_nothing(self, update: Update) -> bool:
        if "magnitude" in update.tensors:
            return False
        return is_zero(update.tensors["w1" if "w1" in update.tensors else "w1_a"])

    def delta(self, update: Update) -> torch.Tensor:
        """ΔW in float32 before any DoRA normalisation; (out, in · kernel) where the file holds the kernel flattened."""
        one, two = self._shapes(update)
        matrix = kronecker(*self._factors(update)).dense()
        return matrix.reshape(one.out * two.out, one.inputs * two.inputs, *two.kernel)

    def norm(self, update: Update) -> float:
        import numpy as np

        w1, w2 = self._factors(update)
        return float(np.linalg.norm(w1) * np.linalg.norm(w2))

    def error(self, update: Update, other: Update) -> float:
        (w1, w2), (v1, v2) = self._factors(update), self._factors(other)
        if (w1.shape, w2.shape) == (v1.shape, v2.shape):
            error = kronecker_error(w1, w2, v1, v2)
        else:
            error = kronecker(w1, w2).error(kronecker(v1, v2))
        return worst([error, magnitude_error(update, other)])

    def weight_shape(self, update: Update) -> tuple[int, ...]:
        one, two = self._shapes(update)
        return (one.out * two.out, one.inputs * two.inputs, *two.kernel)

    def exact_rank(self, update: Update) -> int | None:
        """i1 · r where w2 is decomposed and has no kernel, if that is still low."""
        one, two = self._shapes(update)
        rank = one.inputs * two.rank
        low = 0 < 2 * rank <= min(one.out * two.out, one.inputs * two.inputs)
        return rank if low and not two.kernel else None

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor] | None:
        """w1 ⊗ (a·b) = (w1 ⊗ a)·(I ⊗ b)."""
        import torch

        if self.exact_rank(update) is None:
            return None
        one = self._shapes(update)[0]
        w1 = torch.from_numpy(self._factor(update, "1"))
        a, b = map(torch.from_numpy, pair_factors(update, "w2_a", "w2_b", "t2"))
        return torch.kron(w1, a), torch.kron(torch.eye(one.inputs, dtype=b.dtype), b)

    def matrix(self, update: Update) -> Rows:
        return kronecker(*self._factors(update))

    def _shapes(self, update: Update) -> tuple[Shape, Shape]:
        """Of w1 and w2; rank 0 where a factor is whole.  Raises `BrokenAdapter` where they are none."""
        shapes = []
        for number in "12":
            whole = update.tensors.get(f"w{number}")
            if whole is None:
                shapes.append(pair_shape(update, f"w{number}_a", f"w{number}_b", f"t{number}"))
            elif len(whole.shape) < 2 or 0 in whole.shape:
                raise BrokenAdapter(f"{whole.where}: shape {list(whole.shape)} is no factor of a Kronecker product")
            else:
                shapes.append(Shape(whole.shape[0], 0, whole.shape[1], whole.shape[2:]))
        one, two = shapes
        if one.columns != one.inputs:
            first = update.tensors.get("w1") or update.tensors["w1_b"]
            raise BrokenAdapter(f"{first.where}: shape {list(first.shape)}; the first factor of LoKr has no kernel")
        return one, two

    def _factors(self, update: Update) -> tuple[Array, Array]:
        """w1 (o1, i1) times the scale, and w2 (o2, i2 · kernel), in float64."""
        return self._factor(update, "1") * known(update, self.scale(update)), self._factor(update, "2")

    def _factor(self, update: Update, number: str) -> Array:
        """w1 or w2 as a matrix, in float64."""
        import numpy as np

        whole = update.tensors.get(f"w{number}")
        if whole is not None:
            values: Array = whole.numpy().astype(np.float64).reshape(whole.shape[0], -1)
            return values
        a, b = pair_factors(update, f"w{number}_a", f"w{number}_b", f"t{number}")
        product: Array = a @ b
        return product


def kronecker(w1: Array, w2: Array) -> Rows:
    """w1 ⊗ w2 (o1 · o2, i1 · i2), a few rows at a time.  A kernel flattened into w2's columns stays where it is."""
    import numpy as np

    def at(start: int, stop: int) -> Array:
        row = np.arange(start, stop)
        left, right = w1[row // len(w2)], w2[row % len(w2)]
        product: Array = (left[:, :, None] * right[:, None, :]).reshape(stop - start, -1)
        return product

    return Rows((len(w1) * len(w2), w1.shape[1] * w2.shape[1]), at)


def kronecker_error(w1: Array, w2: Array, v1: Array, v2: Array) -> float:
    """‖w1⊗w2 − v1⊗v2‖ / ‖w1⊗w2‖ (absolute where w1⊗w2 is zero) for factors of the same shapes, without a product.

    With v1 = c·w1 + p and p orthogonal to w1, the difference is w1⊗(w2 − c·v2) − p⊗v2: two orthogonal terms, so
    nothing cancels, even where a number has moved from one factor to the other.
    """
    import numpy as np

    n1, n2 = float(np.linalg.norm(w1)), float(np.linalg.norm(w2))
    if not n1 or not n2:
        return float(np.linalg.norm(v1)) * float(np.linalg.norm(v2))
    if np.array_equal(w1, v1):
        return array_error(w2, v2)
    if np.array_equal(w2, v2):
        return array_error(w1, v1)
    unit = w1 / n1
    along = float(np.sum(unit * v1))
    beside = float(np.linalg.norm(v1 - along * unit)) * float(np.linalg.norm(v2))
    return float(np.hypot(np.linalg.norm(n1 * w2 - along * v2), beside)) / (n1 * n2)
