"""VeRA: two vectors a module on random matrices that all modules share.

ΔW = diag(lambda_b) · B[:out] · diag(lambda_d) · A[:, :in], exactly of rank r.  Roles:

- `lambda_b` (out_features,), `lambda_d` (r,): of the module
- `A` (r, largest in_features), `B` (largest out_features, r): of the whole model, the same tensors for every update; a
  module uses the first columns and rows

in_features is in no tensor: `options["shape"]`.  Without `A` and `B` (`save_projection=False`) they are drawn from
`options["projection_prng_key"]` for the size in `options["projection"]` (see `shared`), A first: uniform in ±√(6 / r's
fan-in), as peft draws them with torch's generator on the CPU.

Sources: https://arxiv.org/abs/2310.11454; peft `tuners/vera/layer.py`, `tuners/vera/model.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import need, need_shape
from adapterops.methods.shared import Factored, check_dimensions, check_vector, numbers, projection_size, seed_of
from adapterops.storage.tensor import is_zero

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]


class Vera(Factored):
    """VeRA on linear modules."""

    name = "vera"
    title = "VeRA (vectors on shared random matrices)"
    formula = "ΔW = diag(λ_b)·B·diag(λ_d)·A, B and A shared and random"
    form = "rank r"
    source = "https://arxiv.org/abs/2310.11454"
    needs_shape = True
    parts = 1
    """Blocks of r in `lambda_d` and in the rows of `A`."""

    def check(self, update: Update) -> None:
        need(update, "lambda_b", "lambda_d")
        out, inner = update.tensors["lambda_b"], update.tensors["lambda_d"]
        check_vector(out)
        check_vector(inner)
        if inner.numel % self.parts:
            raise BrokenAdapter(
                f"{inner.where}: {inner.numel} numbers; {self.title} has {self.parts} for each rank, so an odd count is none"
            )
        if not update.tensors.keys() & {"A", "B"}:
            return
        need(update, "A", "B")
        a, b = update.tensors["A"], update.tensors["B"]
        check_dimensions(a, 2)
        check_dimensions(b, 2)
        if a.shape[0] != inner.numel:
            raise BrokenAdapter(
                f"{inner.where}: {inner.numel} numbers, but {a.key!r} {list(a.shape)} has {a.shape[0]} rows; they are not of "
                "one adapter"
            )
        if b.shape[1] * self.parts != inner.numel:
            raise BrokenAdapter(
                f"{b.where}: shape {list(b.shape)} has rank {b.shape[1]}, but {a.key!r} {list(a.shape)} has rank "
                f"{a.shape[0] // self.parts}; they are not halves of one update",
                fault="ranks",
            )
        if b.shape[0] < out.numel:
            raise BrokenAdapter(
                f"{b.where}: {b.shape[0]} rows are too few for the {out.numel} outputs of {update.name} ({out.key!r})"
            )

    def rank(self, update: Update) -> int:
        return update.tensors["lambda_d"].numel // self.parts

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        out, a = update.tensors.get("lambda_b"), update.tensors.get("A")
        if out is None:
            return True  # `check` says it better than a shape could
        if len(shape) != 2 or out.numel != shape[0]:
            return False
        return a is None or len(a.shape) != 2 or a.shape[1] >= shape[1]

    def is_nothing(self, update: Update) -> bool:
        return is_zero(update.tensors["lambda_b"]) or is_zero(update.tensors["lambda_d"])

    def weight_shape(self, update: Update) -> tuple[int, ...] | None:
        shape = update.options.get("shape")
        return None if shape is None else tuple(shape)

    def factors(self, update: Update) -> tuple[Array, Array]:
        out, inputs = need_shape(update)[:2]
        a, b = self.projections(update)
        rank = self.rank(update)
        outer, inner = (numbers(update.tensors[role]) for role in ("lambda_b", "lambda_d"))
        if len(outer) != out or len(b) < out or a.shape[1] < inputs:
            raise BrokenAdapter(
                f"{update.tensors['lambda_b'].where}: {len(outer)} outputs, and projections for {a.shape[1]} inputs and "
                f"{len(b)} outputs; none of these is an update of a weight {[out, inputs]} (another base?)"
            )
        return outer[:, None] * b[:out], inner[:rank, None] * a[:rank, :inputs]

    def projections(self, update: Update) -> tuple[Array, Array]:
        """A (parts · r, largest in) and B (largest out, r), in float64."""
        if "A" in update.tensors:
            return numbers(update.tensors["A"]), numbers(update.tensors["B"])
        out, inputs = projection_size(update)
        return drawn(seed_of(update, "projection_prng_key"), self.rank(update), self.parts, out, inputs)


@lru_cache(maxsize=2)
def drawn(seed: int, rank: int, parts: int, out: int, inputs: int) -> tuple[Array, Array]:
    """The projections that peft draws from its seed: A (parts · rank, inputs), then B (out, rank), in float64."""
    import torch

    generator = torch.Generator(device="cpu").manual_seed(seed)
    shapes = (parts * rank, inputs), (out, rank)
    a, b = (torch.nn.init.kaiming_uniform_(torch.empty(shape), generator=generator) for shape in shapes)
    return a.double().numpy(), b.double().numpy()
