"""GraLoRA on linear modules: the weight cut into k by k blocks, each with a low-rank product of its own.

ΔW = s · (G + B_general·A_general), s = alpha / (r + h).  Shapes, with k blocks along either side and q = r / k:

- `A` (k, in_features / k, r) and `B` (k, r, out_features / k): the block of G in row j and column n of blocks is
  B[j, n·q : (n + 1)·q, :]ᵀ · A[n, :, j·q : (j + 1)·q]ᵀ, of rank q
- `A_general` (h, in_features), `B_general` (out_features, h): a plain LoRA beside it, where the config's hybrid_r is h > 0

The k² blocks have no factor in common, so G is exactly of rank k² · q = k · r (as LoRA factors that are block diagonal),
and ΔW of rank k · r + h.

Sources: https://arxiv.org/abs/2505.20355; peft `tuners/gralora/layer.py` (its forward and its merge agree).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import Method, need
from adapterops.methods.lora import factor_norm
from adapterops.methods.products import Rows, alpha_over_rank, known
from adapterops.storage.tensor import LazyTensor, is_zero

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class Gralora(Method):
    """GraLoRA, with or without its hybrid LoRA."""

    name = "gralora"
    title = "GraLoRA (low-rank blocks)"
    formula = "ΔW = s·(k × k blocks, each of rank r/k, + B_general·A_general)"
    form = "rank k·r + hybrid_r"
    source = "https://arxiv.org/abs/2505.20355"
    scaled = True

    def check(self, update: Update) -> None:
        need(update, "A", "B")
        a, b = update.tensors["A"], update.tensors["B"]
        for factor in (a, b):
            if len(factor.shape) != 3 or 0 in factor.shape:
                raise BrokenAdapter(f"{factor.where}: shape {list(factor.shape)}; factors of GraLoRA have three axes")
        count, rank = a.shape[0], a.shape[2]
        if b.shape[:2] != (count, rank):
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} has {b.shape[0]} blocks of rank {b.shape[1]}, but {a.key!r} "
                f"{list(a.shape)} has {count} of rank {rank}; they are not halves of one update",
                fault="ranks",
            )
        if rank % count:
            raise BrokenAdapter(
                f"{a.where}: shape {list(a.shape)}; rank {rank} cannot be shared out among {count} blocks "
                "(r must be a multiple of gralora_k)"
            )
        if update.tensors.keys() & {"A_general", "B_general"}:
            need(update, "A_general", "B_general")
            self._check_general(update)

    def _check_general(self, update: Update) -> None:
        out, inputs = self.weight_shape(update)
        a, b = update.tensors["A_general"], update.tensors["B_general"]
        if len(a.shape) != 2 or 0 in a.shape or a.shape[1] != inputs:
            raise BrokenAdapter(
                f"{a.where}: shape {list(a.shape)}; the plain LoRA beside this GraLoRA needs (hybrid_r, {inputs})"
            )
        if b.shape != (out, a.shape[0]):
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)}; the other half {a.key!r} {list(a.shape)} needs {[out, a.shape[0]]}"
            )

    def rank(self, update: Update) -> int:
        """r + h, by which alpha is divided; r is that of a row or a column of blocks."""
        return update.tensors["A"].shape[2] + self._hybrid(update)

    def scale(self, update: Update) -> float | None:
        return alpha_over_rank(update, self.rank(update))

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        a, b = update.tensors.get("A"), update.tensors.get("B")
        if a is None or b is None or (len(a.shape), len(b.shape)) != (3, 3):
            return True  # `check` says it better than a shape could
        return self.weight_shape(update) == shape

    def folded(self, update: Update, dtype: str | None) -> dict[str, LazyTensor]:
        scale = known(update, self.scale(update))
        return {
            role: t.mapped(dtype, scale if role in ("B", "B_general") else 1.0) for role, t in update.tensors.items()
        }

    def is_nothing(self, update: Update) -> bool:
        return all(is_zero(update.tensors[role]) for role in ("B", "B_general") if role in update.tensors)

    def norm(self, update: Update) -> float:
        return abs(known(update, self.scale(update))) * factor_norm(*self._factors(update))

    def weight_shape(self, update: Update) -> tuple[int, int]:
        a, b = update.tensors["A"], update.tensors["B"]
        return b.shape[0] * b.shape[2], a.shape[0] * a.shape[1]

    def delta(self, update: Update) -> torch.Tensor:
        return self.matrix(update).dense()

    def matrix(self, update: Update) -> Rows:
        import numpy as np

        scale = known(update, self.scale(update))
        a, b = self._blocks(update)
        made = np.einsum("jnqo,njqi->joni", b, a).reshape(self.weight_shape(update))
        if "A_general" in update.tensors:
            made += self._general(update, "B") @ self._general(update, "A")
        made *= scale
        return Rows(self.weight_shape(update), lambda start, stop: made[start:stop])

    def exact_rank(self, update: Update) -> int | None:
        """k · r + h, if the module's sizes are not below it."""
        count, _, rank = update.tensors["A"].shape
        rank = count * rank + self._hybrid(update)
        return rank if rank <= min(self.weight_shape(update)) else None

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor] | None:
        """One column of B and one row of A for each (row of blocks, column of blocks, rank in the block), then the
        hybrid's."""
        import torch

        if self.exact_rank(update) is None:
            return None
        b, a = self._factors(update)
        return torch.from_numpy(b), torch.from_numpy(a)

    def error(self, update: Update, other: Update) -> float:
        return self.matrix(update).error(self.matrix(other))

    def _hybrid(self, update: Update) -> int:
        """h: the rank of the plain LoRA beside it, 0 where there is none."""
        general = update.tensors.get("A_general")
        return 0 if general is None else general.shape[0]

    def _blocks(self, update: Update) -> tuple[Array, Array]:
        """A as (column of blocks n, row of blocks j, q, in / k) and B as (j, n, q, out / k), in float64."""
        a, b = (update.tensors[role].numpy().astype("f8") for role in "AB")
        count, inputs, rank = a.shape
        a = a.reshape(count, inputs, count, rank // count).transpose(0, 2, 3, 1)
        return a, b.reshape(count, count, rank // count, -1)

    def _general(self, update: Update, half: str) -> Array:
        values: Array = update.tensors[f"{half}_general"].numpy().astype("f8")
        return values

    def _factors(self, update: Update) -> tuple[Array, Array]:
        """(out, k · r + h) and (k · r + h, in) in float64, the scale aside."""
        import numpy as np

        a, b = self._blocks(update)
        count, _, part, inputs = a.shape
        outputs = b.shape[-1]
        left = np.zeros((count, outputs, count, count, part))  # (j, o) × (j, n, q)
        right = np.zeros((count, count, part, count, inputs))  # (j, n, q) × (n, i)
        for at in range(count):
            left[at, :, at] = b[at].transpose(2, 0, 1)
            right[:, at, :, at] = a[at]
        made = left.reshape(count * outputs, -1), right.reshape(-1, count * inputs)
        if "A_general" not in update.tensors:
            return made
        return np.hstack([made[0], self._general(update, "B")]), np.vstack([made[1], self._general(update, "A")])
