"""What every method of adaptation offers to the rest of the library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, isnan
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.storage.tensor import LazyTensor, is_zero

if TYPE_CHECKING:
    import numpy.typing
    import torch

    from adapterops.methods.products import Rows

    Array = numpy.typing.NDArray[Any]


class Own(NamedTuple):
    """A module's own parameters in the base model.

    `weight` is (out, in, *kernel), whatever way the base stores it (a transformers Conv1D is transposed for this); an
    embedding's is (num_embeddings, embedding_dim).  `bias` is (out,).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None


class Change(NamedTuple):
    """What an update adds to its module's own parameters, in float32 and in their shapes; None where one stays."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None = None


class Method:
    """A kind of update.  Subclasses hold the maths; they are stateless and live in `methods.METHODS`."""

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    """The paper or file that defines the method."""
    formula: ClassVar[str] = ""
    """What it does to the module's weight, in a line."""
    form: ClassVar[str] = ""
    """Its exact low-rank form, in a line; "" where it has none."""
    scaled: ClassVar[bool] = False
    """Whether updates carry an alpha."""
    alpha_role: ClassVar[str] = ""
    """The role of what a dialect stores as alpha, for methods that have something there which is no scale; "" elsewhere."""
    rows: ClassVar[frozenset[str]] = frozenset()
    """The roles whose first axis is the module's outputs."""
    pairs: ClassVar[tuple[tuple[str, str], ...]] = ()
    """The row factor (out, r) and the shared factor (r, in) of each low-rank product."""

    flags: ClassVar[tuple[str, ...]] = ()
    """The options (true or false) that a file may keep as tensors of one element."""

    needs_weight: ClassVar[bool] = False
    """Whether the delta is a function of the base's weight (`change` then takes `own`)."""
    needs_shape: ClassVar[bool] = False
    """Whether the module's shape is not in the tensors: `options["shape"]` then has it, where the base is known."""
    blocks: ClassVar[bool] = False
    """Whether it acts on modules that hold others (an attention, a decoder's layer) and own no parameter themselves."""
    linear: ClassVar[bool] = True
    """Whether what the module computes changes as if its own parameters did; False where there is no weight delta."""

    compared: ClassVar[frozenset[str]] = frozenset()
    """Options that may differ between equal updates, since `error` compares what they mean."""

    def check(self, update: Update) -> None:
        """Raise `BrokenAdapter` where the tensors cannot belong together."""

    def today(self, update: Update) -> tuple[Update, str]:
        """The update with its tensors as they are called today, where an earlier version called them otherwise, and what is to
        be said of that; itself and "" where there is nothing to do."""
        return update, ""

    def rank(self, update: Update) -> int | None:
        """The rank, for methods that have one."""
        return None

    def scale(self, update: Update) -> float | None:
        """The factor on the product of the factors, for methods that have one; None while alpha is unknown."""
        return None

    def fits(self, update: Update, shape: tuple[int, ...]) -> bool:
        """Whether the update can act on a module whose weight has `shape`."""
        return True

    def take_rows(self, update: Update, pieces: Sequence[tuple[int, int]]) -> dict[str, LazyTensor]:
        """The tensors of the same update on some rows of its module's weight: one part of a fused projection.

        Raises `CannotRepresent` where the update does not act on rows one by one.
        """
        if not self.rows:
            raise CannotRepresent(f"{update.name}: {self.title} cannot be split into the parts of a fused projection")
        return {role: t.rows(pieces) if role in self.rows else t for role, t in update.tensors.items()}

    def folded(self, update: Update, dtype: str | None) -> dict[str, LazyTensor]:
        """The tensors with the scale multiplied in, in `dtype` (None: each its own).

        Raises `CannotRepresent` for a method without a factor that could take it.
        """
        raise CannotRepresent(f"{update.name}: the scale of {self.title} cannot be folded into its tensors")

    def is_nothing(self, update: Update) -> bool:
        """Whether the update changes nothing, since what its rows are made of is zero."""
        return bool(self.rows) and all(is_zero(t) for role, t in update.tensors.items() if role in self.rows)

    def norm(self, update: Update) -> float | None:
        """‖ΔW‖ (Frobenius) before any DoRA normalisation; None where ΔW needs the base weight or does not exist.

        Raises `CannotRepresent` where the scale is unknown.
        """
        return None

    def acts_on_base(self, update: Update) -> bool:
        """Whether what this update adds depends on the base's own weight; `change` then takes `own`."""
        return self.needs_weight

    def delta(self, update: Update) -> torch.Tensor:
        """ΔW in float32, in the shape of the module's weight.

        By default the product of the factors that `low_rank` gives, times the scale.

        Raises `CannotRepresent` where ΔW needs the base weight or does not exist.
        """
        found = self.low_rank(update)
        if found is None:
            raise CannotRepresent(f"{update.name}: {self.title} has no weight delta of its own")
        scale = self.scale(update) if self.scaled else 1.0
        if scale is None:
            raise CannotRepresent(f"{update.name}: its scale is unknown, so its delta is too (give --alpha)")
        b, a = found
        return (b.double() @ a.double() * scale).float().reshape(self.weight_shape(update) or (b.shape[0], a.shape[1]))

    def change(self, update: Update, own: Own | None = None) -> Change:
        """W' − W and b' − b, exact for inference; `own` is needed where `needs_weight`, and for what acts on a bias.

        Raises `CannotRepresent` where a fact is missing (the base's parameters, a shape, a field of a config), and where
        no change of the parameters does what the update does; `BrokenAdapter` where `own` has another shape.
        """
        delta = self.delta(update)
        if own is not None:
            delta = delta.reshape(own.weight.shape)
        if "magnitude" in update.tensors:
            from adapterops.methods.magnitude import normalised

            delta, _ = normalised(update, need_own(update, own).weight, delta)
        return Change(delta)

    def weight_shape(self, update: Update) -> tuple[int, ...] | None:
        """The shape of ΔW as the tensors have it (a kernel may be flattened, an embedding's is (dim, tokens)); None where
        no weight is changed, or where the change needs the base."""
        return None

    def exact_rank(self, update: Update) -> int | None:
        """The r of the factors that `low_rank` gives; None where it gives none."""
        return None

    def low_rank(self, update: Update) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Exact factors of ΔW, the scale aside: (out, r) and (r, in · kernel); None where it has none of low rank.

        In the dtype of the tensors where they are the factors, else in float64.
        """
        return None

    def low_rank_of(self, update: Update, own: Own) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Exact factors of ΔW, (out, r) and (r, in · kernel) in float64, scale included, where the base's weight makes it of
        low rank and nothing but the weight changes; None elsewhere."""
        return None

    def matrix(self, update: Update) -> Rows:
        """ΔW, the scale included, as rows (out, in · kernel) that are made when they are asked for.

        By default cut from the whole `delta`.

        Raises `CannotRepresent` where ΔW needs the base weight or does not exist.
        """
        from adapterops.methods.products import Rows

        made = self.delta(update)
        values = made.reshape(made.shape[0], -1).numpy()
        return Rows(values.shape, lambda start, stop: values[start:stop].astype("f8"))

    def error(self, update: Update, other: Update) -> float:
        """How far `other` is from `update`, relative to the size of `update`; 0 where they are the same."""
        if update.tensors.keys() != other.tensors.keys():
            return float("inf")
        return worst(tensor_error(t, other.tensors[role]) for role, t in update.tensors.items())


def need_own(update: Update, own: Own | None) -> Own:
    """The base's parameters.  Raises `CannotRepresent` where they are not there."""
    if own is None:
        raise CannotRepresent(
            f"{update.name}: what {update.method} adds depends on the base's own weight; give --base-weights BASE"
        )
    return own


def need_shape(update: Update) -> tuple[int, ...]:
    """The shape of the module's weight.  Raises `CannotRepresent` where no base said it."""
    shape = update.options.get("shape")
    if shape is None:
        raise CannotRepresent(
            f"{update.name}: the size of the module is not in the tensors of {update.method}; --arch NAME, --base CONFIG "
            "or --base-weights BASE says it"
        )
    return tuple(shape)


def setting(update: Update, name: str) -> Any:
    """An option that only a config holds.  Raises `CannotRepresent` where nothing said it."""
    value = update.options.get(name)
    if value is None:
        from adapterops.methods import METHODS

        where = f"{next(iter(update.tensors.values())).where}: " if update.tensors else ""
        raise CannotRepresent(
            f"{where}{name} of {METHODS[update.method].title} is not in the tensors ({update.name}) and changes what they mean; "
            f"say it with --set {name}=VALUE"
        )
    return value


def worst(errors: Iterable[float]) -> float:
    """The largest error; inf where one is no number (`max` would lose a NaN that comes second)."""
    return max((inf if isnan(error) else error for error in errors), default=0.0)


def need(update: Update, *roles: str) -> None:
    """Raise `BrokenAdapter` unless the update has every one of `roles`."""
    missing = [role for role in roles if role not in update.tensors]
    if missing:
        present = next(iter(update.tensors.values()))
        raise BrokenAdapter(
            f"{present.where}: its counterpart {' and '.join(missing)} is missing from the file "
            f"({update.name}, method {update.method}); half an update cannot be applied",
            fault="missing-half",
        )


def tensor_error(a: LazyTensor, b: LazyTensor) -> float:
    """‖a − b‖ / ‖a‖ over all elements, in float64 (absolute where a is zero); inf for other element counts."""
    if a.numel != b.numel:
        return inf
    return array_error(a.numpy().astype("f8"), b.numpy().astype("f8"))


def array_error(a: Array, b: Array) -> float:
    """`tensor_error` of arrays of float64."""
    import numpy as np

    difference, norm = float(np.linalg.norm(a.reshape(-1) - b.reshape(-1))), float(np.linalg.norm(a))
    return difference / norm if norm else difference
