"""RandLoRA: a full-rank update out of random bases, each weighted by diagonal matrices.

With m = min(out, in), M = max(out, in), n = ⌈m / r⌉ bases and s = alpha / r:

- `lambda` (r, n), `gamma` (n, m): of the module
- `A` (r, 1, largest m), `B` (largest M, largest n, r): of the whole model, the same tensors for every update; a module
  uses the first M rows, n bases and m columns.  peft 0.21 writes copies of them under every module, too

P (r·n, m), row i·n + j = lambda[i, j] · gamma[j] ∘ A[i, 0, :m];  Q (M, n·r), column j·r + i = B[:M, j, i].  As peft
flattens the two in different orders, column k of Q meets row k of P, whatever (i, j) each stands for.
ΔW = s · Q·P where in ≤ out, else s · (Q·P)ᵀ.  Its rank is m in general, so it has no low-rank factors.

Which of out and in is m is in no tensor: `options["shape"]`.  Without `A` and `B` (`save_projection=False`) they are
drawn from `options["projection_prng_key"]` for `options["projection"]` (see `shared`), and divided by their standard
deviation: uniform in bfloat16; with `sparse` or `very_sparse` entries of −1, 0 and 1.  peft takes float16 on a GPU that
has no bfloat16: what was trained there can only be had with saved projections.

Sources: https://arxiv.org/abs/2502.00987; peft `tuners/randlora/layer.py`, `tuners/randlora/model.py`.
"""

from __future__ import annotations

from functools import lru_cache
from math import sqrt
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Method, need, need_shape
from adapterops.methods.products import Rows, alpha_over_rank, known
from adapterops.methods.shared import check_dimensions, numbers, projection_size, seed_of
from adapterops.storage.tensor import LazyTensor, is_zero

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


class RandLora(Method):
    """RandLoRA on linear modules."""

    name = "randlora"
    title = "RandLoRA (weighted random bases)"
    formula = "ΔW = s·Σ B_j·diag(λ_j)·A_j·diag(γ_j), B_j and A_j shared and random"
    source = "https://arxiv.org/abs/2502.00987"
    scaled = True
    needs_shape = True
    compared = frozenset({"shape", "projection"})

    def check(self, update: Update) -> None:
        need(update, "lambda", "gamma")
        one, two = update.tensors["lambda"], update.tensors["gamma"]
        check_dimensions(one, 2)
        check_dimensions(two, 2)
        rank, bases = one.shape
        if two.shape[0] != bases or bases != -(-two.shape[1] // rank):
            raise BrokenAdapter(
                f"{two.where}: shape {list(two.shape)}, but {one.key!r} {list(one.shape)} has rank {rank} and {bases} bases; "
                f"a module of {two.shape[1]} channels has {-(-two.shape[1] // rank)} of that rank",
                fault="ranks",
            )
        if not update.tensors.keys() & {"A", "B"}:
            return
        need(update, "A", "B")
        a, b = update.tensors["A"], update.tensors["B"]
        check_dimensions(a, 3)
        check_dimensions(b, 3)
        for basis, found in ((a, a.shape[0]), (b, b.shape[2])):
            if found != rank:
                raise BrokenAdapter(
                    f"{basis.where}: shape {list(basis.shape)} has rank {found}, but {one.key!r} {list(one.shape)} has rank "
                    f"{rank}; they are not of one adapter",
                    fault="ranks",
                )
        if a.shape[1] != 1 or a.shape[2] < two.shape[1] or b.shape[1] < bases:
            raise BrokenAdapter(
                f"{a.where}: shape {list(a.shape)} with {b.key!r} {list(b.shape)} is too small for {two.key!r} "
                f"{list(two.shape)}; they are not of one adapter"
            )

    def rank(self, update: Update) -> int:
        return update.tensors["lambda"].shape[0]

    def scale(self, update: Update) -> float | None:
        return alpha_over_rank(update, self.rank(update))

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        gamma, b = update.tensors.get("gamma"), update.tensors.get("B")
        if gamma is None or len(gamma.shape) != 2:
            return True  # `check` says it better than a shape could
        if len(shape) != 2 or min(shape) != gamma.shape[1]:
            return False
        return b is None or not b.shape or max(shape) <= b.shape[0]

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["lambda"])

    def weight_shape(self, update: Update) -> tuple[int, ...] | None:
        shape = update.options.get("shape")
        return None if shape is None else tuple(shape)

    def folded(self, update: Update, dtype: str | None) -> dict[str, LazyTensor]:
        scale = known(update, self.scale(update))
        return {role: t.mapped(dtype, scale if role == "lambda" else 1.0) for role, t in update.tensors.items()}

    def delta(self, update: Update) -> torch.Tensor:
        return self.matrix(update).dense()

    def norm(self, update: Update) -> float | None:
        """None where a fact other than the scale is missing."""
        known(update, self.scale(update))
        try:
            return self.matrix(update).norm()
        except CannotRepresent:
            return None

    def matrix(self, update: Update) -> Rows:
        scale = known(update, self.scale(update))
        out, inputs = need_shape(update)[:2]
        large, small = max(out, inputs), min(out, inputs)
        a, b = self.projections(update)
        weights, channels = numbers(update.tensors["lambda"]), numbers(update.tensors["gamma"])
        rank, bases = weights.shape
        if small != channels.shape[1] or len(b) < large or b.shape[1] < bases or a.shape[2] < small:
            raise BrokenAdapter(
                f"{update.tensors['gamma'].where}: shape {list(channels.shape)}, and projections {list(a.shape)} and "
                f"{list(b.shape)}; none of these is an update of a weight {[out, inputs]} (another base?)"
            )
        inner = scale * weights[:, :, None] * channels[None] * a[:, :, :small]
        inner = inner.reshape(rank * bases, small)
        outer = b[:large, :bases].reshape(large, rank * bases)
        left, right = (outer, inner) if inputs <= out else (inner.T, outer.T)
        return Rows((out, inputs), lambda start, stop: left[start:stop] @ right)

    def projections(self, update: Update) -> tuple[Array, Array]:
        """A (r, 1, largest m) and B (largest M, largest n, r), in float64."""
        if "A" in update.tensors:
            return numbers(update.tensors["A"]), numbers(update.tensors["B"])
        size = projection_size(update)
        zeros = sqrt(min(size)) if update.options.get("very_sparse") else 3.0 if update.options.get("sparse") else None
        return drawn(seed_of(update, "projection_prng_key"), self.rank(update), max(size), min(size), zeros)

    def error(self, update: Update, other: Update) -> float:
        try:
            return self.matrix(update).error(self.matrix(other))
        except CannotRepresent:
            return super().error(update, other)


@lru_cache(maxsize=1)
def drawn(seed: int, rank: int, large: int, small: int, sparsity: float | None) -> tuple[Array, Array]:
    """The projections that peft draws from its seed: A (rank, 1, small), then B (large, bases, rank), in float64.

    `sparsity` s: an entry is −1 or 1 with probability 1 / 2s each, else 0; None: none is zero.
    """
    import torch

    generator = torch.Generator(device="cpu").manual_seed(seed)
    bases = -(-small // rank)

    def uniform(shape: tuple[int, ...]) -> torch.Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16)
        return torch.nn.init.kaiming_uniform_(empty, a=sqrt(5), generator=generator)

    def signs(shape: tuple[int, ...], bound: float) -> torch.Tensor:
        values = torch.rand(shape, generator=generator)
        return (values > 1 - bound).float() - (values < bound).float()

    if sparsity is None:
        a = uniform((rank, 1, small))
        b = torch.cat([uniform((large, 1, rank)) for _ in range(bases)], dim=1)
    else:
        a, b = (signs(shape, 1 / (2 * sparsity)) for shape in ((rank, 1, small), (large, bases, rank)))
    return (a / a.std()).double().numpy(), (b / b.std()).double().numpy()
