"""What methods share whose tensors belong to the whole model: random projections, and products of exact factors.

Projections that were not saved are drawn again: their numbers depend on the seed and on the size of the shared
matrices, which is that of the largest module that the adapter changes.  So `options["projection"]` is (out, in): the
largest outputs and the largest inputs over *all* updates of one kind (`largest` of their shapes), the same for every
update; who reads an adapter with its base known fills it in.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Method, need_shape, setting
from adapterops.methods.lora import factor_norm, product_error
from adapterops.methods.products import Rows
from adapterops.storage.tensor import LazyTensor

if TYPE_CHECKING:
    import numpy.typing
    import torch

    Array = numpy.typing.NDArray[Any]


def largest(shapes: Iterable[tuple[int, ...]]) -> tuple[int, int]:
    """The largest outputs and the largest inputs of weights (out, in); not necessarily of one module.

    Raises `ValueError` where there are none.
    """
    outputs, inputs = zip(*(shape[:2] for shape in shapes), strict=True)
    return max(outputs), max(inputs)


def projection_size(update: Update) -> tuple[int, int]:
    """(out, in) of the largest module.  Raises `CannotRepresent` where no base said it."""
    size = update.options.get("projection")
    if size is None:
        raise CannotRepresent(
            f"{update.name}: the projections of {update.method} were not saved (save_projection), and the largest module "
            "decides what its seed draws; --arch NAME, --base CONFIG or --base-weights BASE says how large it is"
        )
    return int(size[0]), int(size[1])


def seed_of(update: Update, name: str) -> int:
    """An option that is a seed.  Raises `CannotRepresent` where nothing said it, or no generator takes it."""
    seed = int(setting(update, name))
    if not 0 <= seed < 1 << 63:
        raise CannotRepresent(f"{update.name}: {name} is {seed}, and no generator starts from that; --set {name}=VALUE")
    return seed


def numbers(tensor: LazyTensor) -> Array:
    """The values in float64."""
    return tensor.numpy().astype("f8")


def check_vector(tensor: LazyTensor) -> None:
    """Raise `BrokenAdapter` unless the tensor is (n,) with n > 0."""
    if len(tensor.shape) != 1 or not tensor.numel:
        raise BrokenAdapter(
            f"{tensor.where}: shape {list(tensor.shape)}; a vector of numbers belongs here (an unsharded export?)"
        )


def check_dimensions(tensor: LazyTensor, count: int) -> None:
    """Raise `BrokenAdapter` unless the tensor has `count` axes, none of them empty."""
    if len(tensor.shape) != count or 0 in tensor.shape:
        raise BrokenAdapter(
            f"{tensor.where}: shape {list(tensor.shape)}; {count} axes with something in each belong here (an unsharded "
            "export?)"
        )


def check_integers(tensor: LazyTensor) -> None:
    """Raise `BrokenAdapter` unless the tensor holds integers."""
    if tensor.dtype not in ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"):
        raise BrokenAdapter(
            f"{tensor.where}: dtype {tensor.dtype}; positions are integers (a tool cast the whole file?)"
        )


def positions(update: Update, count: int) -> tuple[Array, Array]:
    """The rows and columns of a weight (out, in) that `count` coefficients stand at.

    They are the first of a permutation of all entries, drawn from `options["random_loc_seed"]`.

    Raises `CannotRepresent` without the seed or the shape, `BrokenAdapter` where the weight has fewer entries.
    """
    out, inputs = need_shape(update)[:2]
    if count > out * inputs:
        raise BrokenAdapter(
            f"{update.tensors['spectrum'].where}: {count} coefficients, but a weight {[out, inputs]} has {out * inputs} "
            "entries (another base?)"
        )
    return _positions(seed_of(update, "random_loc_seed"), out, inputs, count)


@lru_cache(maxsize=16)
def _positions(seed: int, out: int, inputs: int, count: int) -> tuple[Array, Array]:
    import torch

    drawn = torch.randperm(out * inputs, generator=torch.Generator().manual_seed(seed))[:count].numpy()
    return drawn // inputs, drawn % inputs


class Factored(Method):
    """A method whose ΔW is the product of two factors that have to be computed first: `factors`."""

    compared = frozenset({"shape", "projection"})

    def factors(self, update: Update) -> tuple[Array, Array]:
        """(out, r) and (r, in) in float64, the scale of a `scaled` method aside.

        Raises `CannotRepresent` where a fact is missing.
        """
        raise NotImplementedError

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor] | None:
        import torch

        b, a = self.factors(update)
        return torch.from_numpy(b), torch.from_numpy(a)

    def exact_rank(self, update: Update) -> int | None:
        return self.rank(update)

    def norm(self, update: Update) -> float | None:
        """None where a fact is missing that the factors need."""
        try:
            return factor_norm(*self.factors(update))
        except CannotRepresent:
            return None

    def matrix(self, update: Update) -> Rows:
        b, a = self.factors(update)
        return Rows((len(b), a.shape[1]), lambda start, stop: b[start:stop] @ a)

    def error(self, update: Update, other: Update) -> float:
        """Of the products; where a fact is missing that they need, of the tensors one by one."""
        try:
            b, a = self.factors(update)
            b2, a2 = self.factors(other)
        except CannotRepresent:
            return super().error(update, other)
        if (b.shape[0], a.shape[1]) != (b2.shape[0], a2.shape[1]):
            return float("inf")
        return product_error(b, a, b2, a2)
